"""What the attention's output projection makes of the values."""

from __future__ import annotations

import torch
from jaxtyping import Float

from kvpolicy.types import Mask, Scores, Values

_ELEMENTS = 1 << 22  # projected numbers that are held at a time


def projected_value_norm(values: Values, projection: Float[torch.Tensor, "H G Dv M"], valid: Mask) -> Scores:
    """L1 norm of each value after the output projection, mean over the query heads that share it (CriticalKV).

    Args:
        values: `[B, H, N, Dv]`, any float dtype.
        projection: `[H, G, Dv, M]`, any float dtype: the rows of the output projection that each query head meets.
        valid: bool `[B, H, N]`.

    Returns:
        fp32 `[B, H, N]`, 0 for slots that are not valid.
    """
    batch, heads, count, _ = values.shape
    held = torch.where(valid.unsqueeze(-1), values, 0).float()
    group, width = projection.shape[1], projection.shape[3]
    result = torch.zeros(valid.shape, dtype=torch.float32, device=values.device)
    block = max(1, _ELEMENTS // max(1, batch * heads * width))
    for g in range(group):
        weight = projection[:, g].float()
        for start in range(0, count, block):
            part = held[:, :, start : start + block]
            result[:, :, start : start + block] += torch.matmul(part, weight).abs().sum(-1)
    return result / group
