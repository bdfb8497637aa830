"""Figures as SVG, inside of a page or in a file: their text stays text, their colours are those of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final
from xml.etree import ElementTree as ET

from kvpolicy.study.extra import library
from kvpolicy.study.report.styles import Style

NARROW: Final = 4.7
"""Width of a figure for a telephone in inches: there a point of it is about a pixel."""
WIDE: Final = 11.0
"""Width of a figure for a screen or a projector in inches."""

INK, MUTED, GRID, BAND, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Stand-ins, which become variables of the page, so that it decides for light, dark and paper."""

PALETTE: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {  # variable of the page -> its colour on light and on dark paper
        "--paper": ("#ffffff", "#14171b"),
        "--ink": ("#16191d", "#e8ebee"),
        "--muted": ("#5c6570", "#9aa4af"),
        "--grid": ("#dfe3e8", "#343a42"),
        "--band": ("#e9edf2", "#262c34"),
        "--series-0": ("#0b5cad", "#6fb3ff"),
        "--series-1": ("#c2410c", "#ff9b6b"),
        "--series-2": ("#14703a", "#6fd08c"),
        "--series-3": ("#7e3fb0", "#cfa2f5"),
        "--series-4": ("#806300", "#dcbf4a"),
        "--series-5": ("#b5196b", "#ff8fc2"),
        "--series-6": ("#00707c", "#5cd3dd"),
        "--series-7": ("#8a4632", "#d8a58f"),
        "--series-8": ("#4f5d95", "#aab8ee"),
        "--series-9": ("#5c6b00", "#bccf52"),
    }
)

_SERIES: Final = tuple(f"#0606{i:02x}" for i in range(1, 11))
_VARIABLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        INK: "--ink",
        MUTED: "--muted",
        GRID: "--grid",
        BAND: "--band",
        PAPER: "--paper",
        **{colour: f"--series-{i}" for i, colour in enumerate(_SERIES)},
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
_FONTS: Final = "font-family: system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Tip:
    """What a reader gets at a point.

    Attributes:
        text: shown when the point is pointed at.
        link: where a click leads; empty for nowhere.
    """

    text: str
    link: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing.

    Attributes:
        svg: the element, to stand in a page.
        caption: what it shows in particular, such as a condition; may be empty.
        title: what it shows, for readers who do not see it.
        name: begins its ids.
    """

    svg: str
    caption: str
    title: str
    name: str

    def file(self) -> str:
        """Return the drawing as an SVG file: on white paper, in colours of its own."""
        root = ET.fromstring(self.svg)  # noqa: S314  # it was made here
        _left, _top, width, height = root.attrib["viewBox"].split()
        root.attrib.update({"width": f"{width}pt", "height": f"{height}pt", "style": _FONTS})
        root.insert(1, ET.Element(f"{{{_SVG}}}rect", {"width": width, "height": height, "fill": "var(--paper)"}))
        for parent in list(root.iter()):
            for i, child in enumerate(list(parent)):
                if child.tag == f"{{{_SVG}}}a":  # a link leads nowhere outside of the page
                    parent[i] = child[0]
        text = re.sub(r"var\((--[\w-]+)\)", lambda found: PALETTE[found[1]][0], ET.tostring(root, encoding="unicode"))
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


@dataclass
class Canvas:
    """A figure of one pair of axes under way.

    Attributes:
        whole, axes: of matplotlib.
        wide: whether it is for a screen or a projector.
        tips: what a reader gets at a point, by the id of the point.
    """

    whole: Any
    axes: Any
    wide: bool
    tips: dict[str, Tip] = field(default_factory=dict)

    def point(self, x: float, y: float, style: Mapping[str, Any], tip: Tip) -> None:
        """Draw a point that says what it is.

        Args:
            x, y: where, in units of the axes.
            style: of matplotlib's `plot`.
            tip: what a reader gets there.
        """
        name = f"tip-{len(self.tips)}"
        self.tips[name] = tip
        self.axes.plot([x], [y], linestyle="", gid=name, **style)


@contextmanager
def figure(height: float, *, wide: bool = False) -> Iterator[Canvas]:
    """Give a figure of one pair of axes, in the style of the page.

    Args:
        height: in inches.
        wide: for a screen or a projector.

    Raises:
        KVPolicyError: matplotlib is not installed.
    """
    matplotlib = library("matplotlib", "the plots of a report need")
    figures = library("matplotlib.figure", "the plots of a report need")
    with matplotlib.rc_context({**_STYLE, "font.size": 13 if wide else _STYLE["font.size"]}):
        made = figures.Figure(figsize=(WIDE if wide else NARROW, height), layout="constrained")
        yield Canvas(made, made.add_subplot(), wide)


def colour(style: Style) -> str:
    """Return the colour of a variant as figures take it."""
    return INK if style.colour < 0 else _SERIES[style.colour]


def variable(style: Style) -> str:
    """Return the colour of a variant as the page has it."""
    return f"var({_VARIABLES[colour(style)]})"


def plot(canvas: Canvas, name: str, title: str, caption: str = "") -> Plot:
    """Return a figure as SVG.

    Args:
        canvas: the figure; to be called while its style holds.
        name: a name that no other plot of the page has, for the ids in it.
        title: what it shows, for readers who do not see it.
        caption: what stands below or above it.
    """
    matplotlib = library("matplotlib", "the plots of a report need")
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        canvas.whole.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Plot(_inline(text.getvalue(), name, title, canvas.tips), caption, title, name)


def _inline(text: str, name: str, title: str, tips: Mapping[str, Tip]) -> str:
    """Return matplotlib's file as an element: no size of its own, few ids, the page's colours, tips at its points."""
    root = ET.fromstring(text)  # noqa: S314  # matplotlib has just written it
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    label = ET.Element(f"{{{_SVG}}}title", {"id": f"{name}-title"})
    label.text = title
    for parent in list(root.iter()):
        for i, child in enumerate(list(parent)):
            if child.tag.endswith("}g") and (tip := tips.get(child.attrib.get("id", ""))) is not None:
                parent[i] = _with_tip(child, tip)
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    root.insert(0, label)
    for each in root.iter():
        _tidy(each)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode")


def _tidy(each: ET.Element) -> None:
    if each.tag.endswith("}g"):
        each.attrib.pop("id", None)
    if each.attrib.get("transform", "").startswith("rotate(-0 "):
        del each.attrib["transform"]
    for kept in ("text", "tail"):
        if not (getattr(each, kept) or "").strip():
            setattr(each, kept, None)
    for attribute, value in each.attrib.items():
        if attribute not in ("id", "tabindex") and not attribute.endswith("href") and "aria" not in attribute:
            each.set(attribute, _page_colours(_FAMILY.sub("", _DECIMALS.sub(_shorter, " ".join(value.split())))))


def _with_tip(point: ET.Element, tip: Tip) -> ET.Element:
    said = ET.Element(f"{{{_SVG}}}title")
    said.text = tip.text
    point.insert(0, said)
    if not tip.link:
        return point
    # The same links stand in tables, so the keyboard need not stop at every point.
    link = ET.Element(f"{{{_SVG}}}a", {"href": tip.link, "tabindex": "-1", "aria-label": tip.text})
    link.append(point)
    return link


def _shorter(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _page_colours(value: str) -> str:
    for stand_in, name in _VARIABLES.items():
        value = value.replace(stand_in, f"var({name})")
    return value
