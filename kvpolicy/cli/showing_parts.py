"""`kvpolicy show`: what a name stands for, and what is shown of components, studies, tables and backends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.table import Table
from rich.text import Text

import kvpolicy
from kvpolicy.cli.listing import summary
from kvpolicy.cli.named import meanings
from kvpolicy.cli.showing import allowed, columns, print_policy, shown
from kvpolicy.cli.terminal import output
from kvpolicy.contracts.component import descriptions
from kvpolicy.contracts.components import KINDS, NEEDS, Component
from kvpolicy.errors import SpecError, TableError
from kvpolicy.loading.entries import held_kinds, with_article
from kvpolicy.policy.policy import Policy
from kvpolicy.spec.reference import plain
from kvpolicy.tables import registered

if TYPE_CHECKING:
    from kvpolicy.study.outline import OutlineRow
    from kvpolicy.study.source import Source


def print_named(text: str) -> None:
    """Print all that a name stands for, or a file; raises KVPolicyError when there is none or it is not valid."""
    for number, (kind, name) in enumerate(meanings(text)):
        if number:
            output().print()
        if kind in KINDS:
            print_component(kind, str(name))
        else:
            _PRINTERS[kind](name)


def print_component(kind: str, name: str) -> None:
    """Print what a component does, its parameters, its paper, and the policies that use it."""
    entry = kvpolicy.catalog().entry(kind, name)
    component, console = entry.component, output()
    _head(name, f"{with_article(kind)}, from {entry.origin}")
    for paragraph in inspect.cleandoc(component.__dict__.get("__doc__") or "").replace("``", "`").split("\n\n"):
        console.print(" ".join(paragraph.split()))
    console.print()
    users = [policy.name for policy in _policies() if component in {type(member) for member in policy.components}]
    _facts(
        {
            "paper": component.paper,
            "needs": "; ".join(f"{need}: {NEEDS[need]}" for need in sorted(component.needs)),
            "runs": "" if component.phases == Component.phases else f"at {' and '.join(sorted(component.phases))} only",
            "used by": ", ".join(users) or "no registered policy",
            "in a file": example(kind, name, component),
        }
    )
    if component.model_fields:
        console.print()
        console.print(_parameters(component))


def print_study(name_or_file: str | Path) -> None:
    """Print what a study asks, of what and of whom; raises SpecError when it is not valid."""
    from kvpolicy.study.outline import outline
    from kvpolicy.study.spec import find_study

    study = find_study(name_or_file)
    variants = study.variants()
    _head(study.study, f"a study: {study.description}".removesuffix(": "))
    _facts(
        {
            "base": "" if study.base is None else study.base.policy,
            "design": study.design,
            "variants": ", ".join(dict.fromkeys(variant.name for variant in variants)),
            "each at": "; ".join(dict.fromkeys(variant.condition for variant in variants)),
            "models": ", ".join(study.models),
            "datasets": "; ".join(map(_dataset, study.datasets, outline(study))),
            "seeds": "" if all(source.rollouts for source in study.datasets) else ", ".join(map(str, study.seeds)),
            "sampling": ", ".join(f"{name} {value:g}" for name, value in study.sampling.model_dump().items()),
            "metrics": ", ".join(study.metrics),
        }
    )
    output().print()
    output().print(f"`kvpolicy study plan {name_or_file}` says how many runs that is, and how long they take.")


def _dataset(source: Source, row: OutlineRow) -> str:
    """Return a dataset's label with what it says in place of the study."""
    said = [f"{row.problems:,} problem{'s' if row.problems > 1 else ''}"]
    said += [f"{source.rollouts:,} rollouts"] if source.rollouts else []
    said += [f"budget {source.budget:,}"] if source.budget else []
    longest = source.max_new_tokens or source.longest
    own = {"temperature": source.temperature, "top_p": source.top_p, "max_new_tokens": longest}
    said += [f"{name} {value:g}" for name, value in own.items() if value is not None]
    return f"{source.label} ({', '.join(said)})"


def print_table(name: str | Path) -> None:
    """Print what a calibration table holds and how it was made; raises TableError when it is damaged."""
    name = str(name)
    table = dict(registered())[name]
    if isinstance(table, TableError):
        raise table
    origin = next(entry.origin for entry in kvpolicy.catalog().tables() if entry.name == name)
    users = [policy.name for policy in _policies() if _names(policy, name)]
    _head(name, f"a calibration table, from {origin}")
    _facts(
        {
            "kind": table.kind,
            "model": f"{table.model} ({table.num_layers} layers, {table.num_kv_heads} KV heads, size {table.head_dim})",
            "method": table.method,
            "command": table.command,
            **table.notes,
            "tensors": ", ".join(f"{key} {list(value.shape)}" for key, value in table.tensors.items()),
            "used by": ", ".join(users) or "no registered policy",
        }
    )


def print_backend(name: str | Path) -> None:
    """Print what a backend is, and how a policy asks for it."""
    name = str(name)
    entry = next(each for each in kvpolicy.catalog() if (each.kind, each.name) == ("backend", name))
    _head(name, f"a backend of kvpolicy.ops, from {entry.origin}: {summary(type(entry.value))}".rstrip(": ") + ".")
    _facts({"in a file": f"backend: {name}"})


_PRINTERS: Final[Mapping[str, Callable[[str | Path], None]]] = {
    "policy": print_policy,
    "study": print_study,
    "table": print_table,
    "backend": print_backend,
}


def _head(name: str, what: str) -> None:
    output().print(Text.assemble((name, "bold"), f"  {what}"))


def _facts(said: Mapping[str, str]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(ratio=1)
    for label, text in said.items():
        if text:
            table.add_row(label, text)
    output().print(table)


def _policies() -> Iterator[Policy]:
    for entry in kvpolicy.catalog().policies():
        try:
            yield kvpolicy.load(entry.name).build()
        except SpecError:  # which `list` and `validate` name
            continue


def _names(policy: Policy, table: str) -> bool:
    return any(getattr(part, field) == table for part in policy.components for field in type(part).model_fields)


def example(kind: str, name: str, component: type[Component]) -> str:
    """Return a line of a policy file that names the component."""
    required = [field for field, info in component.model_fields.items() if info.is_required()]
    short = component.shorthand is not None
    if kind in ("protection", "trigger") and (short or not required):
        field = "protect" if kind == "protection" else kind
        return f"{field}: {{{name}: {component.shorthand if short else 'true'}}}"
    written = f"{{use: {name}{''.join(f', {field}: ...' for field in required)}}}" if required else name
    return f"post: [{written}]" if kind == "post" else f"{kind}: {written}"


def _parameters(component: type[Component]) -> Table:
    table = columns("parameter", "default", "allowed")
    for row in parameters(component):
        table.add_row(*row)
    return table


def parameters(component: type[Component]) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, default, allowed values and meaning of each parameter."""
    properties = component.model_json_schema().get("properties", {})
    held = held_kinds(component)
    for name, info in component.model_fields.items():
        if info.is_required():
            default = "required"
        else:
            value = info.get_default(call_default_factory=True)
            default = (
                kvpolicy.catalog().name_of(type(value)) if isinstance(value, Component) else shown(plain(value, ()))
            )
        kinds = f"a component: {held[name]}" if name in held else allowed(properties[name])
        yield name, default, kinds, descriptions(component)[name]
