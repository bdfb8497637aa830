"""Which heads of a model are here, and the other ranks, where transformers has split it over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from kvpolicy.cache.ranks import ProcessGroup
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.ranks import ALONE, Ranks
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.model_facts import head_shapes


def parallel_heads(model: PreTrainedModel, layers: Sequence[int]) -> tuple[Ranks, dict[int, HeadSpan]]:
    """Return the ranks of a model under tensor parallelism, and the KV heads of each layer that this one holds.

    Every process makes its caches, runs its passes and reads its caches in the same order as the others, as it does
    with the model itself: compactions whose heads decide together wait for all of them.

    Args:
        model: as ``from_pretrained(..., tp_plan="auto")`` returns it, or any other.
        layers: indices of the layers that a policy works on.

    Returns:
        (ranks, head span by layer); nothing by layer for a model that is whole.

    Raises:
        UnsupportedError: the heads of a layer cannot be split evenly.
    """
    size, mesh = getattr(model, "_tp_size", None) or 1, getattr(model, "_device_mesh", None)
    if size == 1 or mesh is None:
        return ALONE, {}
    tensor: Any = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    rank, spans = tensor.get_local_rank(), {}
    for layer, (total, _) in zip(layers, head_shapes(model, layers), strict=True):
        if total % size:
            raise UnsupportedError(
                f"{type(model).__name__}: the {total} KV heads of layer {layer} cannot be split over {size} ranks; "
                f"use a number of ranks that divides {total}."
            )
        here = total // size
        spans[layer] = HeadSpan(rank * here, here, total)
    return ProcessGroup(tensor.get_group()), spans
