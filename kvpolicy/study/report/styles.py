"""How each variant is drawn: one colour, one marker and one kind of line, the same through a whole report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

COLOURS: Final = 10
"""Colours of the page that variants take, beside ink for the baseline."""

INK: Final = -1

_MARKERS: Final[Mapping[str, str]] = MappingProxyType(
    {  # matplotlib's name -> the same shape around (0, 0) as an SVG path
        "o": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
        "s": "M-3.6,-3.6h7.2v7.2h-7.2z",
        "^": "M0,-4.4L4.2,3.6H-4.2z",
        "D": "M0,-5L5,0L0,5L-5,0z",
        "v": "M0,4.4L4.2,-3.6H-4.2z",
        "P": "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
        "X": "M-4.2,-2.1L-2.1,-4.2L0,-2.1L2.1,-4.2L4.2,-2.1L2.1,0L4.2,2.1L2.1,4.2L0,2.1L-2.1,4.2L-4.2,2.1L-2.1,0z",
        "<": "M-4.4,0L3.6,-4.2V4.2z",
        "p": "M0,-4.5L4.3,-1.4L2.6,3.6H-2.6L-4.3,-1.4z",
        ">": "M4.4,0L-3.6,-4.2V4.2z",
        "h": "M0,-4.6L4,-2.3V2.3L0,4.6L-4,2.3V-2.3z",
    }
)
_DASHES: Final = ((5, 1.5), (1, 1), (5, 1.5, 1, 1.5), (2.5, 1), (8, 2), (8, 1.5, 1, 1.5, 1, 1.5), (3, 1, 1, 1))


@dataclass(frozen=True)
class Style:
    """How a variant is drawn.

    Attributes:
        colour: number of one of the page's colours; `INK` for the baseline.
        marker: matplotlib's name of its marker.
        dash: lengths of dashes and gaps, in widths of the line; empty for a whole line.
    """

    colour: int
    marker: str
    dash: tuple[float, ...]

    @property
    def shape(self) -> str:
        """The marker as an SVG path around (0, 0), about 9 px wide."""
        return _MARKERS[self.marker]

    @property
    def line(self) -> Any:
        """The line as matplotlib takes it."""
        return (0, self.dash) if self.dash else "-"


BASELINE: Final = Style(INK, "o", ())
FULL_CACHE: Final = Style(INK, "D", ())


def styles(series: Sequence[str], baseline: str) -> dict[str, Style]:
    """Return the style of every variant.

    Up to 109 others than the baseline differ from each other in colour or marker, and ten in colour alone.

    Args:
        series: all variants, in the order of the study.
        baseline: the one that the others are compared with.
    """
    markers = [*list(_MARKERS)[1:], "o"]
    others = [name for name in series if name != baseline]
    found = {
        name: Style(i % COLOURS, markers[i % len(markers)], _DASHES[i % len(_DASHES)]) for i, name in enumerate(others)
    }
    return {baseline: BASELINE, **found}
