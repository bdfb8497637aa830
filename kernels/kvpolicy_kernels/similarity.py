"""Redundancy of keys in Triton; the definition is `kvpolicy.ops.similarity`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvpolicy.ops import arguments
from kvpolicy.ops.dispatch import scratch
from kvpolicy.types import Keys, Mask, Scores
from kvpolicy_kernels import served
from kvpolicy_kernels.launching import as_bytes, batches, launch, padded, parts_of, upcast

TILE = 64


class Norms(NamedTuple):
    """What one read of the keys of `R = B*H` heads leaves behind for their redundancy.

    Attributes:
        inverse: fp32 `[R, N]`, 1 / length of each key, 0 for those that take no part.
        partial: fp32 `[R, tiles, D]`, sums of unit keys.
        first: int32 `[R, tiles]`, lowest slot of a tile that takes part.
        held: int32 `[R, tiles]`, how many do.
        lost: int64 `[R, N]`, zeros.
    """

    inverse: Tensor
    partial: Tensor
    first: Tensor
    held: Tensor
    lost: Tensor

    @staticmethod
    def like(keys: Keys) -> Norms:
        """Allocate for `[B, H, N, D]` keys."""
        batch, heads, n, dim = keys.shape
        rows, tiles = batch * heads, -(-n // TILE)
        device = keys.device
        return Norms(
            torch.empty(rows, n, dtype=torch.float32, device=device),
            torch.empty(rows, tiles, dim, dtype=torch.float32, device=device),
            torch.empty(rows, tiles, dtype=torch.int32, device=device),
            torch.empty(rows, tiles, dtype=torch.int32, device=device),
            torch.empty(rows, n, dtype=torch.int64, device=device),
        )

    @staticmethod
    def bytes_each(keys: Keys) -> int:
        """Bytes per batch row, what `_reduced` adds included."""
        _, heads, n, dim = keys.shape
        return heads * (16 * n + (4 * dim + 8) * (-(-n // TILE)))


def redundancy(
    keys: Keys,
    valid: Mask,
    *,
    participates: Mask | None = None,
    threshold: float = 0.5,
    beta: int = 1,
    spare: Literal["newest", "own"] = "newest",
    index_zero: bool = False,
) -> Scores:
    """As `kvpolicy.ops.redundancy`. Raises ValueError when arguments do not fit together."""
    takes_part = valid if participates is None else valid & participates
    return _scores(keys, takes_part, threshold, beta, spare == "own", index_zero, softmax=True)


def mean_similarity(
    keys: Keys,
    takes_part: Mask,
    *,
    threshold: float = 0.5,
    beta: int = 1,
    spare: Literal["newest", "own"] = "newest",
    index_zero: bool = False,
) -> Scores:
    """As `kvpolicy.ops.mean_similarity`. Raises ValueError when arguments do not fit together."""
    return _scores(keys, takes_part, threshold, beta, spare == "own", index_zero, softmax=False)


def _scores(
    keys: Keys, mask: Mask, threshold: float, beta: int, own: bool, index_zero: bool, *, softmax: bool
) -> Scores:
    served.require(served.redundancy(keys, mask, beta=beta))
    arguments.mean_similarity(keys, mask, name="valid")
    out = torch.empty(keys.shape[:3], dtype=torch.float32, device=keys.device)
    if out.numel() == 0:
        return out
    at_hand = scratch()
    left = at_hand.pop("norms", None) if at_hand is not None else None
    # What the importance of the same view has left here; for the same tensors, not equal ones.
    if left is not None and left[0] is keys and left[1] is mask:
        _reduced(keys, mask, left[2], out, threshold, beta, own, index_zero, softmax)
        return out
    for part in batches(keys.shape[0], Norms.bytes_each(keys)):
        norms = Norms.like(keys[part])
        scan(keys[part], mask[part], norms)
        _reduced(keys[part], mask[part], norms, out[part], threshold, beta, own, index_zero, softmax)
    return out


def scan(keys: Keys, mask: Mask, norms: Norms) -> None:
    """Read the keys once for their norms alone."""
    batch, heads, n, dim = keys.shape
    width, parts = parts_of(dim)
    nothing = (None, 0, 0, 0, 0, None, None, None, 0, 0, 0, None, None, None, None)
    launch(
        "scan.scan_keys", batch * heads * -(-n // TILE),
        keys, *keys.stride()[:3], as_bytes(mask), *mask.stride(), *norms, *nothing, 0.0, 0.0, n, heads, 0,
        D=width, PARTS=parts, TILE=TILE, GROUP=1, QUERIES=16,
        NORMS=True, LOGITS=False, BY_HEAD=False, MEAN=False, OVER_ROW=False, CAPPED=False, UPCAST=upcast(),
    )  # fmt: skip


def mean_key_similarity(keys: Keys, takes_part: Mask, *, unit_mean: bool = False) -> Scores:
    """As `kvpolicy.ops.mean_key_similarity`. Raises ValueError when arguments do not fit together."""
    served.require(served.mean_key_similarity(keys, takes_part))
    arguments.mean_key_similarity(keys, takes_part)
    out = torch.empty(keys.shape[:3], dtype=torch.float32, device=keys.device)
    if out.numel() == 0:
        return out
    for part in batches(keys.shape[0], Norms.bytes_each(keys)):
        norms = Norms.like(keys[part])
        scan(keys[part], takes_part[part], norms)
        total, oldest, number = _folded(norms, keys.shape[3])
        sums = _column_sums(keys[part], norms, total, oldest, threshold=1.0, beta=0, itself=True)
        share = number.clamp(min=1)
        if unit_mean:
            share = torch.linalg.vector_norm(total, dim=-1).clamp_(min=1e-12 * share)
        torch.div(sums, share.unsqueeze(-1), out=out[part].view(sums.shape))
    return out


def _folded(norms: Norms, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each head, the sum of its unit keys, the oldest key that takes part and how many do."""
    rows, tiles = norms.first.shape
    width, parts = parts_of(dim)
    device = norms.first.device
    total = torch.empty(rows, dim, dtype=torch.float32, device=device)
    oldest = torch.empty(rows, dtype=torch.int32, device=device)
    number = torch.empty_like(oldest)
    launch(
        "similarity.fold_sums", rows, norms.partial, norms.first, norms.held, total, oldest, number, tiles,
        D=width, PARTS=parts, BLOCK=padded(min(tiles, 32)),
    )  # fmt: skip
    return total, oldest, number


def _column_sums(
    keys: Keys, norms: Norms, total: Tensor, oldest: Tensor, *,
    threshold: float, beta: int, own: bool = False, index_zero: bool = False, itself: bool = False,
) -> Tensor:  # fmt: skip
    """Return fp32 `[R, N]`, column sums of cosines; what exempted pairs take from them stands in `norms.lost`."""
    _, heads, n, dim = keys.shape
    rows, tiles = norms.first.shape
    width, parts = parts_of(dim)
    base = torch.empty(rows, n, dtype=torch.float32, device=keys.device)
    launch(
        "similarity.exempt", rows * tiles,
        keys, *keys.stride()[:3], norms.inverse, total, oldest, base, norms.lost, threshold, n, heads,
        D=width, PARTS=parts, TILE=TILE, BETA=beta, OWN=own, INDEX_ZERO=index_zero, ITSELF=itself, UPCAST=upcast(),
        warps=4 if parts > 1 and width < 64 else 8,
    )  # fmt: skip
    return base


def _reduced(
    keys: Keys, mask: Mask, norms: Norms, out: Tensor,
    threshold: float, beta: int, own: bool, index_zero: bool, softmax: bool,
) -> None:  # fmt: skip
    _, heads, n, dim = keys.shape
    total, oldest, number = _folded(norms, dim)
    base = _column_sums(keys, norms, total, oldest, threshold=threshold, beta=beta, own=own, index_zero=index_zero)
    launch(
        "similarity.finish_redundancy", len(base),
        base, norms.lost, as_bytes(mask), *mask.stride(), number, out, n, heads,
        BLOCK=1024, LOST=beta > 0 and not own, SOFTMAX=softmax,
    )  # fmt: skip
