"""Draw the pictures of the documentation: `python -P scripts/pictures.py pipeline`.

pipeline  docs/pictures/pipeline.svg and pipeline-dark.svg: the stages of a policy, and what they do to one head
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"


@dataclass(frozen=True)
class Colours:
    """A scheme."""

    page: str
    card: str
    edge: str
    ink: str
    soft: str
    accent: str
    held: tuple[str, ...]
    gone: str


LIGHT = Colours(
    "#ffffff", "#f5f7fa", "#c6ccd4", "#1b1d20", "#565d66", "#0b57a4",
    ("#dbe9f7", "#b3d1ee", "#7fb0de", "#4a8cc8", "#1f66a8"), "#eceef1",
)  # fmt: skip
DARK = Colours(
    "#131416", "#1e2126", "#434a53", "#e8eaed", "#a9b0b8", "#79b8ff",
    ("#1d3349", "#27496b", "#346594", "#4b87bf", "#76b1e6"), "#26292e",
)  # fmt: skip
STAGES = (
    ("trigger", "when to compact a row", "every 128 tokens"),
    ("importance", "how much it matters", "attention of last queries"),
    ("redundancy", "how replaceable it is", "likeness of keys"),
    ("mixer", "one score out of two", "λ·I − (1−λ)·R"),
    ("allocator", "how many per head", "uniform, pyramid"),
    ("protection", "what stays anyway", "sinks, recent, prompt"),
    ("selector", "which slots are kept", "top-k per head"),
    ("compaction", "move, free, count", "keys, values, positions"),
    ("post", "what is done to them", "re-rotate, merge"),
)
SCORES = (4, 1, 0, 2, 0, 3, 1, 0, 4, 1, 0, 0, 2, 3, 0, 1, 3, 4)
"""Shade of each slot of the strip: how high its retention score is."""
SINKS, RECENT, BUDGET = 2, 3, 9


def kept() -> list[int]:
    """Return the slots of the strip that stay: the protected ones and the highest scores."""
    last = len(SCORES) - RECENT
    protected = [slot for slot in range(len(SCORES)) if slot < SINKS or slot >= last]
    others = sorted((slot for slot in range(SINKS, last)), key=lambda slot: (-SCORES[slot], slot))
    return sorted([*protected, *others[: BUDGET - len(protected)]])


def pipeline(colours: Colours) -> str:
    """Return the picture of the stages as SVG."""
    width, box, high, gap = 600, 180, 84, 18
    left = (width - 3 * box - 2 * gap) / 2
    parts = []
    for number, (name, asks, example) in enumerate(STAGES):
        row, column = divmod(number, 3)
        x, y = left + column * (box + gap), 14 + row * (high + gap)
        fill, dashes = (colours.page, ' stroke-dasharray="5 4"') if name == "compaction" else (colours.card, "")
        parts.append(
            f'<rect x="{x}" y="{y}" width="{box}" height="{high}" rx="8" fill="{fill}" '
            f'stroke="{colours.edge}"{dashes}/>'
        )
        parts += [
            _text(x + 12, y + 25, f"{number + 1} {name}", colours.accent, 17, "600"),
            _text(x + 12, y + 48, asks, colours.ink, 14),
            _text(x + 12, y + 69, example, colours.soft, 13),
        ]
        if column < 2:
            parts.append(_arrow(x + box + 2, y + high / 2, x + box + gap - 2, y + high / 2, colours))
    top = 14 + 3 * (high + gap) + 16
    parts += _strips(colours, left, top, width - 2 * left)
    words = "; ".join(f"{name}: {asks}" for name, asks, _ in STAGES)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + 132:.0f}" role="img" '
        f'font-family="system-ui, sans-serif"><title>The stages of a policy</title><desc>{escape(words)}</desc>'
        f'<rect width="100%" height="100%" rx="10" fill="{colours.page}"/>{"".join(parts)}</svg>\n'
    )


def _strips(colours: Colours, left: float, top: float, width: float) -> list[str]:
    """Return one head's slots before and after a compaction."""
    count = len(SCORES)
    cell = width / count
    stay = kept()
    parts = [
        _text(left, top, "one head before: the stronger, the higher the score; rings are protected", colours.soft, 13)
    ]
    for slot, score in enumerate(SCORES):
        shade = colours.held[score] if slot in stay else colours.gone
        parts.append(_cell(left + slot * cell, top + 9, cell, shade, colours))
        if slot < SINKS or slot >= count - RECENT:
            parts.append(
                f'<circle cx="{left + (slot + 0.5) * cell:.1f}" cy="{top + 22:.1f}" r="5" fill="none" '
                f'stroke="{colours.ink}" stroke-width="1.6"/>'
            )
    for place, slot in enumerate(stay):
        start, end = left + (slot + 0.5) * cell, left + (place + 0.5) * cell
        parts.append(
            f'<path d="M{start:.1f} {top + 37} C{start:.1f} {top + 56} {end:.1f} {top + 54} {end:.1f} {top + 72}" '
            f'fill="none" stroke="{colours.edge}"/>'
        )
        parts.append(_cell(left + place * cell, top + 74, cell, colours.held[SCORES[slot]], colours))
    free = left + len(stay) * cell
    parts.append(_text(free + 10, top + 92, "freed", colours.soft, 13))
    parts.append(_text(left, top + 120, "after: in order of position, at their old positions", colours.soft, 13))
    return parts


def _cell(x: float, y: float, size: float, fill: str, colours: Colours) -> str:
    return (
        f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{size - 2:.1f}" height="26" rx="3" fill="{fill}" '
        f'stroke="{colours.edge}" stroke-width=".7"/>'
    )


def _text(x: float, y: float, text: str, fill: str, size: int, weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}" font-weight="{weight}">{escape(text)}</text>'
    )


def _arrow(x: float, y: float, to_x: float, to_y: float, colours: Colours) -> str:
    return (
        f'<path d="M{x:.1f} {y:.1f}H{to_x:.1f}M{to_x - 5:.1f} {to_y - 4:.1f}L{to_x:.1f} {to_y:.1f}'
        f'L{to_x - 5:.1f} {to_y + 4:.1f}" fill="none" stroke="{colours.soft}" stroke-width="1.6"/>'
    )


def main(arguments: list[str]) -> int:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=["pipeline"])
    parser.parse_args(arguments)
    PICTURES.mkdir(exist_ok=True)
    for name, colours in (("pipeline", LIGHT), ("pipeline-dark", DARK)):
        (PICTURES / f"{name}.svg").write_text(pipeline(colours), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
