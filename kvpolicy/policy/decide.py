"""The decision of a policy in stages, each a function of what the one before returned: score, share, allocate, choose.

`Policy.decide` runs them. Whoever wants to see or change what passes between two of them (a recorder, a study, a
runtime that gathers the scores of several ranks) calls or wraps the stages; nothing here keeps anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpolicy.contracts.component import named
from kvpolicy.contracts.components import AllocationRequest, BudgetAllocator, Selector, Slots
from kvpolicy.contracts.ranks import ALONE, Ranks
from kvpolicy.contracts.view import CacheView
from kvpolicy.ops.dispatch import using_backend
from kvpolicy.policy import checks
from kvpolicy.policy import findings as findings_of
from kvpolicy.policy.checks import Untouched
from kvpolicy.policy.decision import Decision, Parts, Ranked, Ranking, Scored, ScoredRun, Scoring, apart
from kvpolicy.policy.findings import Findings
from kvpolicy.policy.fuse import folded
from kvpolicy.policy.gather import gathered, here
from kvpolicy.policy.scoring import once
from kvpolicy.types import Counts, KeepIndices, Mask


def decide(parts: Parts, views: Sequence[CacheView], budget: Sequence[int], ranks: Ranks = ALONE) -> Decision:
    """Decide for all layers at once which slots stay; see `Policy.decide`."""
    findings = Findings()
    scoring = score(parts, views)
    everywhere = gathered(parts, scoring, ranks)
    shared = share(parts.selector, everywhere)
    rows = torch.tensor(list(budget), dtype=torch.int64).to(shared.runs[0].scores.device)  # the one copy to a device
    _look_at_scores(findings, parts, scoring, shared, rows, budget)
    try:
        counts = allocate(parts.allocator, everywhere, shared, rows, findings)
        shared, counts = here(scoring, everywhere, shared, counts)
        kept = choose(parts, scoring, shared, counts, max(budget), findings)
    except Exception:
        findings.read()  # an allocator or selector that stumbles over what came before it is not to blame
        raise
    lengths = findings.read()
    return Decision(scoring.scored, shared, counts, *_trimmed(kept, lengths))


def _trimmed(kept: list[KeepIndices], lengths: list[Tensor]) -> tuple[list[KeepIndices], list[Tensor]]:
    """Leave out columns in which no head keeps anything; the numbers come run by run and leave layer by layer."""
    each = [part for many in lengths for part in many.split(kept[0].lengths.shape[0])]
    result = []
    for one, count in zip(kept, each, strict=True):
        most = int(count.max()) if count.numel() else 0
        wide = one.indices.shape[-1] > most
        result.append(KeepIndices(one.indices[..., :most].contiguous(), one.lengths) if wide else one)
    return result, each


def _look_at_scores(
    findings: Findings, parts: Parts, scoring: Scoring, shared: Ranking, rows: Tensor, budget: Sequence[int]
) -> None:
    for run, ranked in zip(scoring.runs, shared.runs, strict=True):

        def who(place: int, run: ScoredRun = run) -> str:
            """Name the component whose numbers are the first that are not finite."""
            making = [parts.importance, parts.redundancy, parts.mixer]
            for component, made in zip(making, run.scored, strict=True):
                allowed = apart(run.allowed, len(run.layers))[place]
                if not bool(apart(made, len(run.layers))[place][allowed].isfinite().all()):
                    return named(component)
            return f"those of other layers, which {named(parts.selector)} reduces together"

        findings_of.of_scores(findings, ranked.scores, ranked.allowed, run.layers, who, parts.name)
        protected = ranked.protected.sum(-1)
        each = rows.to(protected.device).repeat(len(run.layers))[:, None]
        findings_of.of_protections(findings, protected, each, budget, parts.name, parts.selector.scope)


# -- score ------------------------------------------------------------------------------------------------------------


def score(parts: Parts, views: Sequence[CacheView]) -> Scoring:
    """Score every layer; layers that may be folded (see `kvpolicy.policy.fuse`) are scored together.

    Args:
        parts: the policy.
        views: one view per layer, all of the same rows. Views that a runtime makes on the way (no list) are taken one
            after the other, and never all at once.

    Raises:
        ScoreError: a scorer or the mixer returned a wrong shape or dtype.
    """
    runs: list[ScoredRun] = []
    slots: list[Slots] = []
    num_layers = 0
    for view, number in folded(views) if folds(parts) and isinstance(views, list) else ((v, 1) for v in views):
        alone = [view] if number == 1 else views[len(slots) : len(slots) + number]
        slots += map(Slots.of, alone)
        watch = Untouched.of(view)
        scored, marks = scores(parts, view, watch), masks(parts, view, watch)
        runs.append(ScoredRun(tuple(each.layer_idx for each in slots[-number:]), Slots.of(view), scored, *marks))
        if number > 1 and parts.remembering:
            _hand_down(view, alone)
        num_layers = view.num_layers
    return Scoring(runs, slots, num_layers)


def _hand_down(view: CacheView, layers: Sequence[CacheView]) -> None:
    """Let the layers of a run know the scores that were computed for all of them: `remember` may ask for them."""
    for scorer, made in view.memo:
        for layer, part in zip(layers, apart(made, len(layers)), strict=True):
            layer.memo.append((scorer, part))


def folds(parts: Parts) -> bool:
    """Whether several layers can be scored as one."""
    scoring = [parts.mixer, *parts.protections]
    scoring += [parts.importance] if parts.mixer.uses_importance else []
    scoring += [parts.redundancy] if parts.mixer.uses_redundancy else []
    return all(member.same_for_layers for part in scoring for member in part.members())


def scores(parts: Parts, view: CacheView, watch: Untouched | None = None) -> Scored:
    """Return the retention score of one view and what it is mixed from; `watch` says who writes to the view.

    Raises:
        ScoreError: a shape, dtype or device is wrong.
        ComponentError: a component wrote to the view.
    """
    watch = Untouched.of(view) if watch is None else watch
    mixer = parts.mixer
    importance = redundancy = torch.zeros(view.shape, dtype=torch.float32, device=view.device)
    with using_backend(parts.backend, shared=mixer.uses_importance and mixer.uses_redundancy):
        if mixer.uses_importance:
            importance = once(parts.importance, view)
            watch.by(parts.importance)
        if mixer.uses_redundancy:
            redundancy = once(parts.redundancy, view)
            watch.by(parts.redundancy)
    mine = Untouched(view.layer_idx, iter((("importance", importance), ("redundancy", redundancy))))
    mixed = checks.scores(mixer.mix(importance, redundancy, view), view, mixer)
    watch.by(mixer)
    mine.by(mixer)
    return Scored(importance, redundancy, mixed)


def masks(parts: Parts, view: CacheView, watch: Untouched | None = None) -> tuple[Mask, Mask]:
    """Return (protected, allowed) of one view, bool `[B, H, N]`; what is not valid is never allowed.

    Raises:
        ComponentError: a protection returned something else, or wrote to the view.
    """
    watch = Untouched.of(view) if watch is None else watch
    protected = torch.zeros(view.shape, dtype=torch.bool, device=view.device)
    allowed = view.valid
    for protection in parts.protections:
        mask = checks.mask(protection.mask(view), view, protection)
        watch.by(protection)
        if protection.effect == "keep":
            protected = protected | mask
        else:
            allowed = allowed & ~mask
    return protected & allowed, allowed


# -- share ------------------------------------------------------------------------------------------------------------


def share(selector: Selector, scoring: Scoring) -> Ranking:
    """Reduce what heads (scope `layer`) or heads and layers (scope `model`) decide together; the same for each of them.

    A slot is protected where one of them protects it, and allowed where all of them allow it.
    """
    scope, how = selector.scope, selector.reduce
    numbers = [len(run.layers) for run in scoring.runs]
    alone = [Ranked(run.scored.retention, run.protected, run.allowed) for run in scoring.runs]
    if scope == "head":
        return Ranking(alone, numbers)
    heads = [run.scores.shape[1] for run in alone]
    reduced = [
        Ranked(_reduce(run.scores.masked_fill(~run.allowed, 0.0), 1, how), run.protected.any(1), run.allowed.all(1))
        for run in alone
    ]
    if scope == "model":
        layers = Ranking(reduced, numbers)
        home = reduced[0].scores.device
        one = _reduce(torch.stack([each.to(home) for each in layers.scores]), 0, how)
        kept = torch.stack([each.to(home) for each in layers.protected]).any(0)
        may = torch.stack([each.to(home) for each in layers.allowed]).all(0)
        devices = [run.scores.device for run in reduced]
        reduced = [
            Ranked(*(each.to(device).repeat(number, 1) for each in (one, kept, may)))
            for number, device in zip(numbers, devices, strict=True)
        ]
    wide = [Ranked(*(t.unsqueeze(1).expand(-1, h, -1) for t in run)) for run, h in zip(reduced, heads, strict=True)]
    return Ranking(wide, numbers)


def _reduce(scores: Tensor, dim: int, how: str) -> Tensor:
    if how == "mean":
        return scores.mean(dim)
    return scores.sum(dim) if how == "sum" else scores.amax(dim)


# -- allocate ---------------------------------------------------------------------------------------------------------


def allocate(
    allocator: BudgetAllocator, scoring: Scoring, shared: Ranking, rows: Tensor, findings: Findings
) -> list[Counts]:
    """Return int64 `[B, H]` per layer, the entries that each head keeps.

    Args:
        allocator: who splits.
        scoring, shared: from the stages before.
        rows: int64 `[B]`, the rows' budgets, on the device of the first layer.
        findings: what turns out to be wrong with the counts when it is read; until then they are within their bounds.

    Raises:
        ComponentError: the result has other shapes, dtypes or devices, or something was written to.
    """
    held = [(run.allowed.sum(-1), run.protected.sum(-1)) for run in shared.runs]
    valid, protected = (
        [part for both, n in zip(held, shared.numbers, strict=True) for part in apart(both[i], n)] for i in (0, 1)
    )
    layers = [each.layer_idx for each in scoring.slots]
    request = AllocationRequest(
        budget=rows,
        valid=valid,
        protected=protected,
        scores=shared.scores,
        masks=shared.allowed,
        layers=layers,
        num_layers=scoring.num_layers,
        protected_masks=shared.protected,
        heads=[each.head_span for each in scoring.slots],
    )
    watch = Untouched(layers[0], _of_request(request))
    made = checks.counts(allocator.allocate(request), valid, layers, allocator)
    watch.by(allocator)
    counts: list[Counts] = []
    for run, number, (most, least) in zip(scoring.runs, shared.numbers, held, strict=True):
        some = made[len(counts) : len(counts) + number]
        whole = torch.cat(some) if number > 1 else some[0]
        each = rows.to(most.device).repeat(number)[:, None]
        within = findings_of.of_counts(findings, whole, least, most, each, run.layers, allocator)
        counts += apart(within, number)
    if allocator.counts != "equal":
        findings_of.of_totals(findings, made, valid, rows, allocator)
    return counts


def _of_request(request: AllocationRequest) -> Iterator[tuple[str, Tensor]]:
    yield "request.budget", request.budget
    for name in ("valid", "protected", "scores", "masks", "protected_masks"):
        for i, tensor in enumerate(getattr(request, name)):
            yield f"request.{name}[{i}]", tensor


# -- choose -----------------------------------------------------------------------------------------------------------


def choose(
    parts: Parts, scoring: Scoring, shared: Ranking, counts: list[Counts], most: int, findings: Findings
) -> list[KeepIndices]:
    """Return the slots that stay of each layer, as many as `counts` say.

    Args:
        parts: the policy.
        scoring, shared, counts: from the stages before.
        most: the largest budget of a row.
        findings: what turns out to be wrong with the slots when it is read, and how many they are.

    Raises:
        ComponentError: the result has other shapes, dtypes or devices, or something was written to.
    """
    selector = parts.selector
    alike = parts.counts == "equal" and all(member.same_for_layers for member in selector.members())
    kept: list[KeepIndices] = []
    with using_backend(parts.backend):
        for run, ranked, number in zip(scoring.runs, shared.runs, shared.numbers, strict=True):
            slots = scoring.slots[len(kept) : len(kept) + number]
            some = counts[len(kept) : len(kept) + number]
            if number > 1 and alike:
                asked = [(ranked, torch.cat(some), run.slots, run.layers)]
            else:
                single = (Ranked(*each) for each in zip(*(apart(t, number) for t in ranked), strict=True))
                asked = [(r, c, s, (s.layer_idx,)) for r, c, s in zip(single, some, slots, strict=True)]
            for rank, count, known, layers in asked:
                limit = rank.allowed.shape[-1]
                width = min(most, limit) if parts.allocator.counts == "equal" else limit
                layer = scoring.slots[0].layer_idx if selector.scope == "model" else known.layer_idx
                one = _select(selector, rank, count, replace(known, layer_idx=layer, width=width), layers[0])
                findings_of.of_kept(findings, one, count, rank.protected, rank.allowed, layers, selector)
                findings.number(one.lengths)
                kept += map(KeepIndices, *(apart(each, len(layers)) for each in one))
    return kept


def _select(selector: Selector, ranked: Ranked, counts: Counts, slots: Slots, layer: int) -> KeepIndices:
    names = ("scores", "protected", "valid", "counts", "slots.positions")
    watch = Untouched(layer, zip(names, (*ranked, counts, slots.positions), strict=True))
    made = selector.select(ranked.scores, counts, ranked.protected, ranked.allowed, slots)
    watch.by(selector)
    return checks.kept(made, ranked.allowed, layer, selector)
