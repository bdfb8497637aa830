"""The catalog: names of components, policies, tables, studies and backends, and the package that each comes from."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Union, cast, get_args, get_origin

from kvpolicy.contracts.backend import Backend
from kvpolicy.contracts.component import note_name
from kvpolicy.contracts.components import KINDS, Component, kind_of
from kvpolicy.errors import PluginError, UnknownComponentError, nearest
from kvpolicy.loading.presses import lead

COMPONENT_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
POLICY_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
TABLE_NAME: Final = re.compile(rf"{POLICY_NAME.pattern}/{POLICY_NAME.pattern}")


@dataclass(frozen=True)
class Origin:
    """Where something was registered.

    Attributes:
        distribution: name of the installed package.
        version: its version.
        plugin: name of the entry point.
    """

    distribution: str
    version: str = ""
    plugin: str = ""

    def __str__(self) -> str:
        package = f"{self.distribution} {self.version}".strip()
        return f"{package} ({self.plugin})" if self.plugin else package


THIS_PROCESS: Final = Origin("this process")
KINDS_OF_ENTRIES: Final = ("policy", *KINDS, "study", "table", "backend")
"""All that can be registered."""
_EXTRAS: Final = {
    "importance": {
        "kvpress": "runs scorers of kvpress, which is not installed; install it with: pip install 'kvpolicy[kvpress]'."
    }
}
"""Bundled components that are registered only where an extra is installed, and how to get it."""
BUNDLED: Final = "kvpolicy"
"""The distribution of the bundled plugins."""


@dataclass(frozen=True)
class Entry:
    """Something registered.

    Attributes:
        kind: of a component (`KINDS`), or ``policy``, ``study``, ``table`` or ``backend``.
        name: unique in its kind.
        value: the component class; the file (`Path`) or YAML text (`str`) of a policy or study; the file of a table;
            the backend.
        origin: where it was registered.
    """

    kind: str
    name: str
    value: Any
    origin: Origin

    @property
    def component(self) -> type[Component]:
        """The class of a component."""
        assert self.kind in KINDS
        return cast("type[Component]", self.value)

    @property
    def path(self) -> Path | None:
        """The file of a policy, study or table; None where there is only a text."""
        return self.value if isinstance(self.value, Path) else None

    @property
    def text(self) -> str | None:
        """The text of a policy or study that has no file."""
        return self.value if isinstance(self.value, str) else None


@dataclass(frozen=True)
class PluginFailure:
    """A plugin that was left out, and why; `error.__cause__` is what the plugin raised."""

    origin: Origin
    error: PluginError


@dataclass
class Catalog:
    """Maps (kind, name) to what is registered: component classes, policies, tables, studies and backends.

    Attributes:
        failures: plugins that were left out.
        disabled: plugins that `KVPOLICY_DISABLED_PLUGINS` turned off.
    """

    failures: list[PluginFailure] = field(default_factory=list)
    disabled: list[Origin] = field(default_factory=list)
    _entries: dict[tuple[str, str], Entry] = field(default_factory=dict, repr=False)

    def register(self, name: str, component: type[Any], origin: Origin = THIS_PROCESS) -> None:
        """Add a component class under a name; raises PluginError when either is not allowed or the name is taken."""
        self.add(component_entry(name, component, origin))

    def register_policy(self, name: str, path_or_text: str | os.PathLike[str], origin: Origin = THIS_PROCESS) -> None:
        """Add a policy file, or YAML text with a line break; raises PluginError as `register`."""
        self.add(file_entry("policy", name, path_or_text, origin))

    def register_study(self, name: str, path_or_text: str | os.PathLike[str], origin: Origin = THIS_PROCESS) -> None:
        """Add a study file, or YAML text with a line break; raises PluginError as `register`."""
        self.add(file_entry("study", name, path_or_text, origin))

    def register_table(self, name: str, path: str | os.PathLike[str], origin: Origin = THIS_PROCESS) -> None:
        """Add the file of a calibration table; raises PluginError as `register`."""
        self.add(table_entry(name, path, origin))

    def register_backend(self, name: str, backend: Backend, origin: Origin = THIS_PROCESS) -> None:
        """Add a backend of `kvpolicy.ops`; raises PluginError as `register`."""
        self.add(backend_entry(name, backend, origin))

    def add(self, entry: Entry) -> None:
        """Add a checked entry; raises PluginError that names both sides when the name is taken."""
        taken = self._entries.setdefault((entry.kind, entry.name), entry)
        if taken is entry:
            if entry.kind in KINDS:
                note_name(entry.component, entry.name)
            return
        if taken.origin == entry.origin:
            raise PluginError(f"{entry.kind} {entry.name!r} is registered twice by {entry.origin}; rename one.")
        raise PluginError(
            f"{entry.kind} {entry.name!r} is registered by {taken.origin} and by {entry.origin}; "
            f"rename one{_way_out(taken.origin, entry.origin)}."
        )

    def __iter__(self) -> Iterator[Entry]:
        """Yield all entries in the order in which they were registered."""
        return iter(self._entries.values())

    def unregister(self, kind: str, name: str) -> None:
        """Remove a component, or what another kind (``policy``, ``table``, ``study``, ``backend``) names; for tests."""
        del self._entries[kind, name]

    def get(self, kind: str, name: str) -> type[Component]:
        """Return the class; raises UnknownComponentError with the nearest name, all names and the broken plugins."""
        return self.entry(kind, name).component

    def entry(self, kind: str, name: str) -> Entry:
        """Return the entry of a component; raises as `get`."""
        if kind not in KINDS:
            raise KeyError(f"{kind!r} is not a kind of component; the kinds are {', '.join(KINDS)}.")
        return self._find(kind, name)

    def policy(self, name: str) -> Entry:
        """Return a registered policy; raises UnknownComponentError with the nearest name and all names."""
        return self._find("policy", name)

    def _find(self, kind: str, name: str) -> Entry:
        try:
            return self._entries[kind, name]
        except KeyError:
            raise self.unknown(kind, name, self.names(kind)) from None

    def names(self, kind: str) -> list[str]:
        """Return the registered names of a kind in alphabetical order."""
        return sorted(entry.name for entry in self if entry.kind == kind)

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Return the components of one kind or of all, in the order of the pipeline, then by name."""
        return [self._entries[k, name] for k in KINDS if kind in (None, k) for name in self.names(k)]

    def policies(self) -> list[Entry]:
        """Return the registered policies by name."""
        return [self._entries["policy", name] for name in self.names("policy")]

    def studies(self) -> list[Entry]:
        """Return the registered studies by name."""
        return [self._entries["study", name] for name in self.names("study")]

    def tables(self) -> list[Entry]:
        """Return the registered calibration tables by name."""
        return [self._entries["table", name] for name in self.names("table")]

    def table(self, name: str) -> Entry | None:
        """Return the registered calibration table of a name, None if there is none."""
        return self._entries.get(("table", name))

    def backends(self) -> dict[str, Backend]:
        """Return the registered backends by name, in the order in which `auto` asks them."""
        return {entry.name: entry.value for entry in self if entry.kind == "backend"}

    def name_of(self, component: type[Component]) -> str:
        """Return the name under which a class is registered; raises UnknownComponentError if it is not."""
        for entry in self:
            if entry.value is component:
                return entry.name
        raise UnknownComponentError(
            f"{kind_of(component)}: the class {component.__name__} is not registered; "
            "call kvpolicy.catalog().register(name, cls) first."
        )

    def unknown(self, kind: str, name: str, known: Iterable[str]) -> UnknownComponentError:
        """Return the error for a name that is not among the known ones, with the plugins that could have brought it."""
        known = sorted(known)
        if kind == "policy" and (instead := lead(name)):  # a definite answer, which a list of names would bury
            return UnknownComponentError(f"unknown policy {shown(name)}. {instead}")
        if name in _EXTRAS.get(kind, {}):
            return UnknownComponentError(f"{name!r} {_EXTRAS[kind][name]}")
        there = f" Known: {', '.join(known)}." if known else f" No {kind} is registered."
        others = {other: self.names(other) for other in KINDS_OF_ENTRIES if other != kind}
        meant = led(name, {kind: known, **others})
        broken = "".join(f" Note: {failure.error}" for failure in self.failures)
        off = "".join(f" Note: plugin {origin.plugin!r} is turned off." for origin in self.disabled)
        return UnknownComponentError(f"unknown {kind} {shown(name)}.{meant}{there}{broken}{off}")


def not_installed(name: str) -> str:
    """Return a sentence on a bundled component that is registered only with an extra; an empty text for other names."""
    return next((f"{name!r} {extras[name]}" for extras in _EXTRAS.values() if name in extras), "")


def led(name: str, known: Mapping[str, Collection[str]]) -> str:
    """Return a sentence that leads from a name that is not there to what is called so, or to the nearest name.

    Args:
        name: what was asked for.
        known: the names of every kind; of the first kind that was asked for, a name is led to without its kind.
    """
    kinds = [with_article(kind) for kind, names in known.items() if name in names]
    if kinds:
        return f" That is the name of {' and '.join(kinds)}."
    every = [each for names in known.values() for each in names]
    near = _spelt_alike(name, next(iter(known.values()))) or _spelt_alike(name, every) or nearest(name, every)
    found = [kind for kind, names in known.items() if near in [*names]]
    if not found:
        return ""
    of_kind = "" if found[0] == next(iter(known)) else f"the {found[0]} "
    return f" Did you mean {of_kind}{near!r}?"


def _spelt_alike(name: str, known: Iterable[str]) -> str | None:
    """Return the name that differs in case and separators only, or has the whole of a longer word as a part."""
    bare = _bare(name)
    same = [each for each in known if _bare(each) == bare]
    parts = [each for each in known if len(bare) > 3 and bare in map(_bare, each.split("-"))]
    return next(iter(same or parts), None)


def _bare(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def same_package(one: str, other: str) -> bool:
    """Whether two names are those of one distribution, however they are written."""
    first, second = (re.sub(r"[-_.]+", "-", name).lower() for name in (one, other))
    return first == second


def with_article(word: str) -> str:
    """Write a word as one of its kind: ``a policy``, ``an importance``."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _way_out(*sides: Origin) -> str:
    """Say which plugin to turn off, if that leaves the other one: never a bundled one, of two others the later."""
    first, second = sides
    if not first.plugin or not second.plugin:
        return ""
    if first.plugin == second.plugin:  # the variable would turn off both
        return ", or uninstall one of the packages"
    off = first if second.distribution == BUNDLED else second
    return f", or turn one plugin off with KVPOLICY_DISABLED_PLUGINS={off.plugin}"


def shown(value: Any, longest: int = 80) -> str:
    """Return a short text for a value in a message, also when it cannot be printed."""
    try:
        text = " ".join(repr(value).split())
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException:  # noqa: BLE001 - a plugin's own __repr__
        text = f"a {type(value).__name__}"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def component_entry(name: str, component: type[Any], origin: Origin) -> Entry:
    """Check a name and a class; raises PluginError."""
    if not isinstance(name, str) or not COMPONENT_NAME.fullmatch(name):
        raise PluginError(
            f"{shown(name)} is not a component name; use at most 64 small letters, digits and underscores."
        )
    try:
        kind = kind_of(component)
    except TypeError as error:
        raise PluginError(f"{name!r}: {error}") from None
    if inspect.isabstract(component):
        missing = ", ".join(sorted(component.__abstractmethods__))
        raise PluginError(f"{kind} {name!r}: class {component.__name__} is abstract; implement {missing}.")
    if "use" in component.model_fields:
        raise PluginError(f"{kind} {name!r}: a parameter cannot be called 'use', which names the component; rename it.")
    shorthand = component.shorthand
    if shorthand is not None and shorthand not in component.model_fields:
        raise PluginError(f"{kind} {name!r}: its shorthand {shorthand!r} is not one of its parameters.")
    for former, present in component.formerly.items():
        if former in component.model_fields or present not in component.model_fields:
            raise PluginError(
                f"{kind} {name!r}: formerly says that {former!r} is {present!r} now; write a name that is no parameter "
                "any more, and one that is."
            )
    held = held_kinds(component)
    for parameter, info in component.model_fields.items():
        if parameter not in held and _mentions_component(info.annotation):
            raise PluginError(
                f"{kind} {name!r}: a policy file cannot write the parameter {parameter!r} ({shown(info.annotation)}); "
                "give it the base class of one kind of component, or that or None."
            )
    return Entry(kind, name, component, origin)


def held_kinds(component: type[Component]) -> dict[str, str]:
    """Return the parameters of a class that are a component (or None), with the kind of each."""
    kinds = {}
    for name, info in component.model_fields.items():
        options: list[Any] = [info.annotation]
        if get_origin(info.annotation) in (Union, UnionType):
            options = [option for option in get_args(info.annotation) if option is not NoneType]
        if len(options) == 1 and options[0] in KINDS.values():
            kinds[name] = kind_of(options[0])
    return kinds


def _mentions_component(annotation: Any) -> bool:
    if isinstance(annotation, type) and not get_args(annotation):
        return issubclass(annotation, Component)
    return any(_mentions_component(part) for part in get_args(annotation))


def file_entry(kind: str, name: str, path_or_text: str | os.PathLike[str], origin: Origin) -> Entry:
    """Check the name and the file or text of a policy or study; raises PluginError. A file is read when it is used."""
    if not isinstance(name, str) or not POLICY_NAME.fullmatch(name):
        raise PluginError(
            f"{shown(name)} is not a {kind} name; use at most 64 small letters, digits, dots, dashes and underscores."
        )
    if isinstance(path_or_text, str) and "\n" in path_or_text:
        return Entry(kind, name, path_or_text, origin)
    return Entry(kind, name, _file(f"{kind} {name!r}", path_or_text, "neither a path nor YAML text"), origin)


def table_entry(name: str, path: str | os.PathLike[str], origin: Origin) -> Entry:
    """Check a name and a file; raises PluginError. The file is read when it is used."""
    if not isinstance(name, str) or not TABLE_NAME.fullmatch(name):
        raise PluginError(
            f"{shown(name)} is not the name of a table; write model/method in small letters, digits, dots, dashes and "
            "underscores."
        )
    return Entry("table", name, _file(f"table {name!r}", path, "not a path"), origin)


def _file(owner: str, given: Any, otherwise: str) -> Path:
    try:
        path = Path(given)
    except TypeError:
        raise PluginError(f"{owner}: {shown(given)} is {otherwise}.") from None
    try:
        there = path.is_file()
    except OSError:  # a name that is too long
        there = False
    if not there:
        text = str(path)
        both_ends = text if len(text) <= 200 else f"{text[:60]}...{text[-137:]}"
        raise PluginError(f"{owner}: there is no file {both_ends!r}.")
    return path


def backend_entry(name: str, backend: Backend, origin: Origin) -> Entry:
    """Check a name and a backend; raises PluginError."""
    if not isinstance(name, str) or not COMPONENT_NAME.fullmatch(name) or name in ("auto", "torch"):
        raise PluginError(
            f"{shown(name)} is not a backend's name; use at most 64 small letters, digits and underscores, "
            "and neither 'auto' nor 'torch'."
        )
    if not isinstance(backend, Backend):
        raise PluginError(f"backend {name!r}: {shown(backend)} is not an instance of kvpolicy.ops.Backend.")
    return Entry("backend", name, backend, origin)
