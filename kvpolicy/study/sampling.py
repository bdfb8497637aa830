"""How tokens are chosen in a study."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Sampling(BaseModel):
    """How tokens are chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 takes the most likely token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens with this mass."""
    max_new_tokens: int = Field(default=2048, ge=1)
    """Stop after so many tokens."""

    @property
    def greedy(self) -> bool:
        """No randomness."""
        return self.temperature == 0
