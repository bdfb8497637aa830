"""YAML in and out: a safe, bounded reader that remembers where everything stands, and a writer that it reads back.

Scalars follow YAML 1.2, so `1e-6` is a number and `no` is text. Aliases, tags and duplicate keys are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
MAX_FAULTS: Final = 50
"""Faults of a file that are named; after as many nothing more is looked for."""

_TAB: Final = "not valid YAML, because a tab stands where spaces belong; indent with spaces."

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


class Fault(NamedTuple):
    """What is not allowed in a file although it can be read on.

    Attributes:
        path: the value that it concerns.
        mark: where it stands.
        message: what is wrong.
        known: whether it is clear what is meant: what else seems wrong with the value is not due to this.
    """

    path: KeyPath
    mark: Mark
    message: str
    known: bool = True

    def __str__(self) -> str:
        return f"{self.mark}: {self.message}"


class Document(NamedTuple):
    """What a YAML file says, and where: the mark of a mapping's entry is that of its key."""

    data: dict[str, Any]
    marks: dict[KeyPath, Mark]
    faults: tuple[Fault, ...] = ()

    @property
    def readable(self) -> dict[str, Any]:
        """The fields of which all is known."""
        unknown = {fault.path[0] for fault in self.faults if fault.path and not fault.known}
        return {field: value for field, value in self.data.items() if field not in unknown}


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
    """Composes nodes of YAML 1.2 scalars within the limits above; nothing is constructed by tag.

    Attributes:
        faults: what is not allowed in the nodes that were composed, without their paths.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str, source: str, what: What) -> None:
        super().__init__(text)
        self.name = source
        self.what = what
        self.depth = 0
        self.nodes = 0
        self.faults: list[Fault] = []

    def compose_one(self) -> yaml.Node | None:
        """Return the node of the first document, None if there is none; a second one is a fault."""
        self.get_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.StreamEndEvent):
            return None
        node: yaml.Node | None = self.compose_document()
        if not self.check_event(yaml.StreamEndEvent):
            second: Any = self.peek_event()  # type: ignore[no-untyped-call]
            self._note(node, second.start_mark, f"a {self.what} file holds one document; remove the second `---`.")
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        start: Any = event.start_mark
        mark = _mark(self.name, start)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise SpecError(f"{mark}: the file has more than {MAX_NODES} values; that is not a {self.what}.")
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            node = yaml.ScalarNode("tag:yaml.org,2002:null", "", start, start)
            alias = f"aliases such as `*{event.anchor}` are not allowed; write the value out, or use `extends`."
            self._note(node, start, alias, known=False)
            return node
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise SpecError(f"{mark}: nested more than {MAX_DEPTH} levels deep; that is not a {self.what}.")
        tag, anchor = event.tag, event.anchor
        event.anchor = event.tag = None  # what stands there without them
        if isinstance(event, yaml.ScalarEvent):
            event.implicit = (event.style is None, event.style is not None)
        found = super().compose_node(parent, index)
        self.depth -= 1
        if tag is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")[:40]
            text = f"tags such as `{shown}` are not allowed; write a plain value."
            self._note(found, start, text, known=False)
        if anchor is not None:
            text = f"anchors such as `&{anchor}` are not allowed; write the value out where it is needed."
            self._note(found, start, text)
        return found

    def _note(self, node: Any, start: yaml.Mark, message: str, *, known: bool = True) -> None:
        fault = Fault((), _mark(self.name, start), message, known)
        self.faults.append(fault)
        if len(self.faults) >= MAX_FAULTS:
            raise _refused(self.faults)
        if node is not None:
            node.faults = [*getattr(node, "faults", ()), fault]


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
    """Read one YAML mapping without a fault.

    Args:
        text: the file's content.
        source: what errors call it, usually its path.
        what: the kind of file, for errors.

    Raises:
        SpecError: ``source:line:column: what is wrong``, a sentence for each fault.
    """
    document = scan(text, source, what)
    if document.faults:
        raise _refused(document.faults)
    return document


def scan(text: str, source: str, what: What = "policy") -> Document:
    """Read one YAML mapping with its faults, for those who find out what else is wrong; arguments as of `parse`.

    Raises:
        SpecError: it is no mapping, or cannot be read on.
    """
    if len(text) > MAX_BYTES:
        raise SpecError(f"{source}: is larger than {MAX_BYTES >> 10} KiB; that is not a {what} file.")
    node, faults = _composed(text, source, what)
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):
        raise _refused(faults, f"{source}: is empty; write at least {_LEAST[what]}.")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        place = _mark(source, node.start_mark)
        raise _refused(faults, f"{place}: is {kind}; a {what} file is a mapping of `field: value` lines.")
    reading = _NodeReader(source, {(): _mark(source, node.start_mark)}, faults)
    data: dict[str, Any] = reading.value(node, ())
    return Document(data, reading.marks, tuple(reading.faults))


def _composed(text: str, source: str, what: What) -> tuple[yaml.Node | None, list[Fault]]:
    """Return the node of a text, and the faults that belong to no value: tabs, which are read as spaces."""
    tabs: list[Fault] = []
    while True:
        reader = None
        try:
            reader = _Loader(text, source, what)
            return reader.compose_one(), tabs
        except yaml.reader.ReaderError as error:
            raise SpecError(
                f"{source}: is not text (character {error.position} is U+{error.character:04X}); give a YAML file."
            ) from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = _mark(source, mark) if mark is not None else Mark(source, 1, 1)
            at = -1 if mark is None or "'\\t'" not in (error.problem or "") else mark.index
            if at < 0 or text[at : at + 1] != "\t" or len(tabs) >= MAX_FAULTS:
                assert reader is not None
                if not tabs:
                    raise _refused(reader.faults, _syntax(error, place)) from None
                before = [fault for fault in reader.faults if fault.mark < tabs[0].mark]
                raise _refused([*before, *tabs]) from None  # what comes after a tab may follow from it
            tabs.append(Fault((), place, _TAB))
            text = f"{text[:at]} {text[at + 1 :]}"
        finally:
            if reader is not None:
                reader.dispose()


def _refused(faults: Sequence[Fault], last: str | None = None) -> SpecError:
    """Return the error for faults in the order of their places, and for what was found after them."""
    ordered = sorted(faults, key=lambda fault: fault.mark)
    return SpecError.of([*dict.fromkeys(map(str, ordered)), *([last] if last is not None else [])])


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


class _NodeReader:
    """Turns nodes into values, and notes where they stand and what is wrong with them."""

    def __init__(self, source: str, marks: dict[KeyPath, Mark], faults: list[Fault]) -> None:
        self.source = source
        self.marks = marks
        self.faults = faults

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return what a node says."""
        self.faults += (fault._replace(path=path) for fault in getattr(node, "faults", ()))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.marks[*path, index] = _mark(self.source, item.start_mark)
                items.append(self.value(item, (*path, index)))
            return items
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = _mark(self.source, key_node.start_mark)
            key = _NodeReader(self.source, {}, self.faults).value(key_node, path)
            if not isinstance(key, str):
                text = f"the key {str(key)[:40]} is not text; put it in quotes."
                self.faults.append(Fault(path, mark, text, known=False))
            elif key in result:
                first = self.marks[*path, key].line
                text = f"{key[:60]!r} is given twice, first in line {first}; remove one."
                self.faults.append(Fault((*path, key), mark, text))
            else:
                self.marks[*path, key] = mark
                result[key] = self.value(value_node, (*path, key))
        return result

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        text: str = node.value
        kind = node.tag.rsplit(":", 1)[1]
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if len(text) > MAX_DIGITS:
            what = f"{text[:10]}... is a number of {len(text):,} characters; write at most {MAX_DIGITS}."
            self.faults.append(Fault(path, _mark(self.source, node.start_mark), what, known=False))
            return 0
        if kind == "int":
            return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
        return float(re.sub(r"\.(?=[a-z])", "", text.lower()))


def _mark(source: str, mark: yaml.Mark) -> Mark:
    return Mark(source, mark.line + 1, mark.column + 1)


def _syntax(error: yaml.MarkedYAMLError, place: Mark) -> str:
    problem = error.problem or error.context or "it cannot be read"
    if "'\\t'" in problem:
        return f"{place}: {_TAB}"
    context = f" ({error.context})" if error.context else ""
    return f"{place}: not valid YAML: {problem}{context}."
