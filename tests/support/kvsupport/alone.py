"""Does every row of a batch behave as if it were alone?

`as_if_alone` runs prompts one by one, then left-padded in one batch on the same tokens, and compares every compaction
and all logits. Where a batch decides a near-tie the other way, the row follows the single run, so that one such case
does not hide what comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.contracts.ranks import ALONE, Ranks
from kvpolicy.contracts.view import CacheView
from kvpolicy.loading.installed import catalog
from kvpolicy.policy.decision import Decision
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.cases import keep_indices
from kvsupport.oracle_rows import TOLERANCE, near_tie


@dataclass
class AloneReport:
    """What a comparison found.

    Attributes:
        decisions: how many times a head of a row of the batch was compacted.
        mismatches: decisions that differ from the single run's.
        accepted: likewise, but the scores at the cut, or a cosine and its threshold, are closer than `TOLERANCE`.
        near_ties: decisions of the batch of which that may be so, by its scores alone: see `near_tie`.
        slack: largest difference of scores among the accepted ones.
        logit_error: largest absolute difference of logits.
        tokens: what each prompt was continued with.
        resident: most entries per head that any row held.
    """

    decisions: int = 0
    mismatches: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    near_ties: int = 0
    slack: float = 0.0
    logit_error: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)
    resident: int = 0

    @property
    def ok(self) -> bool:
        """All decisions agree, and logits are within 1e-3."""
        return not self.mismatches and self.logit_error < 1e-3

    def __str__(self) -> str:
        more = f"; first: {self.mismatches[0]}" if self.mismatches else ""
        return (
            f"{self.decisions} decisions, {len(self.mismatches)} mismatches, {len(self.accepted)} accepted "
            f"of {self.near_ties} near ties (slack {self.slack:.1e}), logits within {self.logit_error:.1e}{more}"
        )


@dataclass
class _Noted:
    """One compaction of one row: how much it had seen, if that is known, and what each head of each layer kept."""

    seen: int | None
    kept: list[list[Tensor]]


class _Noting(Policy):
    """A policy that notes its decisions by row, and follows those of an earlier run if it is given them."""

    rows: range
    made: dict[int, list[_Noted]]
    reference: list[list[_Noted]] | None
    report: AloneReport

    def decide(self, views: Sequence[CacheView], budget: Sequence[int], ranks: Ranks = ALONE) -> Decision:
        """Decide, note, compare."""
        decision = super().decide(views, budget, ranks)
        keeps = decision.kept
        for b, row in enumerate(self.rows):
            seen = int(views[0].seen[b])
            if self.reference is not None:
                self._compare(views, decision, b, row, seen)
            kept = [
                [p[i[:n]] for p, i, n in zip(view.positions[b], keep.indices[b], keep.lengths[b].tolist(), strict=True)]
                for view, keep in zip(views, keeps, strict=True)
            ]
            self.made.setdefault(row, []).append(_Noted(seen, kept))
        return decision

    def _compare(self, views: Sequence[CacheView], decision: Decision, b: int, row: int, seen: int) -> None:
        assert self.reference is not None
        number = len(self.made.get(row, []))
        expected = self.reference[row][number] if number < len(self.reference[row]) else None
        where = f"row {row}, compaction {number} at {seen} tokens"
        if expected is None or expected.seen not in (seen, None):
            at = "none" if expected is None else f"one at {expected.seen}"
            self.report.mismatches.append(f"{where}: alone there is {at}")
            return
        for n, (view, keep) in enumerate(zip(views, decision.kept, strict=True)):
            self.report.decisions += view.shape[1]
            theirs = expected.kept[n]
            ours = [
                view.positions[b, h][keep.indices[b, h, :count]] for h, count in enumerate(keep.lengths[b].tolist())
            ]
            self.report.near_ties += sum(self._near_tie(view, decision, n, b, h) for h in range(len(ours)))
            other = [h for h in range(len(ours)) if not torch.equal(ours[h], theirs[h])]
            if not other:
                continue
            kept = keep.mask(view.shape[2])
            for h in other:
                place = f"{where}, layer {view.layer_idx}, head {h}"
                self._judge(view, decision.shared.scores[n][b, h], b, h, ours[h], theirs[h], place)
                kept[b, h] = torch.isin(view.positions[b, h], theirs[h]) & view.valid[b, h]
            decision.kept[n] = keep_indices(kept)

    def _judge(self, view: CacheView, score: Tensor, b: int, h: int, ours: Tensor, theirs: Tensor, where: str) -> None:
        extra, missing = ours[~torch.isin(ours, theirs)].tolist(), theirs[~torch.isin(theirs, ours)].tolist()
        at = dict(zip(view.positions[b, h][view.valid[b, h]].tolist(), score[view.valid[b, h]].tolist(), strict=True))
        if len(extra) != len(missing) or not set(missing) <= set(at):
            self.report.mismatches.append(f"{where}: {len(ours)} entries, alone {len(theirs)}")
            return
        slack = max(at[p] for p in extra) - min(at[p] for p in missing)
        near = self._nearest_cosine(view, b, h)
        text = f"{where}: keeps {extra}, alone {missing} (scores differ by {slack:.1e}, nearest cosine {near:.1e})"
        # Keys differ by rounding in every batch, and scores by as much of the largest among them.
        allowed = TOLERANCE * max(1.0, *map(abs, at.values()))
        if slack > -allowed and (slack < allowed or near < TOLERANCE):
            self.report.accepted.append(text)
            self.report.slack = max(self.report.slack, slack)
        else:
            self.report.mismatches.append(text)

    def _near_tie(self, view: CacheView, decision: Decision, n: int, b: int, h: int) -> bool:
        ranking = decision.shared
        scores, protected, allowed = (part[n][b, h] for part in (ranking.scores, ranking.protected, ranking.allowed))
        place = int(decision.counts[n][b, h] - protected.sum())
        close = self._nearest_cosine(view, b, h) < TOLERANCE
        return close or near_tie(scores[allowed & ~protected].tolist(), place)

    def _nearest_cosine(self, view: CacheView, b: int, h: int) -> float:
        p: Any = self.redundancy
        if not self.mixer.uses_redundancy or catalog().name_of(type(p)) != "key_cosine" or p.rope != "post":
            return math.inf
        unit = torch.nn.functional.normalize(view.keys[b, h][view.valid[b, h]].double(), dim=-1)
        return float((unit @ unit.T - p.threshold).abs().min())


def _watched(policy: Policy, report: AloneReport, reference: list[list[_Noted]] | None = None) -> _Noting:
    twin = _Noting(**{f.name: getattr(policy, f.name) for f in fields(policy)})
    for name, value in (("made", {}), ("report", report), ("reference", reference), ("rows", range(0))):
        object.__setattr__(twin, name, value)
    return twin


def _tell_rows(cache: PolicyCache, policy: _Noting) -> None:
    """Let the policy know which rows a compaction is for, which no view says."""
    engine: Any = cache.engine
    views: Callable[..., Any] = engine.views

    def views_of(rows: Sequence[int], budget: Sequence[int]) -> Any:
        object.__setattr__(policy, "rows", rows)
        return views(rows, budget)

    engine.views = views_of


@torch.no_grad()
def as_if_alone(
    model: PreTrainedModel,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    steps: int,
    *,
    choose: Callable[[Tensor, int], int] | None = None,
    pad: int = 0,
) -> AloneReport:
    """Run prompts alone and as a left-padded batch on the same tokens, and compare.

    Args:
        model: a decoder in fp32.
        policy: what to run; its `prefill_chunk` is honoured.
        prompts: token ids; of different lengths, to mean something.
        steps: tokens that each prompt is continued with.
        choose: takes logits `[V]` and the number of the step, returns the next token; the most likely one by default.
        pad: token id of the padding.
    """
    report = AloneReport()
    references, logits = [], []
    for prompt in prompts:
        watched = _watched(policy, report)
        with PolicyCache(watched, model) as cache:
            _tell_rows(cache, watched)
            ids = torch.tensor([list(prompt)], device=model.device)
            rows, tokens = _run(model, cache, ids, None, steps, choose)
            final = _kept(cache)
        report.tokens.append(tokens[0])
        references.append((watched.made.get(0, []), final[0]))
        logits.append(rows[0])
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    watched = _watched(policy, report, [made for made, _ in references])
    with PolicyCache(watched, model) as cache:
        _tell_rows(cache, watched)
        rows, _ = _run(model, cache, ids, mask, steps, None, report.tokens)
        final = _kept(cache)
        report.resident = cache.stats().peak_resident
    for b, (made, kept) in enumerate(references):
        report.logit_error = max(report.logit_error, float((rows[b] - logits[b]).abs().max()))
        if len(watched.made.get(b, [])) != len(made):
            report.mismatches.append(f"row {b}: {len(watched.made.get(b, []))} compactions, alone {len(made)}")
        if final[b] != kept:
            report.mismatches.append(f"row {b}: holds something else at the end")
    return report


@torch.no_grad()
def as_served(
    model: PreTrainedModel, policy: Policy, prompt: Sequence[int], made: Sequence[int], kept: Sequence[Sequence[Any]]
) -> AloneReport:
    """Write greedily under a policy and compare with what an engine has made of the same prompt.

    Args:
        model: a decoder in fp32.
        policy: what both run.
        prompt: token ids.
        made: tokens that the engine wrote.
        kept: positions `[L][H][n]` that it held after each compaction.
    """
    report = AloneReport()
    told = [_Noted(None, [[torch.tensor(head) for head in layer] for layer in each]) for each in kept]
    watched = _watched(policy, report, [told])
    with PolicyCache(watched, model) as cache:
        _tell_rows(cache, watched)
        _, report.tokens = _run(model, cache, torch.tensor([list(prompt)]), None, len(made), None)
        report.resident = cache.stats().peak_resident
    if len(watched.made.get(0, [])) != len(told):
        report.mismatches.append(f"{len(watched.made.get(0, []))} compactions, the engine's are {len(told)}")
    if report.tokens[0] != list(made):
        first = next(i for i, (a, b) in enumerate(zip(report.tokens[0], made, strict=True)) if a != b)
        report.mismatches.append(f"token {first} is {report.tokens[0][first]}, the engine's is {made[first]}")
    return report


def _run(
    model: PreTrainedModel,
    cache: PolicyCache,
    ids: Tensor,
    mask: Tensor | None,
    steps: int,
    choose: Callable[[Tensor, int], int] | None,
    forced: list[list[int]] | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """Prefill and decode; return logits `[B, steps + 1, V]` and the tokens of each row."""
    cache.prefill_chunks(ids, mask)
    seen = cache.get_seq_length()
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids[:, seen:], attention_mask=mask, position_ids=positions[:, seen:], past_key_values=cache)
    history, tokens = [output.logits[:, -1].float()], [[] for _ in ids]  # type: list[Tensor], list[list[int]]
    for step in range(steps):
        for b, row in enumerate(tokens):
            if forced is not None:
                row.append(forced[b][step])
            else:
                row.append(int(history[-1][b].argmax()) if choose is None else choose(history[-1][b], step))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        new = torch.tensor([[row[-1]] for row in tokens], device=ids.device)
        places = mask.sum(1, keepdim=True) - 1
        output = model(new, attention_mask=mask, position_ids=places, past_key_values=cache)
        history.append(output.logits[:, -1].float())
    return torch.stack(history, 1), tokens


def _kept(cache: PolicyCache) -> list[list[list[int]]]:
    """Positions by row, then by layer and head."""
    engine = cache.engine
    heads = [(layer, h) for layer in engine.layers for h in range(engine.stores[layer].layout.heads)]
    return [[cache.kept(layer, h, b) for layer, h in heads] for b in range(len(engine.rows))]
