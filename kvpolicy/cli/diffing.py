"""`kvpolicy show --diff`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.table import Table

import kvpolicy
from kvpolicy.cli.terminal import output

_WORDS: Final = ("description", "paper", "departures")


def print_difference(first: str, second: str) -> None:
    """Print the fields and parameters in which two policies differ; raises KVPolicyError when one is not valid."""
    left, right = kvpolicy.load(first), kvpolicy.load(second)
    console = output()
    rows = list(differences(left.to_data(), right.to_data()))
    if rows:
        table = Table("field", left.policy, right.policy, box=None, pad_edge=False, header_style="bold")
        for field, one, other in rows:
            table.add_row(field, one, other)
        console.print(table)
    else:
        console.print(f"{left.policy} and {right.policy} do the same.")
    said = {field: (getattr(left, field), getattr(right, field)) for field in _WORDS}  # a variant need not say anything
    words = [field for field, (one, other) in said.items() if one and other and one != other]
    if words:
        console.print(f"Other words in: {', '.join(words)}.")


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted field, one value, other value) in the order of a file; what one side lacks is a dash."""
    one, other = dict(_flat(left)), dict(_flat(right))
    order = list(left)
    fields = sorted({**one, **other}, key=lambda field: order.index(field.partition(".")[0]))
    for field in fields:
        if one.get(field) != other.get(field) or (field in one) != (field in other):
            yield field, _shown(one, field), _shown(other, field)
    first, second = (list(_post(side.get("post", ()))) for side in (left, right))
    if first != second and sorted(first) == sorted(second):
        yield "post", ", ".join(first), ", ".join(second)


def _flat(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for field, value in data.items():
        if field in ("policy", *_WORDS):
            continue
        if field == "post":
            yield from _leaves(field, _post(value))
        else:
            yield from _leaves(field, value)


def _post(operations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the parameters of operations by name, in their order; one that stands twice gets a number."""
    named: dict[str, dict[str, Any]] = {}
    for number, reference in enumerate(operations):
        use = str(reference["use"])
        before = sum(each["use"] == use for each in operations[:number])
        named[f"{use} ({before + 1})" if before else use] = {k: v for k, v in reference.items() if k != "use"}
    return named


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}", item)
    elif isinstance(value, Mapping):
        if "." in path:  # a component without parameters is there or not
            yield path, True
    else:
        yield path, value


def _shown(side: Mapping[str, Any], field: str) -> str:
    if field not in side:
        return "-"
    value = side[field]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
