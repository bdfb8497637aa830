"""The attention implementations that a model may have, and what each is given in place of a mask.

- sdpa and eager take a mask over the slots.
- Flash attention knows no mask: tokens see what precedes them, aligned at the end, in sequences of their own lengths.
  Rows that are alike are such a batch as they are; others are packed, without their padding and unused slots.
- flex attention takes the mask as blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask, lazy_import_flash_attention

from kvpolicy.cache.plan import Forward
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.handover import AttentionFunction

Output = tuple[Tensor, Tensor | None]
Packed = tuple[Tensor, Tensor, dict[str, Any]]
_PACKING = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What would tell a flash attention that a row holds several texts, which no row of a cache does."""


def family(base: str) -> str:
    """Return ``sdpa``, ``eager``, ``flash`` or ``flex`` for the name of an implementation.

    Raises:
        UnsupportedError: what it computes is not known, or it brings a cache of its own.
    """
    if base in ("sdpa", "eager"):
        return base
    if base.startswith("paged|"):
        raise UnsupportedError(
            f"attention implementation {base!r} is that of continuous batching, which has a paged cache of its own; "
            "load the model with attn_implementation='sdpa', or see docs/serving.md for engines with paged caches."
        )
    known: Any = AttentionInterface()
    function = known.get(base)
    if function is flash_attention_forward:
        return "flash"
    if function is flex_attention_forward:
        return "flex"
    raise UnsupportedError(
        f"attention implementation {base!r} is not supported: nothing is known of how it masks; load the model with "
        "attn_implementation='sdpa', 'eager', 'flash_attention_2', 'flash_attention_3' or 'flex_attention'."
    )


class AsLoaded:
    """An attention module to a flash attention, which looks for its kernel by the name in the module's configuration.

    Args:
        module: the module.
        base: the name that stood in its configuration before a cache was attached.
    """

    def __init__(self, module: nn.Module, base: str) -> None:
        self._module = module
        self._base = base

    @property
    def config(self) -> AsLoaded:
        """The module's configuration, seen in the same way."""
        return AsLoaded(self._module.config, self._base)  # type: ignore[arg-type]

    @property
    def _attn_implementation(self) -> str:
        return self._base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def as_loaded(function: AttentionFunction, module: nn.Module, base: str) -> Any:
    """Return a module as its own attention function must see it."""
    return AsLoaded(module, base) if function is flash_attention_forward else module


def check_served(base: str, query: Tensor, kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedError if an implementation would leave out what a model asks for."""
    kind = family(base)
    if kind == "eager":
        return
    if kind != "sdpa" and kwargs.get("sliding_window") is not None:
        raise UnsupportedError(
            f"attention implementation {base!r} would count a window in slots that are no longer neighbours; load the "
            "model with attn_implementation='sdpa'."
        )
    wanted = {"softcap": kwargs.get("softcap") is not None, "s_aux": kwargs.get("s_aux") is not None}
    if kind == "sdpa":
        served = dict.fromkeys(wanted, False)  # before transformers 5.23 or so without a word
    elif kind == "flex":
        served = {"softcap": True, "s_aux": not query.is_cpu}
    else:
        _, process = lazy_import_flash_attention(base)
        first: Any = process[0] if isinstance(process, tuple) else process
        said = getattr(first, "keywords", {}).get("supports_mapping", {})
        served = {"softcap": bool(said.get("softcap")), "s_aux": bool(said.get("s_aux") or said.get("learnable_sink"))}
    names = {"softcap": "caps its logits", "s_aux": "has attention sinks"}
    if lost := [name for name in wanted if wanted[name] and not served[name]]:
        raise UnsupportedError(
            f"this model {names[lost[0]]}, which attention implementation {base!r} leaves out here; load the model "
            "with attn_implementation='eager'."
        )


def attend(
    function: AttentionFunction,
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    forward: Forward,
    kwargs: dict[str, Any],
) -> Output:
    """Run a model's attention function over the slots in use, so that each token sees what its row holds before it.

    Args:
        function: of the model's own implementation.
        base: its name.
        module: the attention module.
        query: `[B, Hq, q, D]`, turned as the keys are.
        key, value: `[B, H, N, D]` and `[B, H, N, Dv]`.
        mask: the model's own, where it is not simply causal; None otherwise.
        forward: the pass; of its tokens the last `q` are asked for.
        kwargs: what the model calls its attention with.

    Raises:
        UnsupportedError: the implementation cannot compute that.
    """
    kind = family(base)
    if kind == "flash":
        return _flash(function, base, module, query, key, value, mask, forward, kwargs)
    if mask is None:
        mask = last(forward.mask_on(key.device, explicit=kind != "sdpa"), query)
        if kind == "eager":
            mask = additive(mask, query.dtype)
    return function(module, query, key, value, blocks(mask) if kind == "flex" else mask, **kwargs)


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Turn a bool mask (True = visible) into what eager attention adds to its logits."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def last(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return the lines of a mask for the last tokens of a pass: a layer without keys of its own may skip the others."""
    return mask if mask is None or mask.shape[2] == query.shape[2] else mask[:, :, -query.shape[2] :]


def blocks(mask: Tensor | None) -> Any:
    """Turn a bool mask `[B, 1, q, N]` (True = visible) into the block mask of flex attention."""
    if mask is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask  # slow to import, and rarely needed

    def visible(row: Tensor, _head: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        return mask[row, 0, token, slot]

    rows, _, tokens, slots = mask.shape
    return create_block_mask(visible, rows, None, tokens, slots, device=str(mask.device))


def _flash(
    function: AttentionFunction,
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    forward: Forward,
    kwargs: dict[str, Any],
) -> Output:
    if mask is not None:
        raise UnsupportedError(
            f"this model asks for a mask that is not simply causal, which attention implementation {base!r} does not "
            "know; load the model with attn_implementation='sdpa'."
        )
    alone = {name: each for name, each in kwargs.items() if name not in _PACKING}
    seen, tokens = as_loaded(function, module, base), query.shape[2]
    if flash_attn_supports_top_left_mask() and 1 < tokens < key.shape[2]:
        raise UnsupportedError(
            f"this version of attention implementation {base!r} aligns several tokens with the beginning of what they "
            "see, not with its end; install flash-attn 2.1 or newer."
        )
    # Rows that are alike bring the same plan, and their tokens are the last of what they see.
    if forward.plan.row is None:
        return function(seen, query, key, value, None, **alone)
    at, slots, lengths = _packed(forward, tokens, key.shape[2], key.device)
    packed = [
        tensor.transpose(1, 2).flatten(0, 1).index_select(0, index).transpose(0, 1)[None]
        for tensor, index in ((query, at), (key, slots), (value, slots))
    ]
    made, _ = function(seen, *packed, None, **alone, **lengths)
    output = made.new_zeros(query.shape[0] * tokens, *made.shape[2:]).index_copy_(0, at, made[0])
    return output.unflatten(0, (query.shape[0], tokens)), None


def _packed(forward: Forward, tokens: int, slots: int, device: torch.device) -> Packed:
    """Return where tokens and entries lie that are no padding, and the lengths of rows, for flash attention.

    All of it follows from what the host knows of the pass; it is copied to the device once.

    Args:
        forward: the pass, whose rows differ.
        tokens: how many of its last columns are asked for.
        slots: slots of the longest row.
        device: where the attention runs.

    Returns:
        int64 `[T]` into `[B * tokens]`, int64 `[S]` into `[B * slots]`, and transformers' arguments for packed rows.
    """
    found: Packed | None = forward.packed.get((device, tokens))
    if found is not None:
        return found
    row, column, visible = forward.plan.row, forward.plan.column, forward.visible
    assert row is not None
    assert column is not None
    assert visible is not None
    early = forward.columns - tokens
    row, column = row[column >= early], column[column >= early] - early
    counts = torch.bincount(row, minlength=visible.shape[0])
    ends = torch.where(counts > 0, visible[:, -1], 0)  # a row that brings no token sees nothing
    used = torch.arange(slots) < ends[:, None]
    starts = [torch.nn.functional.pad(each.cumsum(0), (1, 0)).to(torch.int32) for each in (counts, ends)]
    lengths = {
        "cu_seq_lens_q": starts[0].to(device), "cu_seq_lens_k": starts[1].to(device),
        "max_length_q": int(counts.max()), "max_length_k": int(ends.max()),
    }  # fmt: skip
    at = (row * tokens + column).to(device), used.flatten().nonzero()[:, 0].to(device)
    made: Packed = (*at, lengths)
    forward.packed[device, tokens] = made
    return made
