"""Looks at the content of what components return, with one read from each device per compaction.

What is wrong is noted on the device while a decision is made, and read together with the numbers of kept entries at its
end. Until then what follows works with counts that are brought into their bounds, so that a wrong one cannot stop a
device. Only when something is wrong does the host look closer, to say what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvpolicy.contracts.component import named
from kvpolicy.contracts.components import BudgetAllocator, Selector
from kvpolicy.errors import BudgetError, ComponentError, KVPolicyError, ScoreError
from kvpolicy.types import Counts, KeepIndices, Mask, Scores

Why = Callable[[], KVPolicyError]
"""Looks closer, on the host, and returns the error to raise."""


class Findings:
    """What is not known before the devices are asked: whether something is wrong, and some numbers."""

    def __init__(self) -> None:
        self._wrong: list[tuple[Tensor, Why]] = []
        self._numbers: list[Tensor] = []

    def wrong(self, flag: Tensor, why: Why) -> None:
        """Note a bool scalar; if it turns out to be true, `read` raises what `why` returns, the first noted first."""
        self._wrong.append((flag, why))

    def number(self, numbers: Tensor) -> None:
        """Note an int64 tensor, for `read` to return."""
        self._numbers.append(numbers)

    def read(self) -> list[Tensor]:
        """Return the noted numbers on the CPU; raises the first error. Reads each device once."""
        noted = [flag for flag, _ in self._wrong] + self._numbers
        found: list[Tensor] = [torch.empty(0)] * len(noted)
        for device in dict.fromkeys(t.device for t in noted):
            here = [i for i, t in enumerate(noted) if t.device == device]
            flat = torch.cat([noted[i].reshape(-1).to(torch.int64) for i in here]).to("cpu")
            parts = flat.split([noted[i].numel() for i in here])
            for i, part in zip(here, parts, strict=True):
                found[i] = part.view(noted[i].shape)
        flags = found[: len(self._wrong)]
        if flags and bool(torch.stack(flags).any()):
            for flag, (_, why) in zip(flags, self._wrong, strict=True):
                if flag:
                    raise why()
        return found[len(self._wrong) :]


def of_scores(
    findings: Findings, scores: Scores, allowed: Mask, layers: Sequence[int], who: Callable[[int], str], name: str
) -> None:
    """Refuse NaN and infinity where a slot may stay.

    Args:
        findings: where it is noted.
        scores: fp32 `[l * B, H, N]`, what the selection ranks.
        allowed: bool `[l * B, H, N]`.
        layers: indices of the `l` layers.
        who: says for the place of a layer in `layers` what to look at.
        name: of the policy.
    """
    clean = torch.where(allowed, scores, 0.0).isfinite()

    def why() -> KVPolicyError:
        place = _first(~clean)[0] * len(layers) // clean.shape[0]
        return ScoreError(
            f"policy {name!r}: the retention scores of layer {layers[place]} are not finite; "
            f"look for NaN or infinity in that layer's keys and values, or in {who(place)}."
        )

    findings.wrong(~clean.all(), why)


def of_protections(
    findings: Findings, protected: Counts, rows: Tensor, budget: Sequence[int], name: str, scope: str = "head"
) -> None:
    """Refuse budgets that hold less than is protected; int64 `[l * B, H]` and `[l * B, 1]`.

    Heads that share a kept set (`scope` is not ``head``) hold what any of them protects, more than one does.
    """
    together = {"head": "", "layer": " in all heads together", "model": " in all heads and layers together"}[scope]

    def why() -> KVPolicyError:
        return BudgetError(
            f"budget: {min(budget)} entries per head are fewer than the {int(protected.max())} that policy {name!r} "
            f"protects{together}; raise the budget or protect less (a pinned prompt counts inside the budget)."
        )

    findings.wrong((protected > rows).any(), why)


def of_counts(
    findings: Findings,
    counts: Counts,
    protected: Counts,
    valid: Counts,
    rows: Tensor,
    layers: Sequence[int],
    allocator: BudgetAllocator,
) -> Counts:
    """Refuse counts that cannot be met; return them within their bounds, int64 `[l * B, H]` like all of them."""
    equal = allocator.counts == "equal"
    wanted = torch.minimum(rows, valid) if equal else counts.clamp(protected, valid)
    differs = counts != wanted

    def why() -> KVPolicyError:
        row, head = _first(differs)
        place, rows_each = row * len(layers) // counts.shape[0], counts.shape[0] // len(layers)
        got, most, least = (int(t[row, head]) for t in (counts, valid, protected))
        if equal and least <= got <= most:
            what = f"the same for every head is {int(wanted[row, head])}"
        else:
            what = f"of {most} that may stay {least} are protected"
        return ComponentError(
            f"{named(allocator)} in layer {layers[place]}: gives row {row % rows_each}, head {head} {got} entries, "
            f"where {what}; return counts between the two that add up to the budget."
        )

    findings.wrong(differs.any(), why)
    return torch.maximum(torch.minimum(wanted, valid), protected)


def of_totals(
    findings: Findings, counts: Sequence[Counts], valid: Sequence[Counts], budget: Tensor, allocator: BudgetAllocator
) -> None:
    """Refuse an allocation that is not the budget; `[B, H]` per layer, and `budget` int64 `[B]`."""
    home = budget.device
    given, there = (torch.stack([t.sum(-1).to(home) for t in per_layer]).sum(0) for per_layer in (counts, valid))
    wanted = torch.minimum(budget * sum(t.shape[-1] for t in counts), there)

    def why() -> KVPolicyError:
        (row,) = _first(given != wanted)
        return ComponentError(
            f"{named(allocator)}: gives row {row} {int(given[row])} entries in all heads and layers instead of "
            f"{int(wanted[row])}; return counts that add up to the budget, or to all there is when that is less."
        )

    findings.wrong((given != wanted).any(), why)


def of_kept(
    findings: Findings,
    kept: KeepIndices,
    counts: Counts,
    protected: Mask,
    allowed: Mask,
    layers: Sequence[int],
    selector: Selector,
) -> None:
    """Refuse slots that do not increase strictly, do not exist, may not stay, are too many or too few, or miss some.

    All tensors are `[l * B, H, ...]`; `counts` are those that the selector was given.
    """
    indices, lengths = kept
    columns, slots = indices.shape[-1], allowed.shape[-1]
    live = torch.arange(columns, device=indices.device) < lengths.unsqueeze(-1)
    # 0 may not stay, 1 may, 2 must.
    marks = allowed.to(torch.int8) + protected
    found = marks.gather(-1, indices.clamp(0, max(slots - 1, 0))) if slots else marks
    step = indices.diff(dim=-1)
    least = protected.sum(-1)
    many = lengths != counts if selector.exact else (lengths > counts) | (lengths < least)
    faults = (
        ("keeps another number of entries than it was given", many | (lengths > columns) | (lengths < 0)),
        ("returns slots that do not exist", (indices < 0) | (indices >= slots)),
        (
            "returns slots that do not increase strictly, or columns behind them that do not repeat the last one",
            torch.where(live[..., 1:], step <= 0, step != 0),
        ),
        ("keeps slots that may not stay", live & (found == 0)),
        ("does not keep all protected slots", ((live & (found == 2)).sum(-1) != least)),
    )

    def why() -> KVPolicyError:
        what, where = next((what, where) for what, where in faults if bool(where.any()))
        row, head, *_ = _first(where)
        place, rows_each = row * len(layers) // lengths.shape[0], lengths.shape[0] // len(layers)
        got = indices[row, head, : max(0, int(lengths[row, head]))].tolist()
        shown = f"{str(got[:12])[:-1]}{', ...' if len(got) > 12 else ''}]"
        return ComponentError(
            f"{named(selector)} in layer {layers[place]}: {what} in row {row % rows_each}, head {head} ({shown}, "
            f"{int(counts[row, head])} of {slots} asked for); return ascending slots as `ops.top_k` does."
        )

    findings.wrong(torch.stack([where.any() for _, where in faults]).any(), why)


def _first(where: Tensor) -> list[int]:
    """Return the indices of the first true element."""
    return [int(n) for n in where.nonzero()[0].tolist()]
