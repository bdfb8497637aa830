"""The page docs/models.md: what the sweep found for every model type, written and read back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import transformers

from kvsupport.shrinking import CAUSAL, IMAGE_TEXT
from kvsupport.sweep import POLICIES, SweepOutcome

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"

_ROW = re.compile(r"^\| `([^`]+)` \| (\S*) \| ([^|]*) \| (.*) \|$", re.MULTILINE)
_NOT_WITH = re.compile(r"^not with (.+?): (.*)$")

_HEAD = """# Model classes

What becomes of every model type that `AutoModelForCausalLM` of transformers {version} knows, and of the language models
behind `AutoModelForImageTextToText`, fed with text. Each class that can be built without files is built tiny, with
random weights, and tried with policies of every mechanism; *all* are
{policies}.
This page is written by `make models`; `tests/runtimes/hf/test_model_classes.py` holds it against what happens.

**served** means: below the budget the logits are those of the plain model; after evictions they are those of a run that
forgets nothing, under a mask of what `kept()` said at each step, for every layer and head; the rows of a left-padded
batch are the rows alone, wherever that holds for the model itself. A dense policy and a ragged one go through all
three, the others through the second.

**refused** means: `PolicyCache` raises an error that says so. No class is accepted and refused later.

{served} types are served, {refused} are refused, {unbuilt} cannot be built tiny and alone.
"""


class ModelRow(NamedTuple):
    """A model type: its class, the policies that it was tried with, and what became of it."""

    name: str
    tried: tuple[str, ...]
    text: str


def cell(outcome: SweepOutcome) -> str:
    """Say in one cell of the table what an outcome is."""
    if outcome.untried:
        return f"not tried: {outcome.untried}".replace("|", "/")
    reasons: dict[str, list[str]] = {}
    for name, reason in outcome.refused.items():
        reasons.setdefault(_brief(reason, outcome.model), []).append(name)
    if outcome.faults:
        return "FAULT: " + "; ".join(outcome.faults).replace("|", "\\|")
    if not outcome.served:
        return "refused: " + " / ".join(reasons)
    parts = ["served", *(f"not with {', '.join(f'`{n}`' for n in names)}: {why}" for why, names in reasons.items())]
    return "; ".join([*parts, *outcome.notes])


def _brief(reason: str, model: str) -> str:
    """Return a message without the model's name before it and without what to do instead."""
    short = reason.removeprefix(model).removeprefix(":").strip().split("; ")[0].rstrip(".")
    return short.replace("|", "\\|").replace(";", ",")


def refusals(text: str) -> dict[str, str] | None:
    """Return policy -> reason of a cell: every policy where all are refused; None where the class was not built."""
    if text.startswith(("not built", "not tried")):
        return None
    if text.startswith("refused: "):
        return dict.fromkeys(POLICIES, text.removeprefix("refused: "))
    found: dict[str, str] = {}
    for part in text.split("; "):
        if match := _NOT_WITH.match(part):
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", match[1]), match[2])
    return found


def page(rows: Mapping[str, ModelRow]) -> str:
    """Return the page of rows by model type."""
    head = _HEAD.format(
        version=transformers.__version__,
        policies=", ".join(f"`{name}`" for name in POLICIES),
        served=sum(row.text.startswith("served") for row in rows.values()),
        refused=sum(row.text.startswith("refused") for row in rows.values()),
        unbuilt=sum(row.text.startswith(("not built", "not tried")) for row in rows.values()),
    )
    parts = [head]
    for title, known in (("Causal language models", CAUSAL), ("Text behind images", IMAGE_TEXT)):
        parts.append(f"## {title}\n\n| model type | class | tried with | |\n|---|---|---|---|")
        parts.append("\n".join(_line(family, rows[family]) for family in sorted(known) if family in rows))
        parts.append("")
    return "\n".join(parts)


def _line(family: str, row: ModelRow) -> str:
    tried = "all" if set(row.tried) == set(POLICIES) else ", ".join(f"`{name}`" for name in row.tried)
    return f"| `{family}` | {row.name} | {tried} | {row.text} |"


def written() -> tuple[str, dict[str, ModelRow]]:
    """Return the transformers version of the page as it is, and its rows by model type."""
    text = PAGE.read_text(encoding="utf-8")
    version = re.search(r"of transformers (\S+) knows", text)
    assert version is not None
    rows = {
        family: ModelRow(name, POLICIES if tried == "all" else tuple(re.findall(r"`([^`]+)`", tried)), what)
        for family, name, tried, what in _ROW.findall(text)
    }
    return version[1], rows
