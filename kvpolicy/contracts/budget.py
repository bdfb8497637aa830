"""How much a policy keeps."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvpolicy.contracts.component import LONGEST_TEXT


class Budget(BaseModel):
    """How many KV entries a layer keeps per KV head after a compaction, protected ones included; exactly one field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    tokens: int | None = Field(default=None, ge=1, le=LONGEST_TEXT)
    """A fixed number of entries per KV head (on average over heads when the allocator is not uniform)."""
    fraction: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """A share of the tokens seen so far, rounded up; 1.0 keeps everything."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        if (self.tokens is None) == (self.fraction is None):
            raise ValueError("give either `tokens` or `fraction`, and not both")
        return self

    def entries(self, seen: int, protected: int) -> int:
        """Return the entries to keep of `seen` tokens; a fraction never asks for less than what is `protected`."""
        if self.tokens is not None:
            return self.tokens
        assert self.fraction is not None
        return min(seen, max(math.ceil(self.fraction * seen - 1e-9), protected, 1))
