"""Draw the pictures of the documentation: `python -P scripts/pictures.py NAME`.

pipeline  docs/pictures/pipeline.svg and pipeline-dark.svg: the stages of a policy, and what they do to one head
accuracy  docs/pictures/accuracy.svg and accuracy-dark.svg: right answers against budget, from the numbers of
          docs/results/methods-at-10-percent.json.gz
trace     docs/pictures/trace.png: one frame of the page that `kvpolicy trace` writes; needs Chromium and SmolLM2
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from kvpolicy.study.analysis import VariantSummary, summarise
from kvpolicy.study.published import Published
from kvpolicy.study.report.budgets import budget_axis
from kvpolicy.study.runs import REFERENCE

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


STUDY = PICTURES.parent / "results" / "methods-at-10-percent.json.gz"
LINES = {
    "full cache": ("#7d848c", "2 4"),
    "rkv-density": ("#0072b2", ""),
    "rkv": ("#d55e00", ""),
    "g-kv": ("#009e73", ""),
    "snapkv": ("#cc79a7", ""),
    "random": ("#e69f00", "6 3"),
    "sinks-recent": ("#56b4e9", "6 3"),
}
"""Policies that are drawn, with colour (of Okabe and Ito's palette) and dashes; the study's tables have all."""
Points = list[tuple[str, float, float, float]]
"""Budget, share of right answers, lower and upper bound; the smallest budget first."""


@cache
def published() -> list[VariantSummary]:
    """Return what the study measured."""
    return summarise(Published(STUDY), ["exact"])


def measured(rows: Sequence[VariantSummary]) -> dict[str, dict[str, Points]]:
    """Return dataset -> policy -> its points, prompt not pinned; the full cache has the same at every budget."""
    axis = budget_axis([row.cell for row in rows if row.cell.name != REFERENCE])
    if axis is None:
        raise SystemExit(f"pictures: {STUDY} compares no budgets; draw a study that does.")
    found: dict[str, dict[str, Points]] = {}
    for row in rows:
        mean, lines = row.metrics.get("exact"), found.setdefault(row.cell.dataset, {})
        if mean is None:
            continue
        if row.cell.name == REFERENCE:
            lines["full cache"] = [(label, mean.value, mean.low, mean.high) for label in axis.labels]
        elif row.cell.settings["protect.prompt"] == "false":
            label = axis.labels[axis.texts.index(row.cell.settings["budget"])]
            lines.setdefault(row.cell.name, []).append((label, mean.value, mean.low, mean.high))
    for lines in found.values():
        for points in lines.values():
            points.sort(key=lambda point: axis.labels.index(point[0]))
    return {dataset: lines for dataset, lines in found.items() if len(lines) > 1}


def accuracy(colours: Colours) -> str:
    """Return the picture of right answers against budget as SVG, one panel for each dataset."""
    panels = measured(published())
    width, top, high, foot = 640, 34, 210, 96
    wide = (width - 44 - 14 * (len(panels) - 1)) / len(panels)
    parts = []
    for number, (dataset, lines) in enumerate(panels.items()):
        left = 40 + number * (wide + 14)
        parts.append(_text(left, top - 12, dataset.removesuffix("-medium").replace("-", " "), colours.ink, 14, "600"))
        for share in (0, 25, 50, 75, 100):
            y = top + high * (1 - share / 100)
            parts.append(f'<path d="M{left:.1f} {y:.1f}H{left + wide:.1f}" stroke="{colours.edge}" stroke-width=".6"/>')
            if not number:
                parts.append(_text(8, y + 4, f"{share}", colours.soft, 12))
        for name, (colour, dashes) in LINES.items():
            if name in lines:
                parts += _line(lines[name], (left, top, wide, high), colour, dashes)
        budgets = [budget for budget, *_ in next(iter(lines.values()))]
        for place, budget in enumerate(budgets):
            x = left + wide * (place + 0.5) / len(budgets)
            parts.append(f'<g text-anchor="middle">{_text(x, top + high + 17, budget, colours.soft, 12)}</g>')
    words = "right answers in %, with 95 % intervals; budget as a share of the full cache's trace"
    parts.append(_text(40, top + high + 38, words, colours.soft, 12))
    for number, (name, (colour, dashes)) in enumerate(LINES.items()):
        x, y = 40 + number % 4 * 150, top + high + 60 + number // 4 * 20
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        parts.append(f'<path d="M{x} {y - 4}H{x + 22}" stroke="{colour}" stroke-width="2.4"{dash}/>')
        parts.append(_text(x + 28, y, name, colours.ink, 13))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + high + foot}" role="img" '
        f'font-family="system-ui, sans-serif"><title>Right answers against budget</title>'
        f'<rect width="100%" height="100%" rx="10" fill="{colours.page}"/>{"".join(parts)}</svg>\n'
    )


def _line(points: Points, frame: tuple[float, float, float, float], colour: str, dashes: str) -> Iterator[str]:
    left, top, wide, high = frame
    xs = [left + wide * (place + 0.5) / len(points) for place in range(len(points))]
    ys = [[top + high * (1 - value) for value in point[1:]] for point in points]
    for x, (_, low, up) in zip(xs, ys, strict=True):
        yield f'<path d="M{x:.1f} {low:.1f}V{up:.1f}" stroke="{colour}" stroke-width="1" opacity=".55"/>'
    path = "L".join(f"{x:.1f} {y[0]:.1f}" for x, y in zip(xs, ys, strict=True))
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.2"{dash}/>'
    for x, y in zip(xs, ys, strict=True):
        yield f'<circle cx="{x:.1f}" cy="{y[0]:.1f}" r="2.8" fill="{colour}"/>'


def trace() -> None:
    """Write one frame of the trace page, in the middle of the text."""
    from playwright.sync_api import sync_playwright

    from kvpolicy.cli import main as kvpolicy

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    chromium = next(filter(None, map(shutil.which, names)), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page = Path(folder) / "trace.html"
        arguments = ["--model", "smollm2", "--policy", "rkv", "--budget", "128", "--max-new-tokens", "420"]
        code = kvpolicy(["trace", *arguments, "--out", str(page), "Write a guide to growing vegetables."])
        if code != 0:
            raise SystemExit(code)
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page(viewport={"width": 1000, "height": 560}, color_scheme="light")
        shown.goto(page.as_uri())
        shown.wait_for_timeout(500)
        shown.mouse.click(260, 476)  # a token of the answer, whose card is pinned
        shown.wait_for_timeout(300)
        shown.screenshot(path=PICTURES / "trace.png")
        browser.close()


def main(arguments: list[str]) -> int:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=["pipeline", "accuracy", "trace"])
    asked = parser.parse_args(arguments).picture
    PICTURES.mkdir(exist_ok=True)
    if asked == "trace":
        trace()
        return 0
    draw = {"pipeline": pipeline, "accuracy": accuracy}[asked]
    for suffix, colours in (("", LIGHT), ("-dark", DARK)):
        (PICTURES / f"{asked}{suffix}.svg").write_text(draw(colours), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
