"""Statistics of a model's queries over a text (Q-Filters, TriAttention)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy import ops
from kvpolicy.cache.queries.statistics import SKIPPED
from kvpolicy.runtimes.hf.calibration.watching import Attended, check, watch
from kvpolicy.runtimes.hf.rope import layer_ropes


def query_filters(model: PreTrainedModel, chunks: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the direction that each KV head's queries share, ``filters`` fp32 `[L, H, D]` of length 1.

    Per query head the first right singular vector of its queries as the attention uses them, after RoPE, turned so that
    their projections on it are positive in sum (arXiv:2503.02812, section 3); then the mean over the query heads of a
    group, as there. Queries of the first positions take no part.
    """
    moments: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}

    def look(seen: Attended) -> None:
        queries = seen.queries[:, :, SKIPPED:].double().cpu()
        moments[seen.layer] = moments.get(seen.layer, 0) + queries.transpose(-1, -2) @ queries
        sums[seen.layer] = sums.get(seen.layer, 0) + queries.sum(2)

    for chunk in chunks:
        watch(model, chunk, look)
    moment, total = (torch.stack([part[i] for i in sorted(part)]) for part in (moments, sums))
    first = torch.linalg.eigh(moment).eigenvectors[..., -1]
    sign = torch.where((first * total).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return {"filters": torch.nn.functional.normalize((first * sign).mean(2), dim=-1).float()}


def query_frequencies(model: PreTrainedModel, chunks: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return, by rotary frequency, the mean query as a complex number and the mean of the queries' magnitudes.

    ``mean`` fp32 `[L, H, G, F, 2]` and ``magnitude`` fp32 `[L, H, G, F]`, of the queries before RoPE (arXiv:2604.04921,
    section 4). Queries of the first positions take no part.
    """
    means: dict[int, Tensor] = {}
    magnitudes: dict[int, Tensor] = {}
    counted = 0
    ropes = layer_ropes(model, range(check(model)))

    def look(seen: Attended) -> None:
        rope = ropes[seen.layer]
        queries = seen.queries[:, :, SKIPPED:]
        places = torch.arange(SKIPPED, SKIPPED + queries.shape[2], device=queries.device)
        plain = ops.rotate(queries, rope, -places)[..., : 2 * len(rope.inv_freq)]
        pairs = plain.unflatten(-1, (-1, 2)) if rope.interleaved else plain.unflatten(-1, (2, -1)).transpose(-1, -2)
        pairs = pairs.double().cpu()
        means[seen.layer] = means.get(seen.layer, 0) + pairs.sum(2)
        magnitudes[seen.layer] = magnitudes.get(seen.layer, 0) + torch.linalg.vector_norm(pairs, dim=-1).sum(2)

    for chunk in chunks:
        watch(model, chunk, look)
        counted += len(chunk) - SKIPPED
    return {
        name: (torch.stack([part[i] for i in sorted(part)]) / max(1, counted)).float()
        for name, part in (("mean", means), ("magnitude", magnitudes))
    }
