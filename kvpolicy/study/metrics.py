"""What a study can measure, and which kind of run it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

RunKind = Literal["generate", "force"]
"""generate: the model answers on its own; force: it reads a text that is given (teacher forcing)."""


@dataclass(frozen=True)
class Metric:
    """A number that a run gives.

    Attributes:
        title: for tables.
        run: which runs give it.
        better: whether more or less is better; None if it only describes.
        binary: 0 or 1.
        quality: says how good a variant is, and is shown with its interval everywhere.
        digits: decimals in tables.
        percent: a share, which tables and plots show in percent.
        bounds: smallest and largest value that can be true; a share and a divergence may miss theirs by rounding.
    """

    title: str
    run: tuple[RunKind, ...]
    better: Literal["more", "less"] | None = None
    binary: bool = False
    quality: bool = False
    digits: int = 3
    bounds: tuple[float, float] = (0.0, 1e15)
    percent: bool = False

    @property
    def scale(self) -> int:
        """What a value is multiplied with before it is shown."""
        return 100 if self.percent else 1

    @property
    def heading(self) -> str:
        """The title with its unit, for tables and axes."""
        return f"{self.title}, %" if self.percent else self.title

    @property
    def difference(self) -> str:
        """What a difference of two values is called, with its unit."""
        return "difference, points" if self.percent else "difference"


_SHARE: Final = (-1e-6, 1 + 1e-6)
_BOTH: Final[tuple[RunKind, ...]] = ("generate", "force")

METRICS: Final[Mapping[str, Metric]] = {
    "exact": Metric("right answers", ("generate",), "more", binary=True, quality=True, digits=1, percent=True),
    "score": Metric(
        "score of the benchmark", ("generate",), "more", quality=True, digits=1, bounds=_SHARE, percent=True
    ),
    "progress": Metric(
        "steps until the first error", ("generate",), "more", quality=True, digits=1, bounds=_SHARE, percent=True
    ),
    "tokens": Metric("tokens generated", ("generate",), digits=1),
    "kl": Metric(
        "KL divergence to the full cache, nats per token",
        ("force",),
        "less",
        digits=4,
        quality=True,
        bounds=(-0.01, 1e15),
    ),
    "top1": Metric(
        "same most likely token as the full cache",
        ("force",),
        "more",
        quality=True,
        digits=1,
        bounds=_SHARE,
        percent=True,
    ),
    "attention_mass": Metric(
        "attention mass kept", ("force",), "more", quality=True, digits=1, bounds=(-1e-6, 1.05), percent=True
    ),
    "resident_mean": Metric("entries per head, mean", _BOTH, "less", digits=1),
    "resident_peak": Metric("entries per head, peak", _BOTH, "less", digits=1),
    "retained_fraction": Metric(
        "entries held of tokens seen", _BOTH, "less", digits=1, bounds=(0.0, 1.001), percent=True
    ),
    "bytes_peak": Metric("bytes of keys and values, peak", _BOTH, "less", digits=0),
    "seconds": Metric("seconds of a row's share of its batch", _BOTH, "less"),
}
"""Metrics by name.

``score``: what the authors of a benchmark measure where it is not right or wrong: the share of the strings that are
found, F1, ROUGE-L and others. ``progress``: only the generator's problems have it. ``kl``: mean over the forced
tokens of ``sum_v p_full(v) (log p_full(v) - log p(v))``. ``attention_mass``: share of the full cache's softmax
weights that falls on entries which the policy still holds, mean over forced tokens, layers and query heads.
``resident_*``: KV entries per KV head, at the attention of each decode step. ``retained_fraction``: sum over decode
steps of entries held, divided by the sum of tokens seen so far; right and wrong answers alike. ``bytes_peak``: of one
row, over all evictable layers.
"""

DEFAULT_METRICS: Final = (
    *(
        "exact",
        "score",
        "tokens",
        "kl",
        "top1",
        "resident_mean",
        "resident_peak",
        "retained_fraction",
        "bytes_peak",
        "seconds",
    ),
)
