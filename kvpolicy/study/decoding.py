"""Batched generation under a policy, row by row as if each were alone, with what each row held."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.layer import has_other_layers
from kvpolicy.runtimes.hf.naming import passing
from kvpolicy.runtimes.hf.positions import positions_left
from kvpolicy.study.choosing import choose
from kvpolicy.study.problem import Compress
from kvpolicy.study.sampling import Sampling

_DROP_SHARE = 4  # finished rows leave the batch when they are a quarter of it


@dataclass
class PromptRow:
    """One row of a batch.

    Attributes:
        prompt: token ids.
        seed: seed of the noise.
        key: what stands for the problem in the noise.
        context: how many of the first tokens are the context that is compressed, where a context is.
    """

    prompt: list[int]
    seed: int = 0
    key: int = 0
    context: int = 0


@dataclass
class Usage:
    """What a row's cache held, per KV head, counted at the attention of every decode step.

    Attributes:
        steps: decode steps.
        resident: sum of entries over steps.
        seen: sum of tokens seen over steps.
        peak: most entries ever held.
        bytes_peak: bytes of keys and values at that moment, all evictable layers together.
        seconds: the row's share of the time of its batch.
    """

    steps: int = 0
    resident: int = 0
    seen: int = 0
    peak: int = 0
    bytes_peak: int = 0
    seconds: float = 0.0

    def note(self, resident: int, seen: int, steps: int = 1) -> None:
        """Add decode steps, the last of which held `resident` entries of `seen` tokens, each one more than before."""
        before = steps * (steps - 1) // 2
        self.steps += steps
        self.resident += resident * steps - before
        self.seen += seen * steps - before

    def metrics(self) -> dict[str, float]:
        """Return the metrics that every run has."""
        return {
            "resident_mean": self.resident / self.steps if self.steps else float(self.peak),
            "resident_peak": float(self.peak),
            "retained_fraction": self.resident / self.seen if self.seen else 1.0,
            "bytes_peak": float(self.bytes_peak),
            "seconds": self.seconds,
        }


@dataclass
class Answer:
    """What a row generated, the token that ended it included."""

    tokens: list[int] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)


class Prompts:
    """Prompts of different lengths as one left-padded batch; contexts and what follows them are padded apart.

    Args:
        prompts: token ids of each row.
        device: where they go.
        compress: what is compressed to the budget once; None leaves that to the policy's trigger and phase.
        contexts: how many tokens of each prompt are its context, where contexts are compressed.

    Attributes:
        ids: int64 `[B, P]`.
        mask: int64 `[B, P]`, 0 for padding; None when there is none.
        positions: int64 `[B, P]`.
        gaps: some row has padding behind its context.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        device: Any,
        compress: Compress | None = None,
        contexts: Sequence[int] = (),
    ) -> None:
        self.compress = compress
        cuts = contexts if compress == "context" else [0] * len(prompts)
        parts = [(p[:cut], p[cut:]) for p, cut in zip(prompts, cuts, strict=True)]
        self.context, rest = (max(len(part[i]) for part in parts) for i in (0, 1))
        self.gaps = self.context > 0 and any(len(after) < rest for _, after in parts)

        def row(first: Sequence[int], after: Sequence[int], pad: list[int]) -> list[int]:
            return [*pad * (self.context - len(first)), *first, *pad * (rest - len(after)), *after]

        self.ids = torch.tensor([row(*part, [0]) for part in parts], device=device)
        filled = torch.tensor([row([1] * len(a), [1] * len(b), [0]) for a, b in parts], device=device)
        self.mask = None if bool(filled.all()) else filled
        self.positions = (filled.cumsum(-1) - 1).clamp(min=0)

    def run(self, model: Any, cache: PolicyCache, *, compress: bool = True) -> Tensor:
        """Run the prompts, in chunks if the policy says so; return the last logits `[B, V]`.

        Args:
            model: a decoder of transformers.
            cache: its cache.
            compress: whether what is to be compressed is.
        """
        if self.compress == "prompt" and compress:
            return cache.read(self.ids, self.mask)
        if self.compress == "context" and compress:
            cache.read(self.ids[:, : self.context], None if self.mask is None else self.mask[:, : self.context])
            cache.expect("decode")  # the question is not part of what is compressed
        else:
            cache.prefill_chunks(self.ids, self.mask)
        start = cache.engine.columns
        return forward(model, cache, self.ids[:, start:], self.positions[:, start:], self.mask)[:, -1]


def forward(
    model: Any, cache: PolicyCache, ids: Tensor, positions: Tensor, mask: Tensor | None, logits: int = 1
) -> Tensor:
    """Run new tokens `[B, q]` of every row through the model; return their last `logits` logits `[B, logits, V]`."""
    output = model(
        ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=logits,
        **passing(cache, model.forward),
    )  # fmt: skip
    result: Tensor = output.logits
    return result


def bytes_per_entry(cache: PolicyCache) -> int:
    """Return the bytes of one entry per KV head: keys and values of all KV heads and evictable layers."""
    stores = cache.engine.stores
    return sum(stores[layer].layout.bytes_per_entry * stores[layer].layout.heads for layer in cache.engine.layers)


def generate_batch(
    model: Any,
    policy: Policy,
    rows: Sequence[PromptRow],
    sampling: Sampling,
    ends: Collection[int],
    compress: Compress | None = None,
) -> list[Answer]:
    """Generate until an end token, `sampling.max_new_tokens` or the model's last position; return one answer per row.

    Args:
        model: a decoder of transformers.
        policy: what to do with the cache.
        rows: prompts; different lengths are allowed.
        sampling: how tokens are chosen.
        ends: tokens that end an answer.
        compress: what is compressed to the budget once; None leaves that to the policy's trigger and phase.

    Raises:
        KVPolicyError: the policy does not fit the model or the prompts, or a prompt the model's positions.
    """
    left = [positions_left(model, policy, len(row.prompt), "prompt") for row in rows]
    most = [sampling.max_new_tokens if room is None else min(room, sampling.max_new_tokens) for room in left]
    answers = [Answer() for _ in rows]
    with torch.inference_mode(), PolicyCache(policy, model) as cache:
        start = time.perf_counter()
        prompts = Prompts([row.prompt for row in rows], model.device, compress, [row.context for row in rows])
        if prompts.gaps and has_other_layers(cache):
            return [generate_batch(model, policy, [row], sampling, ends, compress)[0] for row in rows]
        logits = prompts.run(model, cache)
        mask, active, done = prompts.mask, list(range(len(rows))), [False] * len(rows)
        lengths = torch.tensor([len(row.prompt) for row in rows], device=model.device)
        for answer, held in zip(answers, cache.engine.rows, strict=True):
            answer.usage.peak = held.peak
        while True:
            now = time.perf_counter()
            for b in active:
                answers[b].usage.seconds += (now - start) / len(active)
            start = now
            chosen = choose(
                logits,
                sampling,
                [rows[b].seed for b in active],
                [rows[b].key for b in active],
                [len(answers[b].tokens) for b in active],
            )
            for b, token in zip(active, chosen.tolist(), strict=True):
                if not done[b]:
                    answers[b].tokens.append(token)
                    done[b] = token in ends or len(answers[b].tokens) >= most[b]
            ended = [i for i, b in enumerate(active) if done[b]]
            if len(ended) == len(active):
                _close(cache, answers, active)
                return answers
            if ended and len(ended) * _DROP_SHARE >= len(active):
                _close(cache, answers, [b if done[b] else None for b in active])
                keep = torch.tensor([i for i, b in enumerate(active) if not done[b]], device=model.device)
                cache.batch_select_indices(keep)
                active = [b for b in active if not done[b]]
                chosen, lengths = chosen[keep], lengths[keep]
                mask = None if mask is None else mask[keep]
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(active), 1)], 1)
            logits = forward(model, cache, chosen[:, None], lengths[:, None], mask)[:, -1]
            lengths = lengths + 1
            for b, held in zip(active, cache.engine.rows, strict=True):
                if not done[b]:
                    answers[b].usage.note(held.resident, held.seen)
                    answers[b].usage.peak = held.peak


def _close(cache: PolicyCache, answers: list[Answer], leaving: Sequence[int | None]) -> None:
    """Write down what the rows that leave have held; None for rows that stay."""
    size = bytes_per_entry(cache)
    for b in leaving:
        if b is not None:
            usage = answers[b].usage
            usage.bytes_peak = usage.peak * size
