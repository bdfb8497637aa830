"""Counts how often the host waits for a device, on a machine that has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from traceback import extract_stack
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ASKS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
"""Methods of a tensor after which the host knows something of its content."""
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique", "aten::_unique2")
"""Operators that wait for a device although no method of a tensor is called."""


@dataclass
class Reads:
    """What was read inside the block.

    Attributes:
        made: the methods and operators that did it, in order.
        places: the file and function of each, of the first caller outside of torch.
    """

    made: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def note(self, name: str) -> None:
        """Take a read by the method or operator `name`."""
        stack = [f for f in extract_stack() if f.filename != __file__ and "/torch/" not in f.filename]
        self.made.append(name)
        self.places.append(f"{Path(stack[-1].filename).name}:{stack[-1].name}")


@contextmanager
def counting_reads() -> Iterator[Reads]:
    """Count reads of tensors; every tensor counts as one that lies on an accelerator, until it has been read.

    All ways from a tensor's content to the host go through one of the methods in `_ASKS`, through `Tensor.to` with the
    word ``"cpu"`` (moving to the device of another tensor is none), or (a mask as an index, `masked_select`) through an
    operator in `_WAITS`. On a CPU such a method may end in no operator at all (`tolist`, ``.to("cpu")``), so both are
    watched: the methods by patches, the operators by a dispatch mode. What a read returns lies on the host, like all
    that is computed from such tensors alone, and reading it again costs nothing; their storages are remembered.
    """
    reads = Reads()
    inside = 0
    host: dict[int, Any] = {}  # storages that have been read, kept alive so that no other gets their address

    def on_device(tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() not in host

    def wrapped(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            reads_it = name != "to" or "cpu" in (*args, *kwargs.values())
            if inside == 0 and reads_it and on_device(self):
                reads.note(name)
            inside += 1
            try:
                result = original(self, *args, **kwargs)
            finally:
                inside -= 1
            if reads_it and name in ("to", "cpu"):
                result = result.clone()  # as on an accelerator: another storage than that of the device
                host[result.untyped_storage().data_ptr()] = result
            return result

        method.__name__ = name  # a function mode that is active too asks for it
        return method

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name
            indexed = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
                isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1] if i is not None
            )
            if inside == 0 and (name in _WAITS or indexed) and on_device(args[0]):
                reads.note(name)
            made = func(*args, **(kwargs or {}))
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if given and not any(on_device(t) for t in given):
                host.update(
                    {t.untyped_storage().data_ptr(): t for t in tree_leaves(made) if isinstance(t, torch.Tensor)}
                )
            return made

    with ExitStack() as stack:
        # numpy sorts only what lies on the host.
        stack.enter_context(mock.patch("kvpolicy.ops.order._NUMPY", new=False))
        for name in (*_ASKS, "to"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, wrapped(name)))
        stack.enter_context(Mode())  # type: ignore[no-untyped-call]
        yield reads
