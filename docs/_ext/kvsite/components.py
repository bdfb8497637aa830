"""A page for each kind of components."""

from __future__ import annotations

import inspect

import kvpolicy
from kvpolicy import Component
from kvpolicy.cli.listing import summary
from kvpolicy.cli.showing_parts import example, parameters
from kvpolicy.contracts.components import KINDS, NEEDS
from kvpolicy.loading.entries import Entry
from kvpolicy.testing.tables import stand_in_tables
from kvsite.markdown import code, table, text, tree

ABOUT = {
    "importance": ("How much each entry matters.", "`score(view)` returns fp32 `[B, H, N]`; higher = keep."),
    "redundancy": (
        "How replaceable each entry is by another one.",
        "`score(view)` returns fp32 `[B, H, N]`; higher = more replaceable.",
    ),
    "mixer": (
        "How importance and redundancy become one retention score.",
        "`mix(importance, redundancy, view)` returns fp32 `[B, H, N]`; higher = keep.",
    ),
    "allocator": (
        "How the budget is split over layers and KV heads.",
        "`allocate(request)` returns one int64 `[B, H]` per layer; the counts of a row add up exactly to its budget.",
    ),
    "protection": (
        "What stays, or goes, whatever its score.",
        "`mask(view)` returns bool `[B, H, N]`; `reserved(prompt_length)` says how many entries of a long row.",
    ),
    "selector": (
        "How scores and counts become kept slots.",
        "`select(scores, counts, protected, valid, slots)` returns `KeepIndices`: int64 `[B, H, K]` and `[B, H]`.",
    ),
    "trigger": (
        "When a row is compacted.",
        "`fires(counters)` sees integers of one row and returns a bool; `buffer()` bounds what is above the budget.",
    ),
    "post": (
        "What happens to what is kept.",
        "`apply(view, kept)` returns `keys` `[B, H, N, D]`, `values` `[B, H, N, Dv]` or `rope_positions` `[B, H, N]`.",
    ),
}
"""What a kind is, and the shapes of what its components take and return."""


def anchor(name: str) -> str:
    """Return the name of a heading as links have it."""
    return name.replace(".", "").lower()


def pages() -> dict[str, str]:
    """Return path and text of all pages."""
    users = _users()
    made = {f"reference/components/{kind}.md": _page(kind, users) for kind in KINDS}
    rows = [
        (f"[{kind}]({kind}.md)", ABOUT[kind][0], ", ".join(_link(kind, entry) for entry in _entries(kind)))
        for kind in KINDS
    ]
    made["reference/components/index.md"] = (
        "# Components\n\nThe eight kinds of parts of a policy, and every bundled one. Axes: `B` rows, `H` KV "
        "heads, `G` query heads per KV head, `N` slots, `Q` observed queries, `D` and `Dv` head sizes. "
        "[Write a plugin](../../write-a-plugin.md) says how to add one.\n\n"
        f"{table(('kind', 'what it decides', 'components'), rows)}\n\n{tree(KINDS)}"
    )
    return made


def _entries(kind: str) -> list[Entry]:
    return list(kvpolicy.catalog().entries(kind))


def _link(kind: str, entry: Entry) -> str:
    return f"[{entry.name}]({kind}.md#{anchor(entry.name)})"


def _users() -> dict[type[Component], list[str]]:
    found: dict[type[Component], list[str]] = {}
    with stand_in_tables():
        for entry in kvpolicy.catalog().policies():
            for member in {type(part) for part in kvpolicy.load(entry.name).build().components}:
                found.setdefault(member, []).append(entry.name)
    return found


def _page(kind: str, users: dict[type[Component], list[str]]) -> str:
    what, shapes = ABOUT[kind]
    entries = _entries(kind)
    rows = [(f"[`{each.name}`](#{anchor(each.name)})", text(summary(each.component))) for each in entries]
    parts = [f"# {kind.capitalize()}", f"{what} {shapes}", table(("component", "what it is"), rows)]
    parts += [_section(kind, each, users.get(each.component, [])) for each in entries]
    return "\n\n".join(parts) + "\n"


def _section(kind: str, entry: Entry, users: list[str]) -> str:
    component = entry.component
    prose = inspect.cleandoc(component.__dict__.get("__doc__") or "")
    parts = [f"## {entry.name}", text("\n\n".join(" ".join(each.split()) for each in prose.split("\n\n")))]
    parts.append(f"```yaml\n{example(kind, entry.name, component)}\n```")
    rows = [
        (code(name), code(default), code(allowed), text(said)) for name, default, allowed, said in parameters(component)
    ]
    if rows:
        parts.append(table(("parameter", "default", "allowed", "meaning"), rows))
    parts.append("\n".join(f"- **{label}:** {said}" for label, said in _facts(kind, component, users).items() if said))
    return "\n\n".join(part for part in parts if part)


def _facts(kind: str, component: type[Component], users: list[str]) -> dict[str, str]:
    comparable = [
        name for name in ("heads", "layers") if getattr(component, f"comparable_across_{name}", False)
    ]  # fmt: skip
    states = ""
    if kind in ("importance", "redundancy"):
        states = f"scores may be ranked together across {' and '.join(comparable)}" if comparable else ""
    return {
        "paper": component.paper,
        "needs": "; ".join(f"`{need}`: {text(NEEDS[need])}" for need in sorted(component.needs)),
        "runs": "" if component.phases == Component.phases else f"at {' and '.join(sorted(component.phases))} only",
        "prompt": "must come in one forward pass" if component.whole_prompt else "",
        "comparable": states,
        "counts": str(getattr(component, "counts", "")).replace("_", " ") if kind == "allocator" else "",
        "normalisation": str(getattr(component, "normalisation", "")) if kind == "mixer" else "",
        "changes": str(getattr(component, "changes", "")) if kind == "post" else "",
        "used by": ", ".join(f"[{name}](../policies/{name}.md)" for name in users),
    }
