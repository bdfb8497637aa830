"""Any scorer of NVIDIA's kvpress that looks at keys and values only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import UnsupportedError
from kvpolicy.types import Scores
from kvpolicy_plugins._kvpress import make_press, press_scores

_KEYS, _VALUES = torch.randn(2, 1, 2, 96, 8, generator=torch.Generator().manual_seed(0))


class KVPress(ImportanceScorer):
    """Scores of a `ScorerPress` of kvpress, computed row by row over the valid entries.

    A press that wants more than keys, values and its layer's index (hidden states, attention weights, the model), that
    overrides `compress`, or that draws numbers without a seed is refused when the component is made. Its
    `compression_ratio` follows from the row's budget. Importing kvpress wraps transformers' attention functions; see
    docs/bridges.md. Cost: one read of the entry counts from the device, and a call of the press for each row.
    """

    press: str
    """Name of the class in kvpress, such as `KeyDiffPress`."""
    parameters: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Its parameters, without `compression_ratio`."""

    def __hash__(self) -> int:
        return hash((self.press, json.dumps(self.parameters, sort_keys=True)))

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(press="KnormPress"), cls(press="KeyDiffPress"))

    @model_validator(mode="after")
    def _usable(self) -> Self:
        """Refuse what a view cannot serve, by trying the press on random keys."""
        try:
            first, second = (self._press(_KEYS, _VALUES, 0.5, 0) for _ in range(2))
        except UnsupportedError as error:
            raise ValueError(str(error)) from None
        if not torch.equal(first, second):
            raise ValueError(f"{self.press} draws random numbers; use importance: random")
        return self

    def score(self, view: CacheView) -> Scores:
        counts = view.valid.sum(-1)
        budgets = counts.amax(-1) if view.budget is None else view.budget
        order = (~view.valid).to(torch.uint8).argsort(dim=-1, stable=True)  # valid entries first, by position
        result = torch.zeros(view.shape, dtype=torch.float32, device=view.device)
        for row, (held, budget) in enumerate(zip(counts.tolist(), budgets.tolist(), strict=True)):
            whole = min(held) == max(held)
            if not whole:
                self._check_heads_are_scored_alone()
            for heads in [slice(None)] if whole else [slice(h, h + 1) for h in range(len(held))]:
                count = held[heads][0]
                if count:
                    slots = order[row, heads, :count]
                    keys, values = (
                        t[row, heads].take_along_dim(slots.unsqueeze(-1), 1)[None] for t in (view.keys, view.values)
                    )
                    ratio = min(max(0.0, 1 - budget / count), 1 - 1e-6)
                    result[row, heads].scatter_(-1, slots, self._press(keys, values, ratio, view.layer_idx)[0])
        return result

    def _press(self, keys: Tensor, values: Tensor, ratio: float, layer: int) -> Tensor:
        made = make_press(self.press, self.parameters)
        return press_scores(made, keys.float(), values.float(), ratio, layer)

    def _check_heads_are_scored_alone(self) -> None:
        heads = zip(_KEYS.split(1, dim=1), _VALUES.split(1, dim=1), strict=True)
        alone = [self._press(keys, values, 0.5, 0) for keys, values in heads]
        if not torch.allclose(self._press(_KEYS, _VALUES, 0.5, 0), torch.cat(alone, dim=1)):
            raise UnsupportedError(
                f"importance: {self.press} scores all heads at once, and they hold different numbers of entries; use "
                "`allocator: uniform`."
            )
