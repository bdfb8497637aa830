"""The tokens of one step of several rows, one after the other: where each stands and where it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.cache.store.protocol import RowId


@dataclass(frozen=True)
class Packed:
    """`T` tokens of `R` rows, row after row, as a paged engine computes them in one step.

    Attributes:
        rows: names of the rows, in the order of their tokens.
        starts: `R + 1` numbers; the tokens of row `r` are `starts[r] ... starts[r + 1] - 1`.
        before: tokens that each row had seen, which is the position of its first token here.
        row: int64 `[T]`, index into `rows`.
        positions: int32 `[T]`.
        block, offset: int64 `[T]`, the place of each token.
    """

    rows: tuple[RowId, ...]
    starts: tuple[int, ...]
    before: tuple[int, ...]
    row: Tensor
    positions: Tensor
    block: Tensor
    offset: Tensor

    @property
    def tokens(self) -> int:
        """`T`, tokens of all rows together."""
        return self.starts[-1]

    def counts(self) -> list[int]:
        """Return the tokens of each row."""
        return [end - start for start, end in zip(self.starts, self.starts[1:], strict=False)]

    @staticmethod
    def plan(
        rows: Sequence[RowId],
        counts: Sequence[int],
        before: Sequence[int],
        slots: Sequence[int],
        blocks: Sequence[Sequence[int]],
        block: int,
        device: torch.device,
    ) -> Packed:
        """Lay out the next tokens of some rows, with one small copy to the device.

        Args:
            rows: their names.
            counts: new tokens of each, at least 1.
            before: tokens that each has seen.
            slots: slot of each row's first new token.
            blocks: the blocks that the new tokens fall into, the one of the first token first.
            block: slots per block.
            device: where the pages are.
        """
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        width = max(len(each) for each in blocks)
        table = torch.tensor(
            [
                [count, start, seen, slot, *each, *[0] * (width - len(each))]
                for count, start, seen, slot, each in zip(counts, starts[:-1], before, slots, blocks, strict=True)
            ],
            dtype=torch.int64,
            device=device,
        )
        many, start, seen, slot = table[:, :4].unbind(1)
        row = torch.repeat_interleave(torch.arange(len(rows), device=device), many, output_size=starts[-1])
        behind = torch.arange(starts[-1], device=device) - start[row]
        at = behind + slot[row]
        column = at // block - slot[row] // block
        return Packed(
            tuple(rows),
            tuple(starts),
            tuple(before),
            row,
            (behind + seen[row]).to(torch.int32),
            table[row, 4 + column],
            at % block,
        )
