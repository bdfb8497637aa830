"""The kinds of calibration tables: their tensors, and what is wrong with some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from kvpolicy.errors import TableError
from kvpolicy.tables.gates import gate_problem

KINDS: Final[Mapping[str, Mapping[str, str]]] = {
    "head_scores": {"scores": "L H"},
    "head_curves": {"fractions": "P", "kept": "P L H"},
    "query_filters": {"filters": "L H D"},
    "query_frequencies": {"mean": "L H G F 2", "magnitude": "L H G F"},
    "gates": {"output_weight": "L H W", "output_bias": "L H"},
}
"""Kind -> tensors and their axes: P points, F = half the rotated dimensions, the other letters as in `CacheView`.

``head_scores``: how much each KV head gains from a large budget, >= 0. ``head_curves``: the share of its entries that
each head keeps when all keep `fractions` on average. ``query_filters``: a direction in each head's rotated key space;
keys along it are attended to. ``query_frequencies``: for each query head and rotary frequency the mean of the
un-rotated queries as a complex number (real, imaginary) and the mean of their magnitudes. ``gates``: the last linear
map of a gate on each layer's hidden states, the metadata say with which activation and what its number means; see
`kvpolicy.tables.gates`.
"""

OPTIONAL: Final[Mapping[str, Mapping[str, str]]] = {
    "gates": {"hidden0_weight": "L W E", "hidden0_bias": "L W", "hidden1_weight": "L W W", "hidden1_bias": "L W"},
}
"""Kind -> tensors that may be there: the maps before the last of a gate, W numbers wide; E is the hidden size."""

_SIGNED: Final = frozenset({"filters", "mean", *KINDS["gates"], *OPTIONAL["gates"]})


def checked(
    kind: str, called: str, sizes: Mapping[str, int], given: Mapping[str, Tensor], notes: Mapping[str, str]
) -> Mapping[str, Tensor]:
    """Return the tensors of a table in fp32 on the CPU.

    Args:
        kind: one of `KINDS`.
        called: what messages call the table.
        sizes: of the axes that it declares, by letter.
        given: its tensors.
        notes: its further metadata.

    Raises:
        TableError: a component could not use it.
    """
    tensors: dict[str, Tensor] = {}
    problem = next(_wrong_shapes(kind, sizes, given), None)
    if problem is None:
        tensors = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in given.items()}
        problem = next(_wrong_numbers(kind, tensors), None)
    if problem is None and kind == "gates":
        problem = gate_problem(tensors, notes)
    if problem is None and _uniform(kind, sizes["L"] * sizes["H"], given):
        problem = "is uniform: it says the same of every head, which is no information; measure again."
    if problem is not None:
        raise TableError(f"table {called}: {problem}")
    return MappingProxyType(tensors)


def _wrong_shapes(kind: str, declared: Mapping[str, int], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    if kind not in KINDS:
        yield f"{kind!r} is not a kind of table; the kinds are {', '.join(KINDS)}."
        return
    axes, optional = KINDS[kind], OPTIONAL.get(kind, {})
    if not set(axes) <= set(tensors) <= {*axes, *optional}:
        wanted = ", ".join(axes) + (f" and perhaps {', '.join(optional)}" if optional else "")
        yield f"has the tensors {', '.join(sorted(tensors))}; a {kind} has {wanted}."
        return
    sizes = {**declared, "2": 2}
    for name, letters in {**axes, **optional}.items():
        if name not in tensors:
            continue
        tensor, names = tensors[name], letters.split()
        if not tensor.is_floating_point() or tensor.dim() != len(names) or tensor.numel() == 0:
            yield f"{name} should be floating-point numbers [{letters}], got {_shown(tensor)}."
            return
        for axis, size in zip(names, tensor.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                yield f"{name} should be [{letters}] with {axis} = {sizes[axis]}, got {_shown(tensor)}."


def _wrong_numbers(kind: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            yield f"{name} holds NaN or infinity; make it again with `kvpolicy calibrate`."
        if name not in _SIGNED and (tensor < 0).any():
            yield f"{name} holds negative numbers, which make no sense there."
    if kind == "query_filters" and not tensors["filters"].any(-1).all():
        yield "a head has a filter of zeros, which is no direction; measure again."
    if kind == "head_curves":
        fractions, kept = tensors["fractions"], tensors["kept"]
        if not bool((fractions.diff() > 0).all()) or not 0 < float(fractions[0]) <= float(fractions[-1]) <= 1:
            yield "fractions should rise, all above 0 and at most 1."
        if float(kept.max()) > 1 or float((kept.mean((1, 2)) - fractions).abs().max()) > 1e-3:
            yield "kept should be at most 1, and fractions its mean over layers and heads."


def _uniform(kind: str, count: int, tensors: Mapping[str, Tensor]) -> bool:
    """Whether all heads of all layers (at every point of a curve) have the same entries, or none but zeros."""
    if count == 1:
        return not any(bool(tensor.any()) for tensor in tensors.values())
    for name, letters in KINDS[kind].items():
        if "H" not in letters.split():
            continue
        tensor = tensors[name]
        heads = tensor.flatten(-2) if letters.startswith("P ") else tensor.flatten(0, 1).reshape(count, -1).T
        if bool((heads != heads[..., :1]).any()):
            return False
    return True


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
