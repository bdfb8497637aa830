"""Figures as SVG that stands inside of a page: its colours follow the page, its text can be selected."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final
from xml.etree import ElementTree as ET

from kvpolicy.study.extra import library

WIDTH: Final = 4.7
"""Width of a figure in inches: on a telephone a point of it is about a pixel."""

INK, MUTED, GRID, BAND, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES: Final = ("#060601", "#060602", "#060603", "#060604", "#060605")
GOOD, BAD = "#070701", "#070702"
"""Stand-ins, which become variables of the page, so that it decides for light, dark and paper."""

_VARIABLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        INK: "--ink",
        MUTED: "--muted",
        GRID: "--grid",
        BAND: "--band",
        PAPER: "--paper",
        GOOD: "--good",
        BAD: "--bad",
        **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
    }
)
_STYLE: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "svg.fonttype": "none",  # text stays text
        "text.parse_math": False,  # names may contain dollars
        "font.size": 10.5,
        "axes.unicode_minus": True,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.labelcolor", "ytick.labelcolor"), INK
        ),
        **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor"), MUTED),
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "legend.frameon": False,
        "legend.fontsize": 10,
    }
)
_SVG: Final = "http://www.w3.org/2000/svg"
_XLINK: Final = "http://www.w3.org/1999/xlink"
_DECIMALS: Final = re.compile(r"-?\d+\.\d{3,}")
_FAMILY: Final = re.compile(r" font-family: [^;]*;")  # the page has its own


@dataclass(frozen=True)
class Plot:
    """A drawing.

    Attributes:
        svg: the element, to stand in a page.
        caption: what it shows in particular, such as a condition; may be empty.
        title: what it shows, for readers who do not see it.
    """

    svg: str
    caption: str
    title: str


@contextmanager
def figure(height: float) -> Iterator[tuple[Any, Any]]:
    """Give a figure of one pair of axes, in the style of the page.

    Args:
        height: in inches.

    Raises:
        KVPolicyError: matplotlib is not installed.
    """
    matplotlib = library("matplotlib", "the plots of a report need")
    figures = library("matplotlib.figure", "the plots of a report need")
    with matplotlib.rc_context(dict(_STYLE)):
        made = figures.Figure(figsize=(WIDTH, height), layout="constrained")
        yield made, made.add_subplot()


def plot(made: Any, name: str, title: str, caption: str = "") -> Plot:
    """Return a figure as SVG.

    Args:
        made: the figure; to be called while its style holds.
        name: a name that no other plot of the page has, for the ids in it.
        title: what it shows, for readers who do not see it.
        caption: what stands below or above it.
    """
    matplotlib = library("matplotlib", "the plots of a report need")
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        made.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Plot(_inline(text.getvalue(), name, title), caption, title)


def _inline(text: str, name: str, title: str) -> str:
    """Return matplotlib's file as an element: no size of its own, few ids, the page's colours."""
    root = ET.fromstring(text)  # noqa: S314  # matplotlib has just written it
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    label = ET.Element(f"{{{_SVG}}}title", {"id": f"{name}-title"})
    label.text = title
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
        if parent.tag.endswith("}g"):
            parent.attrib.pop("id", None)
    root.insert(0, label)
    for each in root.iter():
        if each.attrib.get("transform", "").startswith("rotate(-0 "):
            del each.attrib["transform"]
        for kept in ("text", "tail"):
            if not (getattr(each, kept) or "").strip():
                setattr(each, kept, None)
        for attribute, value in each.attrib.items():
            if attribute != "id" and not attribute.endswith("href") and not attribute.startswith("aria"):
                each.set(attribute, _page_colours(_FAMILY.sub("", _DECIMALS.sub(_shorter, " ".join(value.split())))))
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode")


def _shorter(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _page_colours(value: str) -> str:
    for colour, variable in _VARIABLES.items():
        value = value.replace(colour, f"var({variable})")
    return value
