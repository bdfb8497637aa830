"""Where the tokens of one forward pass go, and what each of them may attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from kvpolicy.cache.ledger import Kind, RowCounts
from kvpolicy.cache.store.arena import WritePlan
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.policy.policy import Policy

NOT_ATTACHED: Final = (
    "this cache is not attached to the model that uses it, or the attention mask is a finished 4-D one; call the model "
    "that the cache was made for, inside the cache's `with` block, with a 2-D mask."
)
"""What is said of keys that come without a forward pass having been announced."""


@dataclass
class Forward:
    """One forward pass.

    Attributes:
        plan: where the tokens are written.
        columns: tokens per row, padding included.
        query_positions: int32 `[B, columns]`, original positions (anything where not valid).
        query_valid: bool `[B, columns]`.
        visible: int64 `[B, columns]`, slots that each token may attend to, from the front; None when all rows are
            alike and the past is empty or one token comes in, so that no mask is needed beyond causality.
        shifted: some row's new keys must be rotated before they are stored.
        pending: layers that have not been updated yet.
        kind: what the tokens are.
        packed: what a runtime has made of these numbers for its attention, by device and tokens.
    """

    plan: WritePlan
    columns: int
    query_positions: Tensor
    query_valid: Tensor
    visible: Tensor | None
    shifted: bool
    pending: set[int] = field(default_factory=set)
    kind: Kind = "prompt"
    packed: dict[tuple[torch.device, int], Any] = field(default_factory=dict)
    _plans: dict[torch.device, WritePlan] = field(default_factory=dict)
    _masks: dict[torch.device, Tensor] = field(default_factory=dict)

    def plan_on(self, device: torch.device) -> WritePlan:
        """Return the write plan with its tensors on `device`."""
        if self.plan.positions.device == device and self.plan.row is None:
            return self.plan
        if device not in self._plans:
            tensors = {
                name: value.to(device)
                for name in ("positions", "rope_positions", "row", "column", "slot")
                if (value := getattr(self.plan, name)) is not None
            }
            self._plans[device] = replace(self.plan, **tensors)
        return self._plans[device]

    def mask_on(self, device: torch.device, *, explicit: bool) -> Tensor | None:
        """Return the attention mask, bool `[B or 1, 1, columns, N]` (True = visible), or None when none is needed.

        Args:
            device: where the attention runs.
            explicit: also return a mask where causality alone would do (for implementations that do not know it).
        """
        if self.visible is None and (self.columns == 1 or not explicit):
            return None
        if device not in self._masks:
            if self.visible is None:
                visible = torch.arange(1, self.columns + 1, device=device)[None]
            else:
                visible = self.visible.to(device)
            slots = torch.arange(self.plan.end, device=device)
            self._masks[device] = (slots < visible[:, :, None])[:, None]
        return self._masks[device]


def check_forward(last: Forward | None, rows: int, batch: int, valid: Tensor | None) -> None:
    """Refuse a forward pass that cannot follow the last one.

    Args:
        last: the last forward pass.
        rows: rows that the cache holds, 0 when it is new.
        batch: rows of the new pass.
        valid: bool `[B, columns]`, or None when no token is padding.

    Raises:
        CacheStateError: the last pass did not finish, or the number of rows changed or does not fit the mask.
    """
    if last is not None and last.pending:
        raise CacheStateError(
            f"the last forward pass stopped before layer {min(last.pending)}, so the cache is incomplete; "
            "call reset() or use a new cache."
        )
    if rows and batch != rows:
        raise CacheStateError(
            f"the cache holds {rows} rows but the forward pass has {batch}; "
            "use one cache per batch, or batch_select_indices() first."
        )
    if valid is not None and valid.shape[0] != batch:
        raise CacheStateError(
            f"attention_mask has {valid.shape[0]} rows but the forward pass has {batch}; give one row for each."
        )


def refuse_unplanned(forward: Forward | None, layer: int) -> NoReturn:
    """Raise UnsupportedError, by its cause, for keys of a layer that no forward pass waits for."""
    if forward is not None and forward.pending:  # other layers of this pass are still to come
        raise UnsupportedError(
            f"layer {layer} brings keys twice in one forward pass, as a decoder does that also attends to an encoder; "
            "leave out what the encoder made, or use a model that is one decoder."
        )
    raise UnsupportedError(NOT_ATTACHED)


def check_chunk(policy: Policy, columns: int) -> None:
    """Raise UnsupportedError if a policy compresses the prompt in chunks, and more than one came at once."""
    chunk = policy.prefill_chunk
    if chunk is not None and columns > chunk and policy.phase != "decode":
        raise UnsupportedError(
            f"policy {policy.name!r} compresses the prompt in chunks of {chunk} tokens, but {columns} came at "
            "once; call cache.prefill(input_ids, attention_mask) before generate(), or leave out prefill_chunk."
        )


@cache
def _true(device: torch.device) -> Tensor:
    return torch.ones(1, 1, dtype=torch.bool, device=device)


def plan_forward(
    rows: Sequence[RowCounts],
    used: Sequence[int],
    columns: int,
    counts: Sequence[int],
    valid: Tensor | None,
    device: torch.device,
) -> Forward:
    """Plan the write of `columns` tokens per row behind what each row holds.

    Args:
        rows: the counters before the pass.
        used: slots of the store in use, per row.
        columns: tokens per row, padding included.
        counts: valid tokens per row.
        valid: bool `[B, columns]` on the CPU, or None when no token is padding.
        device: device of the first layer.
    """
    end = max(b + n for b, n in zip(used, counts, strict=True))
    first, past = rows[0], used[0]
    # Rows that are alike need one write and no mask, which is what a step of a few microseconds hangs on. The shift is
    # compared too: rows that hid tokens or were compacted at other times turn their keys by different angles.
    if valid is None and all(
        n == past and row.seen == first.seen and row.shift == first.shift for n, row in zip(used, rows, strict=True)
    ):
        positions = torch.arange(first.seen, first.seen + columns, dtype=torch.int32, device=device)
        plan = WritePlan(past, columns, end, positions, positions - first.shift if first.shift else positions)
        visible = torch.arange(past + 1, past + columns + 1)[None] if past and columns > 1 else None
        return Forward(
            plan, columns,
            positions[None].expand(len(rows), -1),
            _true(device).expand(len(rows), columns),
            visible, first.shift != 0,
        )  # fmt: skip
    seen = torch.tensor([row.seen for row in rows], dtype=torch.int32)
    shift = torch.tensor([row.shift for row in rows], dtype=torch.int32)
    if valid is None:
        valid = torch.ones(len(rows), columns, dtype=torch.bool)
    rank = valid.to(torch.int64).cumsum(1)
    start = torch.tensor(list(used))[:, None]
    row, column = valid.nonzero(as_tuple=True)
    offset = rank[row, column] - 1
    positions = (seen[row] + offset).to(torch.int32)
    plan = WritePlan(
        None, columns, end, positions, (positions - shift[row]).to(torch.int32), row, column, start[row, 0] + offset
    )
    query_positions = (seen[:, None] + rank - 1).to(torch.int32)
    # A padding token sees the first slot, so that no softmax is empty; nothing of it is stored.
    visible = (start + rank).clamp(min=1)
    return Forward(plan, columns, query_positions.to(device), valid.to(device), visible, bool(shift.any()))
