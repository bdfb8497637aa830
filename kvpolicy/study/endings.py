"""Which answers were cut: at the most tokens that a study allows, or at the last position of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from kvpolicy.spec.problems import FieldError
from kvpolicy.study.records import RunRecord
from kvpolicy.study.sampling import Sampling
from kvpolicy.study.sources import read_source

_LONGEST_NUMBER: Final = 15  # digits


@dataclass(frozen=True)
class Endings:
    """Where the answers of a study are cut.

    Attributes:
        limits: most tokens of an answer by dataset, where the study says it itself: not what a benchmark says.
        positions: how many positions each model has, by name, where it is noted.
    """

    limits: Mapping[str, int]
    positions: Mapping[str, int]

    @classmethod
    def of(cls, study: Mapping[str, Any], models: Sequence[Mapping[str, str | None]]) -> Endings:
        """Return those of a study.

        Args:
            study: its fields, as plain values.
            models: what is noted of each of its models.
        """
        own = (study.get("sampling") or {}).get("max_new_tokens", Sampling.model_fields["max_new_tokens"].default)
        limits = {}
        for each in study.get("datasets") or ():
            with suppress(FieldError):  # a dataset of another kvpolicy, of which nothing is known here
                source = read_source(each, ("datasets",), None)
                limit = source.max_new_tokens or (own if source.longest is None else None)
                if limit is not None:
                    limits[source.label] = int(limit)
        noted = {model.get("name") or "": model.get("positions") or "" for model in models}
        return cls(
            limits,
            {name: int(text) for name, text in noted.items() if text.isdecimal() and len(text) <= _LONGEST_NUMBER},
        )

    def is_limited(self, record: RunRecord) -> bool:
        """Whether an answer has the most tokens that the study allows."""
        limit = self.limits.get(record.dataset)
        return limit is not None and _length(record) >= limit

    def is_last(self, record: RunRecord) -> bool:
        """Whether an answer that the study would have allowed to go on reached the model's last position."""
        positions = self.positions.get(record.model)
        if positions is None or self.is_limited(record):
            return False
        return 0 < _length(record) >= positions - record.prompt_tokens


def _length(record: RunRecord) -> float:
    """Return the tokens of an answer; 0 for a text that was read."""
    return record.metrics.get("tokens", 0.0) if record.kind == "generate" else 0.0
