"""Tensor aliases with named axes.

`B` batch rows, `H` KV heads, `G` query heads per KV head, `N` cached slots, `Q` observed queries, `D` head dim of the
keys, `Dv` head dim of the values, `K` kept entries. KV head `h` serves the query heads `h*G ... h*G + G-1`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int, Int32, Int64
from torch import Tensor

Keys = Float[Tensor, "B H N D"]
"""Cached keys, after RoPE, in the cache's own dtype."""
Values = Float[Tensor, "B H N Dv"]
"""Cached values in the cache's own dtype."""
Queries = Float[Tensor, "B H G Q D"]
"""Queries that the model really used, after RoPE."""
Weights = Float32[Tensor, "B H G Q N"]
"""Attention weights of some queries over all slots; invisible slots hold 0."""
Scores = Float32[Tensor, "B H N"]
"""One finite number per slot."""
Mask = Bool[Tensor, "B H N"]
"""True where the statement holds for a slot."""
Positions = Int32[Tensor, "B H N"]
"""Original position of the token in its row, counted without padding, from 0."""
Counts = Int64[Tensor, "B H"]
"""KV entries to keep, per row and KV head."""
Lengths = Int[Tensor, " B"]
"""One count per row."""


class KeepIndices(NamedTuple):
    """The slots that stay, per row and KV head.

    Attributes:
        indices: int64 `[B, H, K]`, strictly increasing in the first `lengths` entries; the rest repeats the last slot.
        lengths: int64 `[B, H]`, how many of the `K` columns count.
    """

    indices: Int64[Tensor, "B H K"]
    lengths: Int64[Tensor, "B H"]

    def mask(self, slots: int) -> Mask:
        """Return bool `[B, H, slots]`, True for the slots that stay."""
        batch, heads, columns = self.indices.shape
        counts = torch.arange(columns, device=self.indices.device) < self.lengths.unsqueeze(-1)
        marked = torch.zeros(batch, heads, slots + 1, dtype=torch.bool, device=self.indices.device)
        return marked.scatter_(-1, self.indices.masked_fill(~counts, slots), True)[..., :slots]
