"""Copy probes: which heads find a token again that stood far back (HeadKV, DuoAttention)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.runtimes.hf.calibration.watching import Attended, watch

NEEDLE = 24
CUE = 4
"""The first tokens of the second copy tell the model what to repeat; what they attend to is not counted."""


@dataclass(frozen=True)
class Probe:
    """A text with a needle that comes a second time at its end, the model being made to repeat it.

    Attributes:
        tokens: int64 `[N]`.
        reading: int64 `[Q]`, positions in the second copy at which the next token is to be copied.
        source: int64 `[Q]`, where that next token stands in the first copy.
    """

    tokens: Tensor
    reading: Tensor
    source: Tensor


def copy_probes(tokens: Tensor, prefix: Tensor, length: int, count: int, seed: int) -> Iterator[Probe]:
    """Yield probes: stretches of a text with a needle of its own tokens, shuffled, at depths from start to end.

    Args:
        tokens: int64 `[T]`, the text.
        prefix: int64 `[P]`, what the tokenizer puts before every text.
        length: tokens of a probe.
        count: how many.
        seed: of the needles and the places in the text.
    """
    draw = torch.Generator().manual_seed(seed)
    vocabulary = tokens.unique()
    hay = length - 2 * NEEDLE - len(prefix)
    for index in range(count):
        start = int(torch.randint(0, len(tokens) - hay + 1, (1,), generator=draw))
        needle = vocabulary[torch.randperm(len(vocabulary), generator=draw)[:NEEDLE]]
        depth = round(hay * index / max(1, count - 1) * 0.9)  # the last tenth is within anybody's recent window
        text = tokens[start : start + hay]
        place = torch.arange(CUE - 1, NEEDLE - 1)
        yield Probe(
            tokens=torch.cat([prefix, text[:depth], needle, text[depth:], needle]),
            reading=length - NEEDLE + place,
            source=len(prefix) + depth + place + 1,
        )


def copying(model: PreTrainedModel, probe: Probe) -> Tensor:
    """Return how much attention each KV head pays to the tokens that are to be copied, fp32 `[L, H]`.

    The mean over the query heads of its group and over the copied tokens.
    """
    found: list[Tensor] = []

    def look(seen: Attended) -> None:
        reading, source = probe.reading.to(seen.keys.device), probe.source.to(seen.keys.device)
        weights = seen.weights(reading)
        paid = weights.gather(-1, source.expand(*weights.shape[:2], -1).unsqueeze(-1))
        found.append(paid.mean((1, 2, 3)).cpu())

    watch(model, probe.tokens, look)
    return torch.stack(found)


def streaming_loss(model: PreTrainedModel, probe: Probe, sinks: int, recent: int) -> Tensor:
    """Return what a layer's output loses when a KV head sees its first and last tokens only, fp32 `[L, H]`.

    With `o` and `o'` the head group's attention outputs with all tokens and with the first `sinks` and last `recent`,
    ``|W_o (o - o')| / |W_o o of all heads|``, the mean over the positions at which a token is copied.
    """
    found: list[Tensor] = []

    def look(seen: Attended) -> None:
        reading = probe.reading.to(seen.keys.device)
        weights = seen.weights(reading)
        places = torch.arange(weights.shape[-1], device=reading.device)
        near = (places < sinks) | (places > reading[:, None] - recent)
        streamed = weights * near
        streamed = streamed / streamed.sum(-1, keepdim=True).clamp(min=1e-30)
        output = seen.output_projection()
        whole, lost = (
            torch.einsum("hgqn,hnd,hgdm->hqm", part, seen.values, output) for part in (weights, weights - streamed)
        )
        size = torch.linalg.vector_norm(whole.sum(0), dim=-1).clamp(min=1e-30)
        found.append((torch.linalg.vector_norm(lost, dim=-1) / size).mean(1).cpu())

    watch(model, probe.tokens, look)
    return torch.stack(found)
