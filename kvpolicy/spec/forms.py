"""The forms that a specification can be written in, brought to one.

A *canonical* mapping has the fields of a policy file. Every component reference is ``{use: name, parameter: value}``,
`protect` maps names to mappings of parameters (or False), and `budget` is ``{tokens: n}`` or ``{fraction: f}``. A part
of it is an *overlay*: a file with `extends`, or a replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Self

from kvpolicy.contracts.budget import Budget
from kvpolicy.contracts.component import LONGEST_TEXT
from kvpolicy.contracts.components import Component, kind_of
from kvpolicy.errors import UnknownComponentError, did_you_mean, nearest
from kvpolicy.loading.entries import Catalog, held_kinds
from kvpolicy.spec import former
from kvpolicy.spec.problems import FieldError, Problems, shown
from kvpolicy.spec.reference import ComponentRef, plain, unfolded
from kvpolicy.spec.values import check_values
from kvpolicy.spec.yaml_text import KeyPath, Mark

REFERENCES: Final = ("trigger", "importance", "redundancy", "mixer", "allocator", "selector")
"""Fields that hold one component; the field is named as its kind."""
SCALARS: Final = ("schema_version", "policy", "description", "paper", "departures", "phase", "prefill_chunk", "backend")
FIELDS: Final = (
    *("schema_version", "policy", "description", "paper", "departures", "budget", "phase", "prefill_chunk"),
    *("trigger", "protect", "importance", "redundancy", "mixer", "allocator", "selector", "post", "backend"),
)
"""All fields, in the order in which they are written."""

Marks = dict[KeyPath, Mark]
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class Canonical:
    """Brings one mapping to the canonical form, and its marks along.

    Attributes:
        data: the canonical mapping.
        marks: where its values stand.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        catalog: Catalog,
        marks: Mapping[KeyPath, Mark] | None = None,
        beneath: Mapping[str, Any] | None = None,
        problems: Problems | None = None,
    ) -> None:
        """Fields that have no known form are left out; what components say of their parameters comes later.

        Args:
            data: the mapping; fields may have their former names.
            catalog: knows the names.
            marks: where its values stand.
            beneath: the canonical mapping that this one will be laid over, if it is an overlay and that is known.
            problems: takes what is wrong; without it, a FieldError is raised.
        """
        self.catalog = catalog
        self.beneath = beneath or {}
        self.given = dict(marks or {})
        self.problems = problems or Problems()
        self._met: list[former.Former] = []
        with self.problems:
            data = former.present_fields(data, self.given, self._met)
        self.marks: Marks = {path: mark for path, mark in self.given.items() if len(path) <= 1}
        self.data: dict[str, Any] = {}
        for field, value in data.items():
            with self.problems:
                check_field(field, value, FIELDS, self.problems)
                self.data[field] = self._field(field, value)
        if problems is None:
            self.problems.check()

    def present(self, beneath: Mapping[str, Any] = _NOTHING, source: str = "") -> Self:
        """Bring parameters under their present names, and warn once of former ones, of fields too; return itself.

        Args:
            beneath: the canonical mapping that this one will be laid over.
            source: what warnings call the file.
        """
        with self.problems:
            self.data = former.present_parameters(self.data, beneath, self.catalog, self.marks, self._met)
        former.warn_of(self._met, source, self.marks)
        return self

    def _field(self, field: str, value: Any) -> Any:
        path: KeyPath = (field,)
        if value is None and field != "prefill_chunk":
            raise FieldError(path, "is empty; write a value or remove the line.")
        if field == "budget":
            return budget_form(value)
        if field in REFERENCES:
            return self._reference(field, value, path, path)
        if field == "protect":
            return self._protect(value)
        if field == "post":
            if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
                raise FieldError(path, f"is a list such as [rerotate], got {shown(value)}.")
            post = []
            for i, item in enumerate(value):
                with self.problems:
                    post.append(self._reference("post", item, (field, i), (field, i)))
            return post
        self._copy(path, path)
        return plain(value, path)

    def _reference(self, kind: str, value: Any, at: KeyPath, to: KeyPath) -> dict[str, Any]:
        """Return ``{use: ..., **parameters}``; `use` may be missing in an overlay."""
        self._copy(at, to)
        if isinstance(value, str):
            return {"use": value}
        if isinstance(value, Component | ComponentRef):
            return self._instance(kind, value, at)
        if not isinstance(value, Mapping):
            lead = self._lead(kind, value)
            raise FieldError(at, f"should be the name of a component or {{use: name, ...}}, got {shown(value)}.{lead}")
        if "use" not in value and kind == "trigger" and len(value) == 1:
            (name, setting) = next(iter(value.items()))
            if name in self.catalog.names("trigger"):
                self.marks[*to, "use"] = self.given.get((*at, name), self._near(at))
                return {"use": name, **self._parameters("trigger", name, setting, (*at, name), to)}
        use = value.get("use", "")
        if not isinstance(use, str):
            raise FieldError((*at, "use"), f"should be the name of a component, got {shown(use)}.")
        beneath = self.beneath.get(kind, {}) if len(at) == 1 else {}
        return self._plain(kind, use or beneath.get("use", ""), value, at, beneath)

    def _plain(
        self, kind: str, use: str, value: Mapping[str, Any], at: KeyPath, beneath: Mapping[str, Any] = _NOTHING
    ) -> dict[str, Any]:
        """Return parameters as plain values, and those that are components as references."""
        kinds = held_kinds(self.catalog.get(kind, use)) if use in self.catalog.names(kind) else {}
        result: dict[str, Any] = {}
        for key, item in value.items():
            if isinstance(item, Component | ComponentRef):
                component = item.component if isinstance(item, ComponentRef) else item
                result[key] = self._instance(kinds.get(key, kind_of(type(component))), item, (*at, key))
            elif isinstance(item, Mapping) and key in kinds:
                old = beneath.get(key, {})
                named = item.get("use", old.get("use", ""))
                named = named if isinstance(named, str) else ""
                result[key] = self._plain(kinds[key], named, item, (*at, key), old)
            else:
                result |= plain({key: item}, at)
        return result

    def _instance(self, kind: str, value: Component | ComponentRef, at: KeyPath) -> dict[str, Any]:
        component = value.component if isinstance(value, ComponentRef) else value
        if kind_of(type(component)) != kind:
            raise FieldError(at, f"should be a component of kind {kind}, got {type(component).__name__}.")
        if isinstance(value, ComponentRef):
            return {"use": value.use, **value.params}
        try:
            return ComponentRef(self.catalog.name_of(type(component)), component).data
        except UnknownComponentError as error:
            raise FieldError(at, str(error), UnknownComponentError) from None

    def _parameters(self, kind: str, name: str, setting: Any, at: KeyPath, to: KeyPath) -> dict[str, Any]:
        """Return the parameters of a component that is written ``name: setting``."""
        if setting is True:
            return {}
        if isinstance(setting, Mapping):
            if "use" in setting:
                raise FieldError((*at, "use"), f"the component is {name!r} already; remove `use`.")
            self._copy(at, to)
            return self._plain(kind, name, setting, at)
        try:
            shorthand = self.catalog.get(kind, name).shorthand
        except UnknownComponentError as error:
            raise FieldError(at, str(error), UnknownComponentError) from None
        if setting is None or shorthand is None:
            how = (
                "true or its parameters" if shorthand is None else f"a value for `{shorthand}`, true or its parameters"
            )
            raise FieldError(at, f"should be {how}, got {shown(setting)}.")
        self.marks[*to, shorthand] = self._near(at)
        return {shorthand: plain(setting, at)}

    def _protect(self, value: Any) -> dict[str, Any]:
        if isinstance(value, tuple | list) and all(isinstance(v, Component | ComponentRef) for v in value):
            references = [self._instance("protection", v, ("protect",)) for v in value]
            value = {reference.pop("use"): reference for reference in references}
        if not isinstance(value, Mapping):
            raise FieldError(("protect",), f"should be a mapping such as {{sinks: 4, recent: 8}}, got {shown(value)}.")
        result: dict[str, Any] = {}
        for name, setting in value.items():
            path = ("protect", name)
            self._copy(path, path)
            with self.problems:
                result[name] = False if setting is False else self._parameters("protection", name, setting, path, path)
        return result

    def _lead(self, kind: str, value: Any) -> str:
        """Say how a number alone is written, where a component can be named with one."""
        if kind != "trigger" or not isinstance(value, int | float) or isinstance(value, bool):
            return ""
        named = [name for name in self.catalog.names(kind) if self.catalog.get(kind, name).shorthand]
        return f" Write for example {{{named[0]}: {shown(value)}}}." if named else ""

    def _copy(self, at: KeyPath, to: KeyPath) -> None:
        """Take the marks of a subtree to its canonical place."""
        for path, mark in self.given.items():
            if path[: len(at)] == at:
                self.marks[*to, *path[len(at) :]] = mark

    def _near(self, path: KeyPath) -> Mark:
        for end in range(len(path), -1, -1):
            if path[:end] in self.given:
                return self.given[path[:end]]
        return Mark("", 0, 0)


def check_field(field: str, value: Any, fields: Sequence[str], problems: Problems) -> None:
    """Refuse a field that is none, and values that no specification can have; raises FieldError."""
    check_values({field: value})
    if field in HABITS:
        problems.leave_out(_MEANT.get(field, field))  # do not complain that what is meant is missing
        raise FieldError((field,), f"there is no such field. {HABITS[field](value)}")
    if field not in fields:
        near = nearest(field, fields)
        if near is not None:  # do not complain that the one that is meant is missing
            problems.leave_out(near)
        raise FieldError((field,), f"there is no such field.{did_you_mean(field, fields)} Fields: {', '.join(fields)}.")


def _compression_ratio(ratio: Any) -> str:
    if isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 <= ratio < 1:
        return (
            f"kvpress's compression_ratio is the share that goes, and a budget the share that stays: "
            f"for {ratio:g} write `budget: {{fraction: {1 - ratio:g}}}`."
        )
    return (
        "kvpress's compression_ratio is the share that goes, and a budget the share that stays: "
        "0.7 there is `budget: {fraction: 0.3}` here."
    )


HABITS: Final[Mapping[str, Callable[[Any], str]]] = {
    "compression_ratio": _compression_ratio,
    "compression_interval": lambda value: (
        f"kvpress's compression_interval is `trigger: {{every: {shown(value)}}}` here."
    ),
    "kernel_size": lambda value: (
        f"kvpress's kernel_size is `importance: {{use: window_attention, smooth: {shown(value)}}}` here."
    ),
    "n_sink": lambda value: f"kvpress's n_sink is `protect: {{sinks: {shown(value)}}}` here.",
    "press": lambda _: "A press is a policy here: name one in `extends` or in `kvpolicy.load`.",
    "target_size": lambda value: f"kvpress's target_size is `budget: {{tokens: {shown(value)}}}` here.",
    "window_size": lambda value: (
        f"kvpress's window_size is `importance: {{use: window_attention, observe: {shown(value)}}}` and, for what it "
        f"keeps of the end, `protect: {{recent: {shown(value)}}}` here."
    ),
}
"""What users of other projects write, and what is written here instead."""
_MEANT: Final = {"compression_ratio": "budget", "target_size": "budget", "compression_interval": "trigger"}


def budget_form(value: Any) -> dict[str, Any]:
    """Return ``{tokens: int}`` or ``{fraction: float}``; an integer alone means tokens, another number a fraction."""
    at: KeyPath = ("budget",)
    if isinstance(value, Budget):
        value = value.model_dump()
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"tokens": value}
    elif isinstance(value, float):
        value = {"fraction": value}
    if not isinstance(value, Mapping):
        raise FieldError(at, f"should be {{tokens: 512}} or {{fraction: 0.1}}, got {shown(value)}.")
    for key in value:
        if key not in ("tokens", "fraction"):
            near = did_you_mean(str(key), ("tokens", "fraction"))
            instead = HABITS[key](value[key]) if key in HABITS else "Write {tokens: 512} or {fraction: 0.1}."
            raise FieldError((*at, key), f"there is no such key.{near} {instead}")
    given = {key: v for key, v in value.items() if v is not None}
    if len(given) != 1:
        both = "both tokens and fraction are given" if given else "neither tokens nor fraction is given"
        raise FieldError(at, f"{both}; write one of them.")
    return _tokens(given["tokens"]) if "tokens" in given else _fraction(given["fraction"])


def _tokens(tokens: Any) -> dict[str, Any]:
    at: KeyPath = ("budget", "tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool):
        raise FieldError(at, f"should be a whole number of KV entries per head, got {shown(tokens)}.")
    if tokens < 1:
        raise FieldError(at, f"{tokens} is no budget; write at least 1 KV entry per head.")
    if tokens > LONGEST_TEXT:
        raise FieldError(at, f"{tokens} entries are more than any text has tokens; write at most {LONGEST_TEXT}.")
    return {"tokens": tokens}


def _fraction(fraction: Any) -> dict[str, Any]:
    at: KeyPath = ("budget", "fraction")
    if not isinstance(fraction, int | float) or isinstance(fraction, bool):
        raise FieldError(at, f"should be a number above 0 and at most 1, got {shown(fraction)}.")
    if not 0 < fraction <= 1:
        hint = f"; for {fraction:g} entries write {{tokens: {int(fraction)}}}" if 1 < fraction <= LONGEST_TEXT else ""
        raise FieldError(at, f"should be above 0 and at most 1, got {fraction:g}{hint}.")
    return {"fraction": float(fraction)}


def merge(
    base: Mapping[str, Any], overlay: Mapping[str, Any], base_marks: Marks, overlay_marks: Marks
) -> tuple[dict[str, Any], Marks]:
    """Lay an overlay over a canonical mapping: mappings are merged, except that another `use` or budget replaces."""
    result = dict(base)
    marks = dict(base_marks)
    for field, value in overlay.items():
        old = base.get(field)
        keep = isinstance(old, dict) and isinstance(value, dict) and field != "budget" and not _another(old, value)
        result[field] = _merged(old, value, (field,), marks) if keep else value
        if not keep:
            _forget(marks, (field,))
    marks.update(overlay_marks)
    return result, marks


def _merged(old: Any, new: Any, path: KeyPath, marks: Marks) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)) or _another(old, new):
        _forget(marks, path)
        return new
    return {**old, **{key: _merged(old.get(key), value, (*path, key), marks) for key, value in new.items()}}


def _another(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the new one names another component than the old one."""
    names = old.get("use"), new.get("use")
    return all(isinstance(name, str) for name in names) and names[0] != names[1]


def unfold(data: Mapping[str, Any], catalog: Catalog) -> dict[str, Any]:
    """Write every component that another one holds as a mapping with `use`, so that more can be laid over it."""
    result = {field: unfolded(field, value, catalog) if field in REFERENCES else value for field, value in data.items()}
    if "post" in data:
        result["post"] = [unfolded("post", reference, catalog) for reference in data["post"]]
    if "protect" in data:
        for name, given in data["protect"].items():
            if isinstance(given, Mapping):
                parameters = unfolded("protection", {"use": name, **given}, catalog)
                del parameters["use"]
                result["protect"] = {**result["protect"], name: parameters}
    return result


def _forget(marks: Marks, path: KeyPath) -> None:
    for old in [p for p in marks if p[: len(path)] == path]:
        del marks[old]


def nested(path: str, value: Any) -> tuple[list[str], dict[str, Any]]:
    """Split a dotted path and return its parts and the mapping ``{a: {b: value}}``; raises FieldError."""
    parts = path.split(".") if isinstance(path, str) else []
    if not parts or not all(parts):
        raise FieldError((), f"{shown(path)} is not a path; write field.parameter, such as 'mixer.weight'.")
    if len(parts) > 1 and (parts[0] in SCALARS or parts[0] == "post"):
        raise FieldError(tuple(parts), f"`{parts[0]}` has no named parts; replace {parts[0]!r} as a whole.")
    inner = value
    for part in reversed(parts):
        inner = {part: inner}
    return parts, inner
