"""Figures of matplotlib that notebooks show by themselves, made without its state: nothing is shown or kept open."""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any

from kvpolicy.errors import KVPolicyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches; raises KVPolicyError where matplotlib is not installed."""
    figure: Figure = _kind()(figsize=(width, height), layout="constrained")
    return figure


@cache
def _kind() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise KVPolicyError("plot: needs matplotlib; install it with: pip install 'kvpolicy[notebook]'.") from None

    class Picture(Figure):
        """A figure that a notebook shows, whether or not matplotlib's own backend for notebooks is loaded."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=90)
            return buffer.getvalue()

    return Picture
