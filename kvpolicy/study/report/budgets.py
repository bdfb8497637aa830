"""Where the variants of a study stand on its budget axis, if it has one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvpolicy.study.records import CellRecord

PATHS: Final = ("budget", "budget.tokens", "budget.fraction")

_TRACE: Final = re.compile(r"([0-9.e+-]+)% of the trace")
_TITLES: Final = {
    "trace": "budget, % of the full cache's trace",
    "share": "budget, % of the tokens seen",
    "tokens": "budget, entries per head",
}


@dataclass(frozen=True)
class BudgetAxis:
    """The budgets of a study.

    Attributes:
        title: what they are, with the unit.
        texts: each budget as settings write it, the smallest first.
        labels: each for a tick, such as ``10%``.
        positions: each as a number in the unit of `title`; their ranks if they have no unit in common.
        ordered: whether they have one.
    """

    title: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    positions: tuple[float, ...]
    ordered: bool = True


def budget_axis(cells: Sequence[CellRecord]) -> BudgetAxis | None:
    """Return the budgets that the study compares, or None if there are fewer than two."""
    texts = list(dict.fromkeys(text for cell in cells if (text := budget_of(cell)) is not None))
    if len(texts) < 2 or not any(path in cell.settings for cell in cells for path in PATHS):
        return None
    read = {text: _read(text) for text in texts}
    kinds = {kind for kind, _ in read.values()}
    if len(kinds) == 1 and (kind := kinds.pop()) in _TITLES:
        texts.sort(key=lambda text: read[text][1])
        positions = tuple(read[text][1] for text in texts)
        labels = tuple(f"{value:.0f}" if kind == "tokens" else f"{value:g}%" for value in positions)
        return BudgetAxis(_TITLES[kind], tuple(texts), labels, positions)
    return BudgetAxis("budget", tuple(texts), tuple(texts), tuple(map(float, range(len(texts)))), ordered=False)


def budget_of(cell: CellRecord) -> str | None:
    """Return a cell's budget as text: that of its settings, else that of its policy."""
    for path in PATHS:
        if path in cell.settings:
            return cell.settings[path]
    budget = cell.data.get("budget")
    if not isinstance(budget, dict) or len(budget) != 1:
        return None
    return json.dumps(next(iter(budget.values())))


def without_budget(text: str, cell: CellRecord) -> str:
    """Return a variant's name or condition without the words for its budget."""
    for path in PATHS:
        if path in cell.settings:
            text = re.sub(rf"(^|, ){re.escape(f'{path}={cell.settings[path]}')}(?=, |$)", "", text)
    return text.removeprefix(", ")


def _read(text: str) -> tuple[str, float]:
    """Return the kind of a budget and its number, shares in percent."""
    if found := _TRACE.fullmatch(text):
        return "trace", float(found[1])
    try:
        value = json.loads(text)
    except ValueError:
        return text, 0.0
    if isinstance(value, dict) and set(value) == {"fraction"}:
        value = float(value["fraction"])
    if isinstance(value, float):
        return "share", 100 * value
    return ("tokens", float(value)) if isinstance(value, int) else (text, 0.0)
