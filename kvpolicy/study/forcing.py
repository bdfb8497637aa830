"""Teacher forcing: a given text is read under a policy and with the full cache side by side, and compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.budget import Budget
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.layer import has_other_layers
from kvpolicy.runtimes.hf.passes import ordinary_tensors
from kvpolicy.runtimes.hf.positions import positions_left
from kvpolicy.spec import PolicySpec
from kvpolicy.study.choosing import require_finite
from kvpolicy.study.decoding import Prompts, Usage, bytes_per_entry, forward
from kvpolicy.study.problem import Compress
from kvpolicy.types import Scores

BLOCK = 64
"""Most tokens that are read at once."""

_LOGITS = 1 << 25  # logits of a block, all rows together
_QUERIES = 16  # queries whose weights over the whole text are in memory at once


@dataclass
class ForcedText:
    """A row: token ids, how many of them are given as a prompt, and how many of these are its context."""

    tokens: list[int]
    prompt: int
    context: int = 0


@dataclass
class Divergence:
    """What one row showed.

    Attributes:
        kl: sum over forced tokens of the divergence from the full cache's distribution, in nats.
        agreed: forced tokens whose most likely next token is the full cache's.
        mass: sum over forced tokens of the attention mass that the policy still holds.
        count: forced tokens.
        usage: what the policy's cache held.
    """

    kl: float = 0.0
    agreed: int = 0
    mass: float = 0.0
    count: int = 0
    usage: Usage = field(default_factory=Usage)

    def metrics(self, *, attention: bool) -> dict[str, float]:
        """Return the metrics; ``attention_mass`` only if it was measured."""
        found = {"kl": self.kl / self.count, "top1": self.agreed / self.count, **self.usage.metrics()}
        if attention:
            found["attention_mass"] = self.mass / self.count
        return found


class _Watch(ImportanceScorer):
    """Makes a cache remember the queries of a block; it scores nothing, for nothing is evicted."""

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def observed_queries(self) -> int:
        """All of a block."""
        return BLOCK

    def score(self, view: CacheView) -> Scores:
        """Return zeros."""
        return torch.zeros(view.shape, device=view.device)


def full_policy(*, watch: bool = False) -> Policy:
    """Return the policy that keeps everything; with `watch`, its cache remembers the last `BLOCK` queries."""
    spec = PolicySpec(policy="full", budget=1.0, trigger={"every": 1 << 20}, importance="none", mixer="importance_only")
    if not watch:
        return spec.build()
    parts = {
        name: getattr(spec, name).component for name in ("trigger", "redundancy", "mixer", "allocator", "selector")
    }
    return Policy(name="full", budget=Budget(fraction=1.0), importance=_Watch(), **parts)


def force_batch(
    model: Any,
    policy: Policy,
    rows: Sequence[ForcedText],
    *,
    attention: bool = False,
    compress: Compress | None = None,
) -> list[Divergence]:
    """Read texts under a policy and compare every next-token distribution with the full cache's.

    The text is read in blocks that end where the policy's trigger may fire, so that every compaction happens between
    the same two tokens, and sees the same, as when the tokens come one by one.

    Args:
        model: a decoder of transformers.
        policy: what to do with the cache.
        rows: texts with at least 2 tokens behind their prompt; different lengths are allowed.
        attention: also measure the attention mass kept.
        compress: what is compressed to the budget once; None leaves that to the policy's trigger and phase.

    Raises:
        KVPolicyError: the policy does not fit the model or the texts, or a text the model's positions.
    """
    full = full_policy(watch=attention)
    for row in rows:  # what the full cache says beyond them is no measure, whatever the policy can do there
        positions_left(model, full, len(row.tokens) - 1, "text", least=0)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens) - rows[i].prompt)
    results = [Divergence() for _ in rows]
    with (
        torch.inference_mode(),
        PolicyCache(full, model) as reference,
        PolicyCache(policy, model) as cache,
    ):
        start = time.perf_counter()
        given = [rows[i].tokens[: rows[i].prompt] for i in order]
        prompts = Prompts(given, model.device, compress, [rows[i].context for i in order])
        if prompts.gaps and has_other_layers(cache):
            return [force_batch(model, policy, [row], attention=attention, compress=compress)[0] for row in rows]
        vocabulary = prompts.run(model, reference, compress=False).shape[-1]
        prompts.run(model, cache)
        mask, offset = prompts.mask, 0
        while True:
            left = [len(rows[i].tokens) - rows[i].prompt - offset - 1 for i in order]
            if left[0] <= 0:
                gone = sum(n <= 0 for n in left)
                size = bytes_per_entry(cache)
                for i, held in zip(order[:gone], cache.engine.rows, strict=False):
                    results[i].usage.peak = held.peak
                    results[i].usage.bytes_peak = held.peak * size
                if gone == len(order):
                    return results
                stay = torch.arange(gone, len(order), device=model.device)
                for each in (reference, cache):
                    each.batch_select_indices(stay)
                order, mask = order[gone:], None if mask is None else mask[stay]
                continue
            most = max(1, _LOGITS // (len(order) * vocabulary))
            count = min(left[0], room(cache), most)
            ids = torch.tensor(
                [rows[i].tokens[rows[i].prompt + offset : rows[i].prompt + offset + count] for i in order],
                device=model.device,
            )
            first = torch.tensor([rows[i].prompt + offset for i in order], device=model.device)
            positions = first[:, None] + torch.arange(count, device=model.device)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(order), count)], 1)
            logits = []
            for each in (reference, cache):
                each.expect("verify")  # decoding, as the check of a speculation is, however many tokens come
                logits.append(forward(model, each, ids, positions, mask, logits=count))
            _compare(results, order, logits[0], logits[1])
            if attention:
                _weigh(results, order, reference, cache, count)
            offset += count
            now = time.perf_counter()
            for i, held in zip(order, cache.engine.rows, strict=True):
                results[i].usage.note(held.resident, held.seen, count)
                results[i].usage.seconds += (now - start) / len(order)
            start = now


def room(cache: PolicyCache) -> int:
    """Run what is due and return how many tokens can come at once before the next compaction, at most `BLOCK`."""
    with ordinary_tensors():  # of what a compaction makes, the next pass writes into
        cache.engine.settle()
    ledger, least = cache.engine.ledger, BLOCK
    for row in ledger.rows:
        least = ledger.room(row, least)
    return least


def _compare(
    results: list[Divergence], order: Sequence[int], full: Float[Tensor, "B q V"], ours: Float[Tensor, "B q V"]
) -> None:
    wide = torch.promote_types(full.dtype, torch.float32)
    p, q = full.to(wide).log_softmax(-1), ours.to(wide).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0).double().sum(-1)
    require_finite(divergence)
    agreed = (full.argmax(-1) == ours.argmax(-1)).sum(-1)
    for i, kl, same in zip(order, divergence.tolist(), agreed.tolist(), strict=True):
        results[i].kl += kl
        results[i].agreed += same
        results[i].count += full.shape[1]


def _weigh(
    results: list[Divergence], order: Sequence[int], reference: PolicyCache, cache: PolicyCache, count: int
) -> None:
    """Add the share of the full cache's attention of the last `count` queries that falls on what `cache` holds."""
    everyone = slice(0, len(order))
    window = reference.engine.log.window()
    mass = torch.zeros(len(order), dtype=torch.float64, device=reference.model.device)
    layers = reference.engine.layers
    for layer in layers:
        view = reference.engine.view(layer, everyone, window)
        held = _held(cache.engine.view(layer, everyone), view)
        assert view.queries is not None
        assert view.query_positions is not None
        assert view.query_valid is not None
        newest = view.query_valid & (view.query_positions > (view.seen - count - 1)[:, None])
        for start in range(0, view.queries.shape[3], _QUERIES):
            part = slice(start, start + _QUERIES)
            weights = ops.attention_weights(
                view.queries[:, :, :, part], view.query_positions[:, part], newest[:, part], view.keys, view.positions,
                view.valid, scale=view.scale, softcap=view.softcap, attention_sinks=view.attention_sinks,
            )  # fmt: skip
            kept = (weights * held[:, :, None, None]).sum(-1) / weights.sum(-1).clamp(min=1e-30)
            mass += kept.double().mean((1, 2)).sum(-1) / len(layers)
    for i, share in zip(order, mass.tolist(), strict=True):
        results[i].mass += share


def _held(ours: CacheView, full: CacheView) -> Bool[Tensor, "B H N"]:
    """Return which slots of the full cache, which are in order of position, the policy still holds."""
    held = torch.zeros(full.shape, dtype=torch.int8, device=full.device)
    at = ours.positions.long().clamp(0, full.shape[2] - 1)
    return held.scatter_reduce(2, at, ours.valid.to(torch.int8), "amax") > 0
