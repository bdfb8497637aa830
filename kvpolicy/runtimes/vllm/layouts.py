"""Where one layer's keys and values lie in vLLM's cache, as views `[blocks, block, H, D]` that a paged store takes.

vLLM hands a layer its cache as one tensor of the logical shape `[blocks, H, block, Dk + Dv]`; what order it has in
memory (`KVCacheLayout`: NHD, HND, layers inside blocks) is in its strides, which views keep. What a backend's kernels
put *into* the last two axes is their own affair: FlashAttention, Triton and FlashInfer a token's key and then its
value, the CPU kernels the keys of a block transposed and then its values. Both are plain strides again, so nothing is
ever copied.

Blocks are those of the backend's kernels: where these are smaller than the blocks of vLLM's manager, so are the pages.

Only the CPU backend has been run. The others are written against the shapes in vLLM's sources and tested on CPU tensors
of those shapes (not run on a GPU); `probe` checks at start-up, through the backend's own write, that they hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvpolicy.errors import UnsupportedError

TOKEN_BY_TOKEN = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
"""Backends whose kernels keep a token's key and then its value."""
TRANSPOSED_KEYS = ("CPU_ATTN",)
"""Backends whose kernels keep a block's keys as `[D, block]` and then its values as `[block, D]`."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pages(backend: str, cache: Tensor, heads: int, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """Return one layer's keys `[blocks, block, H, Dk]` and values `[blocks, block, H, Dv]`: views, to read and write.

    Args:
        backend: the name of vLLM's attention backend (`AttentionBackend.get_name()`).
        cache: the layer's cache `[blocks, H, block, Dk + Dv]`, in any order in memory.
        heads: KV heads of this rank, `H`.
        key_dim: `Dk`.
        value_dim: `Dv`.

    Raises:
        UnsupportedError: another backend, entries that are quantised or packed with scales, or an order in memory that
            the CPU kernels do not have.
    """
    if backend not in TOKEN_BY_TOKEN + TRANSPOSED_KEYS:
        known = ", ".join(TRANSPOSED_KEYS + TOKEN_BY_TOKEN)
        raise UnsupportedError(
            f"attention backend {backend}: how it keeps keys and values is not known here; choose one of {known} with "
            "--attention-backend."
        )
    if cache.dtype not in _DTYPES:
        raise UnsupportedError(
            f"attention backend {backend}: entries of {str(cache.dtype).removeprefix('torch.')} are quantised and "
            "cannot be scored; leave --kv-cache-dtype at auto."
        )
    if cache.dim() != 4 or (cache.shape[1], cache.shape[3]) != (heads, key_dim + value_dim):
        raise UnsupportedError(
            f"attention backend {backend}: a layer's cache has the shape {list(cache.shape)} instead of "
            f"[blocks, {heads}, block, {key_dim + value_dim}], so it is packed in another way; leave --kv-cache-dtype "
            "at auto."
        )
    if backend in TOKEN_BY_TOKEN:
        keys, values = cache.transpose(1, 2).split([key_dim, value_dim], dim=-1)
        return keys, values
    blocks, _, block, both = cache.shape
    if key_dim != value_dim or cache.stride()[1:] != (block * both, both, 1):
        raise UnsupportedError(
            f"attention backend {backend}: a block lies in memory with strides {list(cache.stride()[1:])} and heads of "
            f"{key_dim} and {value_dim}, not as its kernels read it; leave VLLM_KV_CACHE_LAYOUT unset."
        )
    halves = cache.view(blocks, heads, 2 * block, key_dim)
    keys = halves[:, :, :block].view(blocks, heads, key_dim, block)
    return keys.permute(0, 3, 1, 2), halves[:, :, block:].transpose(1, 2)


def probe(backend: str, keys: Tensor, values: Tensor, write: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Check pages against the backend itself: what it writes to some slots must be read there, and nowhere else.

    Kernels choose how they pack a block by processor and dtype (AMX has another way, for one), and no shape says so.
    Block 0 is written, which vLLM never gives to a request, and put back as it was.

    Args:
        backend: its name, for the message.
        keys, values: what `pages` returned.
        write: stores keys `[T, H, Dk]` and values `[T, H, Dv]` at slots `[T]` (int64), as a forward pass does.

    Raises:
        UnsupportedError: something else is read than was written.
    """
    before = keys[0].clone(), values[0].clone()
    drawn = torch.Generator().manual_seed(0)
    wanted = [torch.randint(-120, 120, page[0].shape, generator=drawn).to(page) for page in (keys, values)]
    # Every second slot: a kernel that packs pairs of tokens would hide in blocks that are written whole.
    slots = torch.arange(0, keys.shape[1], 2, device=keys.device)
    keys[0], values[0] = 0, 0
    write(wanted[0][slots], wanted[1][slots], slots)
    for page, all_written in zip((keys, values), wanted, strict=True):
        all_written[1::2] = 0
        if not torch.equal(page[0], all_written):
            raise UnsupportedError(
                f"attention backend {backend}: its kernels do not keep {str(keys.dtype).removeprefix('torch.')} "
                "entries on this processor as is known here; serve with another --dtype (float32, say) or another "
                "--attention-backend."
            )
    keys[0], values[0] = before
