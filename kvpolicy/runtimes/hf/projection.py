"""What the projection behind an attention module computes, as a matrix: asked of the layer, not read off a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kvpolicy.errors import UnsupportedError

_NAMES = ("o_proj", "out_proj", "dense", "wo", "c_proj")
_BETWEEN = ("attn_sub_norm", "inner_attn_ln")  # BitNet, for one, normalises what its projection is given
_ROWS = 512  # unit vectors that are projected at a time
_TOLERANCE = 0.05  # of the length: int8 is good to 2 %, and what is not linear is off by far more


def output_projection(module: nn.Module, heads: int, groups: int, like: Tensor) -> Tensor:
    """Return the rows of an attention module's output projection that each query head's values meet.

    The matrix of a plain layer is read. Any other (offloaded, with adapters, quantised, parametrised) is given the unit
    vectors, in evaluation mode, and what it makes of zeros is subtracted.

    Args:
        module: the attention module.
        heads: KV heads.
        groups: query heads per KV head.
        like: values `[B, H, N, Dv]`, on the device and in the dtype that the layer computes in.

    Returns:
        `[H, G, Dv, M]`; a view of the weight where that is what the layer multiplies with.

    Raises:
        UnsupportedError: there is no such layer, it cannot be asked, or it is not linear.
    """
    width = like.shape[-1]
    name, layer = _find(module, heads * groups * width)
    matrix = _plain(layer)
    if matrix is None:
        matrix = _asked(layer, heads * groups * width, like, f"{type(module).__name__}.{name}")
    rows: Tensor = matrix.unflatten(0, (heads, groups, width))
    return rows


def _find(module: nn.Module, width: int) -> tuple[str, nn.Module]:
    kind = type(module).__name__
    between = next((name for name in _BETWEEN if getattr(module, name, None) is not None), None)
    if between is not None:
        raise UnsupportedError(
            f"{kind} normalises its heads together ({between}) before it projects them, so what a single value does to "
            "the output has no answer; choose a policy without the need `weights`."
        )
    for name in _NAMES:
        layer = getattr(module, name, None)
        if isinstance(layer, nn.Module):
            found = getattr(layer, "in_features", None) or getattr(layer, "nx", None)
            if found is None or found == width:
                return name, layer
    raise UnsupportedError(
        f"{kind} has no output projection of width {width} that could be asked; choose a policy without the need "
        "`weights`."
    )


def _plain(layer: nn.Module) -> Tensor | None:
    """Return the matrix `[width, M]` of a layer that does nothing but multiply with it, or None."""
    patched = "forward" in vars(layer)  # as accelerate does to load weights on the way
    if patched or type(layer) not in (nn.Linear, Conv1D):
        return None
    weight = layer.weight
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
        return None  # a tensor of another kind: quantised, or a part of one that lies on several devices
    # With tensor parallelism hooks add up the outputs of all ranks; the part that lies here is that of the heads here.
    hooked = bool(layer._forward_hooks or layer._forward_pre_hooks) and not hasattr(layer, "_hf_tp_plan")
    if hooked or weight.device.type == "meta" or not weight.is_floating_point() or weight.dim() != 2:
        return None
    return weight.detach().T if type(layer) is nn.Linear else weight.detach()


@torch.no_grad()
def _asked(layer: nn.Module, width: int, like: Tensor, name: str) -> Tensor:
    """Return what a layer makes of the unit vectors, `[width, M]`; checked with a vector that is none of them."""
    if getattr(layer, "_hf_tp_plan", None) is not None:
        raise UnsupportedError(
            f"{name} is spread over several devices in a way that cannot be asked for its matrix; choose a policy "
            "without the need `weights`, or load the model without tensor parallelism."
        )

    def project(rows: Tensor) -> Tensor:
        made: Tensor = layer(rows.to(like.dtype)[None])[0]
        return made.to(like.device, torch.float32)

    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, width, generator=generator).to(like.device, like.dtype).float()
    try:
        with _evaluating(layer):
            nothing = project(torch.zeros(1, width, device=like.device))
            parts = []
            for start in range(0, width, _ROWS):
                unit = torch.zeros(min(_ROWS, width - start), width, device=like.device)
                unit[:, start:].fill_diagonal_(1.0)
                parts.append((project(unit) - nothing).to(like.dtype))
            matrix, expected = torch.cat(parts), project(probe) - nothing
    except Exception as error:
        raise UnsupportedError(
            f"{name}, a {type(layer).__name__}, cannot be asked what it computes ({type(error).__name__}); choose a "
            "policy without the need `weights`."
        ) from error
    off = torch.linalg.vector_norm(probe @ matrix.float() - expected)
    if not bool(off <= _TOLERANCE * torch.linalg.vector_norm(expected)):
        raise UnsupportedError(
            f"{name}, a {type(layer).__name__}, is no linear map of its input, so there is no output projection; "
            "choose a policy without the need `weights`."
        )
    return matrix


@contextmanager
def _evaluating(layer: nn.Module) -> Iterator[None]:
    """Switch dropout off in a layer and everything in it."""
    before = [(each, each.training) for each in layer.modules()]
    layer.eval()
    try:
        yield
    finally:
        for each, training in before:
            each.training = training
