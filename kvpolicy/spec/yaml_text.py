"""YAML in and out: a safe, bounded reader that remembers where everything stands, and a writer that it reads back.

Scalars follow YAML 1.2, so `1e-6` is a number and `no` is text. Aliases, tags and duplicate keys are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import yaml

from kvpolicy.errors import SpecError
from kvpolicy.inputs import read_text

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 32
MAX_NODES: Final = 5_000
MAX_DIGITS: Final = 100
"""Characters of a number; no double and no counter has a third of them."""

What = Literal["policy", "study"]
"""The kinds of files that are read here."""

_LEAST: Final[dict[What, str]] = {
    "policy": "schema_version, policy, budget, trigger and importance",
    "study": "schema_version, kind, study, base, axes and datasets",
}

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of a file down to a value."""


class Mark(NamedTuple):
    """A place in a file; line and column count from 1."""

    source: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"


class Document(NamedTuple):
    """What a YAML file says, and where: the mark of a mapping's entry is that of its key."""

    data: dict[str, Any]
    marks: dict[KeyPath, Mark]


_SCALARS: Final[list[tuple[str, str, str]]] = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"null|Null|NULL|~|", "nN~\0"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
]


class _Loader(yaml.SafeLoader):
    """Composes nodes of YAML 1.2 scalars within the limits above; nothing is constructed by tag."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str, source: str, what: str) -> None:
        super().__init__(text)
        self.name = source
        self.what = what
        self.depth = 0
        self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = _mark(self.name, event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            raise SpecError(
                f"{mark}: aliases such as `*{event.anchor}` are not allowed; write the value out, or use `extends`."
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")[:40]
            raise SpecError(f"{mark}: tags such as `{shown}` are not allowed; write a plain value.")
        if getattr(event, "anchor", None) is not None:
            raise SpecError(
                f"{mark}: anchors such as `&{event.anchor}` are not allowed; write the value out where it is needed."
            )
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise SpecError(f"{mark}: the file has more than {MAX_NODES} values; that is not a {self.what}.")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise SpecError(f"{mark}: nested more than {MAX_DEPTH} levels deep; that is not a {self.what}.")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), [c if c != "\0" else "" for c in _first])


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), [c if c != "\0" else "" for c in _first])


def _represent_text(writer: _Dumper, text: str) -> yaml.ScalarNode:
    # Only double quotes keep line breaks other than \n.
    odd = any(mark in text for mark in "\r\x85\u2028\u2029\ufeff")
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else None)


_Dumper.add_representer(str, _represent_text)


def read_file(path: Path, what: What = "policy") -> str:
    """Return the text of a file; raises SpecError for what is not a readable text file of a sane size."""
    return read_text(path, f"{what} file", most=MAX_BYTES, error=SpecError)


def parse(text: str, source: str, what: What = "policy") -> Document:
    """Read one YAML mapping.

    Args:
        text: the file's content.
        source: what errors call it, usually its path.
        what: the kind of file, for errors.

    Raises:
        SpecError: ``source:line:column: what is wrong`` in one sentence.
    """
    if len(text) > MAX_BYTES:
        raise SpecError(f"{source}: is larger than {MAX_BYTES >> 10} KiB; that is not a {what} file.")
    reader = None
    try:
        reader = _Loader(text, source, what)
        node = reader.get_single_node()
    except yaml.reader.ReaderError as error:
        raise SpecError(
            f"{source}: is not text (character {error.position} is U+{error.character:04X}); give a YAML file."
        ) from None
    except yaml.MarkedYAMLError as error:
        raise SpecError(_syntax(error, source, what)) from None
    finally:
        if reader is not None:
            reader.dispose()
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):
        raise SpecError(f"{source}: is empty; write at least {_LEAST[what]}.")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise SpecError(
            f"{_mark(source, node.start_mark)}: is {kind}; a {what} file is a mapping of `field: value` lines."
        )
    marks: dict[KeyPath, Mark] = {(): _mark(source, node.start_mark)}
    data: dict[str, Any] = _value(node, (), source, marks)
    return Document(data, marks)


def write(data: Mapping[str, Any]) -> str:
    """Return YAML that `parse` reads back to the same data: a line per field, lists of texts as blocks."""
    return "".join(_field(key, value) for key, value in data.items())


def _field(key: str, value: Any) -> str:
    one_line = isinstance(value, dict) or (isinstance(value, list) and not any(isinstance(v, str) for v in value))
    if not one_line:
        return _dump({key: value}, flow=False, width=120)
    return f"{key}: {_dump(value, flow=True, width=math.inf)}"


def _dump(value: Any, *, flow: bool, width: float) -> str:
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=width
    )
    return text


def _value(node: yaml.Node, path: KeyPath, source: str, marks: dict[KeyPath, Mark]) -> Any:
    mark = _mark(source, node.start_mark)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, source, marks)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            marks[*path, index] = _mark(source, item.start_mark)
            items.append(_value(item, (*path, index), source, marks))
        return items
    return _scalar(node, mark)


def _mapping(node: yaml.MappingNode, path: KeyPath, source: str, marks: dict[KeyPath, Mark]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        mark = _mark(source, key_node.start_mark)
        key = _value(key_node, path, source, {})
        if not isinstance(key, str):
            raise SpecError(f"{mark}: the key {str(key)[:40]} is not text; put it in quotes.")
        if key in result:
            raise SpecError(f"{mark}: {key[:60]!r} is given twice, first in line {marks[*path, key].line}; remove one.")
        marks[*path, key] = mark
        result[key] = _value(value_node, (*path, key), source, marks)
    return result


def _scalar(node: yaml.Node, mark: Mark) -> Any:
    text: str = node.value
    kind = node.tag.rsplit(":", 1)[1]
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if len(text) > MAX_DIGITS:
        raise SpecError(f"{mark}: {text[:10]}... is a number of {len(text):,} characters; write at most {MAX_DIGITS}.")
    if kind == "int":
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    return float(re.sub(r"\.(?=[a-z])", "", text.lower()))


def _mark(source: str, mark: yaml.Mark) -> Mark:
    return Mark(source, mark.line + 1, mark.column + 1)


def _syntax(error: yaml.MarkedYAMLError, source: str, what: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = str(_mark(source, mark)) if mark is not None else source
    problem = error.problem or error.context or "it cannot be read"
    if "'\\t'" in problem:
        return f"{place}: not valid YAML, because a tab stands where spaces belong; indent with spaces."
    if "document" in problem or "document" in (error.context or ""):
        return f"{place}: a {what} file holds one document; remove the second `---`."
    context = f" ({error.context})" if error.context else ""
    return f"{place}: not valid YAML: {problem}{context}."
