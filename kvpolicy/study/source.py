"""What every entry of `datasets` is: problems, how many, and for which models."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kvpolicy.contracts.component import LONGEST_TEXT
from kvpolicy.study.problem import Problem
from kvpolicy.study.sampling import HOTTEST, warm

MOST_SAMPLES: Final = 100_000
"""Problems of a data set and a seed; the largest benchmarks have a tenth of it."""

MOST_ROLLOUTS: Final = 1_000
"""Answers to one problem."""


@dataclass(frozen=True)
class TextMeasure:
    """What problems that are made to a model's measure know of it.

    Attributes:
        tokenizer: the model's.
        window: most tokens that it takes, answer included; None if its configuration does not say.
    """

    tokenizer: Any
    window: int | None = None

    def count(self, text: str) -> int:
        """Return the tokens of a text, without those that the tokenizer puts before it."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def frame(self, *, chat: bool | None) -> int:
        """Return the tokens that stand around a prompt.

        Args:
            chat: as in `Problem`.
        """
        if self.has_template and chat is not False:
            messages = [{"role": "user", "content": ""}]
            made = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            return len(made["input_ids"])
        return len(self.tokenizer("")["input_ids"])


def _warm(temperature: float | None) -> float | None:
    return None if temperature is None else warm(temperature)


class Source(BaseModel):
    """One entry of `datasets`.

    Attributes:
        generates: there are answers to be generated; otherwise the text is only read (teacher forcing).
        fresh_by_seed: each seed of a study gets other problems.
        measured: problems are made to the measure of each model: of a length in its tokens, or cut to its window.
        size: how many problems the published data set has; None if there is no such number.
        longest: most tokens of any answer, where the authors of a benchmark say it.
        files: fields that name files; relative ones are relative to the study file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
    generates: ClassVar[bool] = True
    fresh_by_seed: ClassVar[bool] = False
    measured: ClassVar[bool] = False
    size: ClassVar[int | None] = None
    longest: ClassVar[int | None] = None
    files: ClassVar[tuple[str, ...]] = ("path",)

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What tables call it; made from the other fields if left out."""
    samples: int | None = Field(default=None, ge=1, le=MOST_SAMPLES)
    """How many problems; the study's `samples` if left out."""
    max_new_tokens: int | None = Field(default=None, ge=1, le=LONGEST_TEXT)
    """Most tokens that are generated; what the benchmark says, or else the study's `sampling`, if left out."""
    temperature: Annotated[float | None, AfterValidator(_warm)] = Field(default=None, ge=0, le=HOTTEST)
    """As in the study's `sampling`, which it takes the place of here."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """As in the study's `sampling`, which it takes the place of here."""
    rollouts: int | None = Field(default=None, ge=1, le=MOST_ROLLOUTS)
    """Answers to each problem: the seeds 0, 1, ... take the place of the study's `seeds` here."""
    budget: int | None = Field(default=None, ge=1, le=LONGEST_TEXT)
    """Entries per head that every policy of the study gets here, in place of its own budget."""
    forced: bool = False
    """Also read the full cache's answers under teacher forcing (free text is always read so)."""
    models: list[str] | None = Field(default=None, min_length=1)
    """The study's models that are given it; all of them if left out."""

    @property
    def label(self) -> str:
        """The name in tables."""
        return self.name or self._label()

    @property
    def remote(self) -> str | None:
        """The id on the hub that it is read from; None for what is here."""
        return getattr(self, "id", None) if getattr(self, "path", None) is None else None

    @abstractmethod
    def _label(self) -> str: ...

    @abstractmethod
    def problems(self, count: int, seed: int, measure: TextMeasure | None = None) -> list[Problem]:
        """Return `count` problems, or all if there are fewer.

        Args:
            count: how many; with fewer, the first of those.
            seed: seed of the study; ignored unless `fresh_by_seed`.
            measure: of the model that they are for; needed where they are `measured`.

        Raises:
            KVPolicyError: the data cannot be read or lack a field.
        """
