"""Runs a subject of any kind on a case, and compares what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpolicy.contracts.components import AllocationRequest, Slots
from kvpolicy.testing.cases import Case, keep_indices
from kvpolicy.testing.laws._base import LawBrokenError, broken, decided
from kvpolicy.testing.laws._draws import kind_of_subject
from kvpolicy.types import KeepIndices

Outcome = list[Tensor]
"""`[B, H, N, ...]` per layer (and per replaced tensor of a post-operation), or `[B, H]` counts of an allocator."""

_RELATIVE, _ABSOLUTE = 1e-4, 1e-5


def outcome(subject: Any, case: Case) -> Outcome:  # noqa: PLR0911  # one for each kind
    """Return what the subject makes of a case; kept sets as bool masks."""
    kind = kind_of_subject(subject)
    first = case.layers[0]
    if kind in ("importance", "redundancy"):
        return [subject.score(first.view)]
    if kind == "mixer":
        return [subject.mix(first.aligned["importance"], first.aligned["redundancy"], first.view)]
    if kind == "protection":
        return [subject.mask(first.view)]
    if kind == "selector":
        return [as_mask(selected(subject, case), first.view.valid)]
    if kind == "post":
        changes = replaced(subject, case)
        kept = first.aligned["kept"]
        return [t.masked_fill(~kept.reshape(*kept.shape, *[1] * (t.dim() - 3)), 0) for t in changes.values()]
    if kind == "allocator":
        return list(subject.allocate(allocation_request(case)))
    return [
        as_mask(kept, view.valid)
        for kept, view in zip(subject.select(case.views, list(case.budget)), case.views, strict=True)
    ]


def selected(selector: Any, case: Case) -> KeepIndices:
    """Call a selector."""
    layer = case.layers[0]
    scores, protected = layer.aligned["scores"], layer.aligned["protected"]
    kept = selector.select(scores, case.counts, protected, layer.view.valid, Slots.of(layer.view))
    if not isinstance(kept, KeepIndices):
        raise broken(f"returned {type(kept).__name__} instead of KeepIndices.")
    return kept


def replaced(post: Any, case: Case) -> dict[str, Tensor]:
    """Call a post-operation; what it replaces, in order of name."""
    layer = case.layers[0]
    changes = post.apply(layer.view, keep_indices(layer.aligned["kept"]))
    return {name: changes[name] for name in sorted(changes)}


def allocation_request(case: Case) -> AllocationRequest:
    """Return what an allocator decides on."""
    layers = case.layers
    return AllocationRequest(
        budget=torch.tensor(case.budget, dtype=torch.int64),
        valid=[layer.view.valid.sum(-1) for layer in layers],
        protected=[layer.aligned["protected"].sum(-1) for layer in layers],
        scores=[layer.aligned["scores"] for layer in layers],
        masks=[layer.view.valid for layer in layers],
        layers=[layer.view.layer_idx for layer in layers],
        num_layers=layers[0].view.num_layers,
        protected_masks=[layer.aligned["protected"] for layer in layers],
    )


def as_mask(kept: KeepIndices, valid: Tensor) -> Tensor:
    """Mark the kept slots; raises LawBrokenError when they are not slots."""
    mask = torch.zeros_like(valid)
    slots = valid.shape[-1]
    for b in range(valid.shape[0]):
        for h in range(valid.shape[1]):
            chosen = kept.indices[b, h, : int(kept.lengths[b, h])]
            if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < slots:
                raise broken(f"row {b}, head {h}: kept slots {chosen.tolist()} reach beyond the {slots} slots.")
            mask[b, h, chosen] = True
    return mask


def expect_same(
    subject: Any, case: Case, expected: Outcome, got: Outcome, where: list[Tensor], what: str, *, exact: bool = False
) -> None:
    """Compare two outcomes at the slots `where`, up to rounding.

    Args:
        subject, case: what `expected` came from; when rounding decides there, the example says nothing.
        expected, got: outcomes in the same arrangement.
        where: bool `[B, H, N]` per layer.
        what: beginning of the message.
        exact: compare bit by bit.

    Raises:
        LawBrokenError: they differ.
        UndecidedError: they differ, and the subject's answer to `case` changes with the last bits of its input.
    """
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        mask = None if a.dim() == 2 else where[min(i, len(where) - 1)]
        difference = _difference(a, b, mask, exact=exact)
        if difference is None:
            continue
        rounded = not exact and rounding_decides(subject, case, at_least=_largest(a, b, mask) / 4)
        decided(not rounded, "rounding decides")
        raise broken(f"{what} {difference}")


def _difference(a: Tensor, b: Tensor, mask: Tensor | None, *, exact: bool) -> str | None:
    """Say where two tensors differ, or return None."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"it is {b.dtype} {list(b.shape)} instead of {a.dtype} {list(a.shape)}."
    if a.dtype.is_floating_point and not exact:
        scale = float(torch.nan_to_num(a.abs()[mask] if mask is not None else a.abs(), 0.0).amax()) if a.numel() else 0
        differs = ~torch.isclose(b, a, rtol=_RELATIVE, atol=_ABSOLUTE * min(scale, 1.0) + 1e-9, equal_nan=True)
    else:
        differs = (a != b) & ~(a.isnan() & b.isnan())
    if mask is not None:
        differs = differs & mask.reshape(*mask.shape, *[1] * (a.dim() - 3))
    if not bool(differs.any()):
        return None
    place = differs.nonzero()[0].tolist()
    names = ("row", "head", "slot", "dimension")
    at = ", ".join(f"{name} {i}" for name, i in zip(names, place, strict=False))
    return f"{at}: {b[tuple(place)].item()!r} instead of {a[tuple(place)].item()!r}."


def _largest(a: Tensor, b: Tensor, mask: Tensor | None) -> float:
    """Return the largest difference of two tensors of numbers, 1 for masks and for NaN."""
    if not a.dtype.is_floating_point or a.shape != b.shape or a.dtype != b.dtype:
        return 1.0
    gap = torch.nan_to_num((a - b).abs().double(), nan=1.0, posinf=1.0)
    if mask is not None:
        gap = gap.masked_fill(~mask.reshape(*mask.shape, *[1] * (a.dim() - 3)), 0.0)
    return float(gap.max()) if gap.numel() else 0.0


def rounding_decides(subject: Any, case: Case, at_least: float = 0.0) -> bool:
    """Whether the subject's answer changes by `at_least` so much when its input changes by a few units of rounding."""

    def answer(number: int) -> Outcome | None:
        try:
            return outcome(subject, case.jittered(number) if number else case)
        except LawBrokenError:
            return None

    base = answer(0)
    for number in range(1, 9):
        other = answer(number)
        if base is None or other is None:
            continue
        for a, b, mask in zip(base, other, [*case.valid] * len(base), strict=False):
            where = None if a.dim() == 2 else mask
            if _difference(a, b, where, exact=False) is not None and _largest(a, b, where) >= at_least:
                return True
    return False


def expect_equivariant(
    subject: Any, case: Case, change: Callable[[Case], Case], moved: Callable[[Tensor], Tensor], what: str
) -> None:
    """Check that changing the case moves the outcome: ``outcome(change(case)) == moved(outcome(case))``."""
    expected = [moved(t) for t in outcome(subject, case)]
    changed = change(case)
    expect_same(subject, case, expected, outcome(subject, changed), changed.valid, what)
