"""How tokens are chosen in a study."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kvpolicy.contracts.component import LONGEST_TEXT

COLDEST: Final = 1e-4
"""The least temperature above 0."""
HOTTEST: Final = 1e4
"""Temperatures at which sampling still means something: beyond them logits overflow, or all tokens are alike."""


def warm(temperature: float) -> float:
    """Return a temperature; raises ValueError for one that is too small to divide by."""
    if 0 < temperature < COLDEST:
        raise ValueError(f"should be 0 or at least {COLDEST:g}")
    return temperature


class Sampling(BaseModel):
    """How tokens are chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    temperature: float = Field(default=0.0, ge=0, le=HOTTEST, allow_inf_nan=False)
    """0 takes the most likely token; otherwise at least 0.0001."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens with this mass."""
    max_new_tokens: int = Field(default=2048, ge=1, le=LONGEST_TEXT)
    """Stop after so many tokens."""

    @field_validator("temperature")
    @classmethod
    def _warm(cls, temperature: float) -> float:
        return warm(temperature)

    @property
    def greedy(self) -> bool:
        """No randomness."""
        return self.temperature == 0
