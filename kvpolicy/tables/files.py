"""Calibration tables: what a method has measured on a model beforehand, as a file that says how it was made.

A table is a safetensors file whose metadata name the kind of table, the model and its shape, the method and the
command. `kvpolicy calibrate` makes them; components name one in a parameter of type ``Annotated[str, TableOf(kind)]``.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from torch import Tensor

from kvpolicy.errors import TableError, UnknownComponentError
from kvpolicy.inputs import expanded, read_bytes
from kvpolicy.loading import installed
from kvpolicy.outputs import replace_file
from kvpolicy.tables.gates import published_gates
from kvpolicy.tables.kinds import KINDS, OPTIONAL, checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvpolicy.contracts.components import Component
    from kvpolicy.contracts.heads import HeadSpan
    from kvpolicy.contracts.view import CacheView

FORMAT_VERSION: Final = 1
SUFFIX: Final = ".safetensors"
MAX_BYTES: Final = 1 << 30
"""Larger files are refused; the gates of a 32-billion-parameter model have 340 MiB, other tables a few."""

_SETTLED_NS: Final = 2_000_000_000


@dataclass(frozen=True, eq=False)
class Table:
    """A calibration table, checked.

    Attributes:
        kind: one of `KINDS`.
        model: the model it was measured on.
        method: name of the calibration.
        num_layers, num_kv_heads, head_dim: shape of that model; `head_dim` 0 where it is not known.
        tensors: fp32 on the CPU, by name, with the axes of `KINDS`.
        command: the command that made it.
        source: the file it was read from; empty for one made in Python.
        notes: further metadata, such as the text it was measured on.
    """

    kind: str
    model: str
    method: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tensors: Mapping[str, Tensor] = field(repr=False)
    command: str = ""
    source: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    _elsewhere: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = {"L": self.num_layers, "H": self.num_kv_heads, "D": self.head_dim}
        object.__setattr__(self, "tensors", checked(self.kind, self.called, sizes, self.tensors, self.notes))

    @property
    def hidden_size(self) -> int:
        """The hidden size of that model, where the table says; 0 where it does not."""
        first = self.tensors.get("hidden0_weight", self.tensors.get("output_weight"))
        return 0 if first is None else first.shape[-1]

    def check_model(
        self, num_layers: int, num_kv_heads: int, head_dim: int | None = None, hidden_size: int | None = None
    ) -> None:
        """Raise TableError when the table is not of a model of this shape, as far as both are known."""
        mine, asked = [self.num_layers, self.num_kv_heads], [num_layers, num_kv_heads]
        words = "layers, KV heads"
        for name, own, theirs in (
            ("head dim", self.head_dim, head_dim),
            ("hidden size", self.hidden_size, hidden_size),
        ):
            if own and theirs is not None:
                mine, asked, words = [*mine, own], [*asked, theirs], f"{words}, {name}"
        if mine != asked:
            raise TableError(
                f"table {self.called}: was measured on {self.model} ({words}: {_numbers(mine)}) and does not fit a "
                f"model of {_numbers(asked)}; make one with `kvpolicy calibrate {self.method} --model ... --text ... "
                "--out mine.safetensors` and name its file in the policy, in place of that table."
            )

    def layer(self, name: str, view: CacheView) -> Tensor:
        """Return the view's layer and heads of a tensor, on its device, fp32 `[H, ...]`; raises as `check_model`."""
        heads = view.head_span
        self.check_model(view.num_layers, heads.total, view.keys.shape[-1])
        return heads.of(self._on(name, view.device)[view.layer_idx])

    def of_layer(self, layer_idx: int, heads: HeadSpan, hidden_size: int, device: torch.device) -> dict[str, Tensor]:
        """Return one layer of every tensor, some heads of those that have heads, fp32 by name.

        Args:
            layer_idx: index of the layer.
            heads: which heads.
            hidden_size: of the model.
            device: where they are wanted.
        """
        self.check_model(self.num_layers, heads.total, None, hidden_size)
        axes = {**KINDS[self.kind], **OPTIONAL.get(self.kind, {})}
        layer = {name: self._on(name, device)[layer_idx] for name in self.tensors}
        return {name: heads.of(each) if axes[name].startswith("L H") else each for name, each in layer.items()}

    def rows(
        self, name: str, layers: Sequence[int], num_layers: int, num_kv_heads: int, device: torch.device
    ) -> Tensor:
        """Return some layers of a tensor, all heads, fp32 `[len(layers), H, ...]`; raises as `check_model`.

        For ``kept`` of ``head_curves`` the result is `[P, len(layers), H]`.
        """
        self.check_model(num_layers, num_kv_heads)
        tensor = self._on(name, device)
        return tensor[:, list(layers)] if KINDS[self.kind][name].startswith("P ") else tensor[list(layers)]

    @property
    def called(self) -> str:
        """What messages call it: its file, or its method."""
        return repr(self.source or self.method)

    def _on(self, name: str, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self.tensors[name]
        if (name, device) not in self._elsewhere:
            self._elsewhere[name, device] = self.tensors[name].to(device)
        return self._elsewhere[name, device]


@dataclass(frozen=True)
class TableOf:
    """Marks a text parameter of a component as the name of a table: ``table: Annotated[str, TableOf("head_scores")]``.

    The table is read when the component is made, so that a specification with a missing, uniform or damaged one is
    refused; in JSON schemas the installed tables of the kind are examples.
    """

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is not a kind of table; the kinds are {', '.join(KINDS)}.")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler(schema)
        names = [name for name, table in registered() if isinstance(table, Table) and table.kind == self.kind]
        return {**described, **({"examples": names} if names else {})}

    def _checked(self, name: str) -> str:
        try:
            load_table(name, self.kind)
        except (TableError, UnknownComponentError) as error:
            raise PydanticCustomError("table", "{message}", {"message": str(error)}) from None
        return name


def load_table(name_or_path: str | os.PathLike[str], kind: str) -> Table:
    """Return a table; read again only when its file has changed.

    Args:
        name_or_path: a registered name such as ``smollm2-135m/headkv``, or the path of a file (what ends in
            ``.safetensors`` or is an `os.PathLike`), relative to the working directory.
        kind: one of `KINDS`.

    Raises:
        UnknownComponentError: no table has that name.
        TableError: the file is missing, not a table, of another kind or format version, uniform, or not finite.
    """
    supplier = _supplier.get()
    supplied = supplier(os.fspath(name_or_path), kind) if supplier is not None else None
    table = supplied if supplied is not None else _read(_find(name_or_path))
    if table.kind != kind:
        raise TableError(
            f"table {str(name_or_path)!r}: is of kind {table.kind!r} (made by {table.method}), but {kind!r} is needed "
            "here; name another table."
        )
    return table


def registered() -> Iterator[tuple[str, Table | TableError]]:
    """Yield the registered tables by name, each read, or the error that says what is wrong with it."""
    for entry in installed.catalog().tables():
        try:
            yield entry.name, _read(entry.value)
        except TableError as error:
            yield entry.name, error


def of_component(component: Component) -> Iterator[Table]:
    """Yield the tables that the parameters of a component name."""
    for name, info in type(component).model_fields.items():
        value = getattr(component, name)
        for mark in info.metadata:
            if isinstance(mark, TableOf) and isinstance(value, str):
                yield load_table(value, mark.kind)


def check_fit(
    components: Iterable[Component],
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    hidden_size: int | None = None,
) -> None:
    """Raise TableError when a table that one of the components names is not of a model of this shape."""
    for component in components:
        for table in of_component(component):
            table.check_model(num_layers, num_kv_heads, head_dim, hidden_size)


def save_table(table: Table, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
    """Write a table; raises TableError when that is not possible.

    Args:
        table: what to write.
        path: a file that ends in ``.safetensors``; its folder must exist.
        dtype: of the numbers in the file; they are fp32 again when it is read.
    """
    from safetensors.torch import save

    target = Path(path)
    if target.suffix != SUFFIX:
        raise TableError(f"{target}: a table's file ends in {SUFFIX}; name it so.")
    shape = {"num_layers": table.num_layers, "num_kv_heads": table.num_kv_heads, "head_dim": table.head_dim}
    metadata = {
        **table.notes,
        "kvpolicy_table": str(FORMAT_VERSION),
        **{name: getattr(table, name) for name in ("kind", "model", "method", "command")},
        **{name: str(number) for name, number in shape.items()},
    }
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in table.tensors.items()}
    replace_file(target, save(tensors, metadata=metadata), error=TableError)


@contextmanager
def supplying(supplier: Callable[[str, str], Table | None]) -> Iterator[None]:
    """Ask `supplier(name, kind)` for tables first, inside the block and this context; for tests."""
    token = _supplier.set(supplier)
    try:
        yield
    finally:
        _supplier.reset(token)


_supplier: ContextVar[Callable[[str, str], Table | None] | None] = ContextVar("kvpolicy_tables", default=None)


@dataclass(frozen=True)
class _Read:
    """A table that was read: the hash of its file, and what the system says of the file, if it can be trusted."""

    table: Table
    digest: bytes
    stamp: tuple[int, ...] | None


_cache: dict[Path, _Read] = {}


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    text = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or text.endswith(SUFFIX):
        return expanded(text)
    catalog = installed.catalog()
    entry = catalog.table(text)
    if entry is None:
        raise catalog.unknown("table", text, [each.name for each in catalog.tables()])
    path: Path = entry.value
    return path


def _read(path: Path) -> Table:
    try:
        status = path.stat()
    except (OSError, ValueError):
        raise TableError(f"table {str(path)!r}: there is no such file; make it with `kvpolicy calibrate`.") from None
    # Size and time of modification can be set; the time of change cannot, but it ticks: what was changed just now may
    # change again within the same tick.
    stamp = (status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size)
    known = _cache.get(path)
    if known is not None and known.stamp == stamp:
        return known.table
    settled = time.time_ns() - status.st_ctime_ns > _SETTLED_NS
    raw = read_bytes(path, "table", most=MAX_BYTES, option="table", error=TableError)
    digest = hashlib.sha256(raw).digest()
    table = known.table if known is not None and known.digest == digest else _parsed(path, raw)
    _cache[path] = _Read(table, digest, stamp if settled else None)
    return table


def _parsed(path: Path, raw: bytes) -> Table:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise TableError(f"table {str(path)!r}: is not a readable safetensors file ({error}).") from None
    metadata: dict[str, str] = header.get("__metadata__") or {}
    version = metadata.pop("kvpolicy_table", None)
    published = published_gates(tensors, path) if version is None else None
    if published is not None:
        return Table(kind="gates", head_dim=0, source=str(path), **published)
    if version is None:
        raise TableError(f"table {str(path)!r}: is not a table of kvpolicy; make one with `kvpolicy calibrate`.")
    if version != str(FORMAT_VERSION):
        raise TableError(
            f"table {str(path)!r}: has format version {version[:20]!r} and this kvpolicy reads "
            f"{FORMAT_VERSION}; make it again with `kvpolicy calibrate`."
        )
    try:
        words: dict[str, Any] = {name: metadata.pop(name) for name in ("kind", "model", "method", "command")}
        shape: dict[str, Any] = {name: int(metadata.pop(name)) for name in ("num_layers", "num_kv_heads", "head_dim")}
    except (KeyError, ValueError) as error:
        raise TableError(f"table {str(path)!r}: its metadata are damaged ({error}); make it again.") from None
    return Table(**words, **shape, tensors=tensors, source=str(path), notes=metadata)


def _numbers(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
