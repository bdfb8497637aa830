"""Laws about kept sets, of selectors and of whole policies."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import BudgetError
from kvpolicy.testing.cases import Case
from kvpolicy.testing.laws._base import broken, decided, law
from kvpolicy.testing.laws._draws import kind_of_subject, least_budget, one_case
from kvpolicy.testing.laws._outcome import expect_same, outcome, selected
from kvpolicy.types import KeepIndices

_BOTH = ("selector", "policy")
_NO_CHOICE = "nothing is evicted, or nothing kept"


def _kept(subject: Any, case: Case) -> list[KeepIndices]:
    if kind_of_subject(subject) == "selector":
        return [selected(subject, case)]
    return list(subject.select(case.views, list(case.budget)))


def _protected(subject: Any, case: Case) -> list[Tensor]:
    if kind_of_subject(subject) == "selector":
        return [case.layers[0].aligned["protected"]]
    # Not from `Policy.masks`, which is part of what is checked.
    found = []
    for view in case.views:
        stay, go = torch.zeros_like(view.valid), ~view.valid
        for protection in subject.protections:
            mask = protection.mask(view)
            stay, go = (stay | mask, go) if protection.effect == "keep" else (stay, go | mask)
        found.append(stay & ~go)
    return found


def _expected_counts(subject: Any, case: Case) -> list[Tensor]:
    """Return the counts that a selector was given, or that equal shares come to."""
    if case.counts is not None:
        return [case.counts]
    allowed = [subject.masks(view)[1] for view in case.views]
    budget = torch.tensor(case.budget)[:, None]
    return [torch.minimum(budget, a.sum(-1)) for a in allowed]


def _exact(subject: Any) -> bool:
    return bool(subject.exact if kind_of_subject(subject) == "selector" else subject.selector.exact)


def _upper_limits(subject: Any) -> str | None:
    return None if _exact(subject) else "its counts are upper limits"


def _unequal(subject: Any) -> str | None:
    if kind_of_subject(subject) == "policy" and subject.allocator.counts != "equal":
        return "its allocator gives heads or layers different shares"
    return None


@law(
    "A budget is a promise about memory, and one entry too few in every head is a different experiment.",
    _BOTH,
    one_case,
)
def exact_count(subject: Any, case: Case) -> None:
    """Exactly as many entries are kept as were asked for; all, when there are fewer.

    A policy whose allocator shares unequally is held to the total over heads and layers. A selector that declares
    ``exact = False`` keeps at most as many, and at least what is protected.
    """
    kept = _kept(subject, case)
    counts = _expected_counts(subject, case)
    if _unequal(subject):
        allowed = [subject.masks(view)[1].sum((1, 2)) for view in case.views]
        heads = sum(view.shape[1] for view in case.views)
        for b, budget in enumerate(case.budget):
            want = min(budget * heads, sum(int(a[b]) for a in allowed))
            got = sum(int(k.lengths[b].sum()) for k in kept)
            if got > want or (got < want and _exact(subject)):
                raise broken(f"row {b}: {got} entries are kept in all heads and layers instead of {want}.")
        return
    for i, (k, wanted, held) in enumerate(zip(kept, counts, _protected(subject, case), strict=True)):
        lengths = k.lengths.to(torch.int64)
        least = wanted if _exact(subject) else held.sum(-1)
        if bool((lengths > wanted).any()) or bool((lengths < least).any()):
            limits = wanted.tolist() if _exact(subject) else f"{least.tolist()} to {wanted.tolist()}"
            raise broken(f"layer {i}: lengths are {lengths.tolist()} instead of {limits}.")
        if k.indices.shape[-1] < int(lengths.max()):
            raise broken(f"layer {i}: {k.indices.shape[-1]} columns cannot hold {int(lengths.max())} entries.")


@law("Order of slots is order of time: windows, ties and cropping all read it off the slots.", _BOTH, one_case)
def indices_increase(subject: Any, case: Case) -> None:
    """Kept slots are int64, in range and strictly increasing; columns behind the count repeat the last one."""
    for i, kept in enumerate(_kept(subject, case)):
        slots = case.views[i].shape[-1]
        if kept.indices.dtype != torch.int64 or kept.indices.dim() != 3 or kept.indices.shape[:2] != kept.lengths.shape:
            raise broken(
                f"indices are {kept.indices.dtype} {list(kept.indices.shape)} instead of torch.int64 [B, H, K]."
            )
        for b in range(kept.indices.shape[0]):
            for h in range(kept.indices.shape[1]):
                row, count = kept.indices[b, h].tolist(), int(kept.lengths[b, h])
                chosen, rest = row[:count], row[count:]
                if any(not 0 <= s < slots for s in row):
                    raise broken(f"row {b}, head {h}: {row} reaches beyond the {slots} slots.")
                if any(x >= y for x, y in pairwise(chosen)):
                    raise broken(f"row {b}, head {h}: {chosen} does not increase strictly.")
                if chosen and any(s != chosen[-1] for s in rest):
                    raise broken(
                        f"row {b}, head {h}: padding columns {rest} do not repeat the last kept slot {chosen[-1]}."
                    )


@law("A method that evicts its sinks, or keeps padding, is another method than its file says.", _BOTH, one_case)
def protected_stay_pads_go(subject: Any, case: Case) -> None:
    """Every protected slot is kept, and no slot that is not valid ever is."""
    masks = outcome(subject, case)
    held = _protected(subject, case)
    decided(any(bool(p.any() or not v.all()) for p, v in zip(held, case.valid, strict=True)), "no pads, no protection")
    for i, (mask, protected, valid) in enumerate(zip(masks, held, case.valid, strict=True)):
        for name, wrong in (("protected and evicted", protected & ~mask), ("not valid and kept", mask & ~valid)):
            if bool(wrong.any()):
                b, h, n = wrong.nonzero()[0].tolist()
                raise broken(f"layer {i}, row {b}, head {h}: slot {n} is {name}.")


def _not_by_head(subject: Any) -> str | None:
    if kind_of_subject(subject) == "policy" and subject.selector.scope != "head":
        return "its heads share one decision about reduced scores"
    return None


@law("Scores are there to be followed.", _BOTH, one_case, unless=_not_by_head)
def highest_scores_stay(subject: Any, case: Case) -> None:
    """No evicted entry scores higher than a kept one, protected entries aside."""
    choices = _choices(subject, case)
    decided(any(kept and evicted for kept, evicted, _ in choices), _NO_CHOICE)
    for kept, evicted, where in choices:
        if kept and evicted and max(s for s, _ in evicted) > min(s for s, _ in kept):
            raise broken(f"{where}: an entry with score {max(evicted)[0]} is evicted, one with {min(kept)[0]} kept.")


@law(
    "Quantised scores tie often; a choice among equals that is left to the backend differs between machines.",
    _BOTH,
    one_case,
    unless=_not_by_head,
)
def ties_to_the_oldest(subject: Any, case: Case) -> None:
    """Of entries with equal scores those in the lowest slots stay, protected entries aside."""
    choices = _choices(subject, case)
    decided(any(kept and evicted for kept, evicted, _ in choices), _NO_CHOICE)
    for kept, evicted, where in choices:
        for score, slot in evicted:
            later = [n for s, n in kept if s == score and n > slot]
            if later:
                raise broken(f"{where}: slots {slot} and {later[0]} score {score}; the later one stays.")


def _choices(subject: Any, case: Case) -> list[tuple[list[tuple[float, int]], list[tuple[float, int]], str]]:
    """Return by row and head the (score, slot) pairs that are kept and that are evicted, without protected ones."""
    found = []
    if kind_of_subject(subject) == "selector":
        scores = [case.layers[0].aligned["scores"]]
    else:
        scores = [subject.retention(view) for view in case.views]
    masks = outcome(subject, case)
    for i, (score, mask, protected) in enumerate(zip(scores, masks, _protected(subject, case), strict=True)):
        for b in range(case.rows):
            for h in range(case.heads):
                free = (case.valid[i][b, h] & ~protected[b, h]).nonzero()[:, 0].tolist()
                pairs = [(float(score[b, h, n]), n) for n in free]
                kept = [p for p in pairs if mask[b, h, p[1]]]
                found.append((kept, [p for p in pairs if not mask[b, h, p[1]]], f"layer {i}, row {b}, head {h}"))
    return found


@law(
    "Choosing is comparing: a selector that reacts to the level of scores hides a threshold or a sentinel.",
    ("selector",),
    one_case,
)
def constant_ignored(subject: Any, case: Case) -> None:
    """Adding 1, 4096 or -4096 to all scores changes nothing; scores lie on a grid of eighths, so sums are exact."""
    layer = case.layers[0]
    expected = outcome(subject, case)
    for constant in (1.0, 4096.0, -4096.0):
        raised = replace(layer, aligned={**layer.aligned, "scores": layer.aligned["scores"] + constant})
        got = outcome(subject, replace(case, layers=(raised,)))
        what = f"with {constant} added to all scores,"
        expect_same(subject, case, expected, got, case.valid, what, exact=True)


@law(
    "A cache that fits must not be touched; the released R-KV code permutes it.",
    _BOTH,
    one_case,
    unless=_upper_limits,
)
def enough_is_identity(subject: Any, case: Case) -> None:
    """With a budget of at least the resident entries every valid entry stays."""
    if case.counts is not None:
        enough = replace(case, counts=case.view.valid.sum(-1))
        allowed = case.valid
    else:
        enough = replace(case, budget=tuple(case.view.shape[2] for _ in case.budget))
        allowed = [subject.masks(view)[1] for view in case.views]
        if subject.selector.scope != "head":
            allowed = [a.all(1, keepdim=True).expand_as(a) for a in allowed]
    what = "with a budget for all,"
    expect_same(subject, enough, allowed, outcome(subject, enough), case.valid, what, exact=True)


@law(
    "A budget is a cut through one ranking; otherwise a sweep over budgets compares different methods.",
    _BOTH,
    one_case,
    unless=_unequal,
)
def more_keeps_a_superset(subject: Any, case: Case) -> None:
    """With a larger budget everything that was kept still is, for equal shares and one decision from the same view."""
    few = outcome(subject, case)
    decided(any(bool((v & ~m).any()) for v, m in zip(case.valid, few, strict=True)), _NO_CHOICE)
    for more in (1, 2, 3):
        if case.counts is not None:
            larger = replace(case, counts=torch.minimum(case.counts + more, case.view.valid.sum(-1)))
        else:
            larger = replace(case, budget=tuple(n + more for n in case.budget))
        many = outcome(subject, larger)
        for i, (before, after) in enumerate(zip(few, many, strict=True)):
            lost = before & ~after
            if bool(lost.any()):
                b, h, n = lost.nonzero()[0].tolist()
                raise broken(f"layer {i}, row {b}, head {h}: slot {n} is kept, and evicted with {more} more entries.")


def _one_set_per_head(subject: Any) -> str | None:
    return "its scope is `head`" if subject.selector.scope == "head" else None


@law(
    "Paged engines have one block table per layer, or one for all; two sets cannot both be freed.",
    ("policy",),
    one_case,
    unless=_one_set_per_head,
)
def shared_scope_shares(subject: Any, case: Case) -> None:
    """With scope `layer` all heads of a layer keep the same slots, with scope `model` all layers too."""
    masks = outcome(subject, case)
    for i, mask in enumerate(masks):
        reference = masks[0] if subject.selector.scope == "model" else mask
        if not torch.equal(mask, reference[:, :1].expand_as(mask)):
            raise broken(f"layer {i}: its heads keep different slots under scope {subject.selector.scope!r}.")


def _protects_one(policy: Any) -> str | None:
    return None if policy.reserved(2) > 1 else "it protects one entry at most, and every budget holds one"


@law(
    "Evicting what was promised to stay, without a word, is worse than stopping.",
    ("policy",),
    one_case,
    unless=_protects_one,
    effort=0.5,
)
def too_small_is_refused(subject: Any, case: Case) -> None:
    """A budget below what is protected raises BudgetError, and the message says both numbers."""
    least = least_budget(subject, case.views)
    most = max(least)
    decided(most > 1, "fewer than two entries are protected")
    case = case.with_rows([least.index(most)])
    try:
        subject.select(case.views, [most - 1])
    except BudgetError as error:
        if str(most) not in str(error) or str(most - 1) not in str(error):
            raise broken(f"the message does not say {most - 1} and {most}: {error}") from None
        return
    raise broken(f"a budget of {most - 1} was accepted with {most} protected entries.")
