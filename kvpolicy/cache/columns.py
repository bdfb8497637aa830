"""Which columns of a batch were padding."""

from __future__ import annotations

import torch
from torch import Tensor


class Columns:
    """The columns that a batch has seen. Nothing is stored while there is no padding among them.

    Attributes:
        total: columns seen, padding included: what transformers calls the length of a cache.
    """

    def __init__(self) -> None:
        self.total = 0
        self._valid: Tensor | None = None

    def add(self, columns: int, valid: Tensor | None, batch: int) -> None:
        """Note a forward pass; `valid` is bool `[B, columns]` on the CPU, or None when no token is padding."""
        if valid is not None:
            self._valid = torch.cat([self.valid(batch), valid.to(torch.bool)], 1)
        self.total += columns

    def valid(self, batch: int) -> Tensor:
        """Return which columns were tokens, bool `[B, total]` on the CPU."""
        known = torch.ones(batch, self.total, dtype=torch.bool)
        if self._valid is not None:
            known[:, : self._valid.shape[1]] = self._valid
        return known

    def by_position(self, marks: Tensor, batch: int) -> Tensor:
        """Turn marks on columns, bool `[B, columns]`, into marks on positions, which do not count padding.

        Returns:
            bool `[B, positions]` on the CPU, False behind a row's end.
        """
        marks, real = marks.to("cpu"), self.valid(batch)[:, : marks.shape[1]]
        marks = marks[:, : real.shape[1]]
        order = (~real).to(torch.int8).argsort(dim=1, stable=True)
        return (marks & real).gather(1, order)

    def replace(self, valid: Tensor) -> None:
        """Set which columns count as tokens from now on, bool `[B, total]`."""
        self._valid = valid.clone()

    def tokens_in_last(self, columns: int, batch: int) -> list[int]:
        """Return how many of the last `columns` columns were tokens, per row."""
        if self._valid is None:
            return [columns] * batch
        padding = (~self._valid[:, self.total - columns :]).sum(1).tolist()
        return [columns - int(n) for n in padding]

    def cut(self, columns: int) -> None:
        """Forget the last `columns` columns."""
        self.total -= columns
        if self._valid is not None:
            self._valid = self._valid[:, : self.total]

    def take(self, index: Tensor) -> None:
        """Reorder, repeat or select rows; `index` int64 `[B']`."""
        if self._valid is not None:
            self._valid = self._valid.index_select(0, index.to("cpu"))

    def clone(self) -> Columns:
        """Return an independent copy; the tensor is shared, for nobody writes into it."""
        twin = Columns()
        twin.total, twin._valid = self.total, self._valid
        return twin
