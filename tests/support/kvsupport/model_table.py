"""The page docs/models.md: what the sweep found for every model type, written and read back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import transformers

from kvsupport.sweep import POLICIES, SweepOutcome

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"

_ROW = re.compile(r"^\| `([^`]+)` \| (\S*) \| (.*) \|$", re.MULTILINE)
_NOT_WITH = re.compile(r"^not with (.+?): (.*)$")

_HEAD = """# Model classes

What becomes of every model type that `AutoModelForCausalLM` of transformers {version} knows, and of the language models
behind `AutoModelForImageTextToText`, fed with text. Each class that can be built without files is built tiny, with
random weights, and tried with
{policies}.
This page is written by `make models`; `tests/runtimes/hf/test_model_classes.py` holds it against what happens.

**served** means: below the budget the logits are those of the plain model; after evictions they are those of a run that
forgets nothing, under a mask of what `kept()` said at each step, for every layer and head; the rows of a left-padded
batch are the rows alone, wherever that holds for the model itself. A dense policy and a ragged one go through all
three, the others through the second.

**refused** means: `PolicyCache` raises an error that says so. No class is accepted and refused later.

{served} types are served, {refused} are refused, {unbuilt} cannot be built tiny and alone.
"""


def cell(outcome: SweepOutcome) -> str:
    """Say in one cell of the table what an outcome is."""
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
    if text.startswith("not built"):
        return None
    if text.startswith("refused: "):
        return dict.fromkeys(POLICIES, text.removeprefix("refused: "))
    found: dict[str, str] = {}
    for part in text.split("; "):
        if match := _NOT_WITH.match(part):
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", match[1]), match[2])
    return found


def page(causal: Mapping[str, tuple[str, str]], image_text: Mapping[str, tuple[str, str]]) -> str:
    """Return the page.

    Args:
        causal: model type -> class and cell.
        image_text: likewise.
    """
    everything = [text for _, text in (*causal.values(), *image_text.values())]
    head = _HEAD.format(
        version=transformers.__version__,
        policies=", ".join(f"`{name}`" for name in POLICIES),
        served=sum(text.startswith("served") for text in everything),
        refused=sum(text.startswith("refused") for text in everything),
        unbuilt=sum(text.startswith("not built") for text in everything),
    )
    parts = [head]
    for title, rows in (("Causal language models", causal), ("Text behind images", image_text)):
        parts.append(f"## {title}\n\n| model type | class | |\n|---|---|---|")
        parts.append("\n".join(f"| `{family}` | {name} | {text} |" for family, (name, text) in sorted(rows.items())))
        parts.append("")
    return "\n".join(parts)


def written() -> tuple[str, dict[str, tuple[str, str]]]:
    """Return the transformers version of the page as it is, and model type -> class and cell."""
    text = PAGE.read_text(encoding="utf-8")
    version = re.search(r"of transformers (\S+) knows", text)
    assert version is not None
    return version[1], {family: (name, what) for family, name, what in _ROW.findall(text)}
