"""Loads plugins: entry points of the group ``kvpolicy``, each guarded, so that a broken one is named and left out."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, TypeVar

import pluggy

from kvpolicy.errors import PluginError, did_you_mean
from kvpolicy.loading import hookspecs
from kvpolicy.loading.entries import (
    Catalog,
    Entry,
    Origin,
    PluginFailure,
    backend_entry,
    component_entry,
    policy_entry,
    shown,
    study_entry,
    table_entry,
)

DISABLED_VARIABLE: Final = "KVPOLICY_DISABLED_PLUGINS"
"""Environment variable: names of entry points that are not loaded, separated by commas."""

MAX_REGISTRATIONS: Final = 1_000
"""How often one plugin may call `register`; a hook that registers without end is cut off there."""

_LONGEST_REASON: Final = 300

T = TypeVar("T")

_log = logging.getLogger("kvpolicy")
_lock = threading.RLock()
_process_catalogs: list[Catalog] = []  # none before the first use, then one
_override: ContextVar[Catalog | None] = ContextVar("kvpolicy_catalog", default=None)


def catalog() -> Catalog:
    """Return the catalog of this process; the first call loads the plugins.

    Plugins that fail are left out, with one warning each; see `Catalog.failures`.

    Raises:
        PluginError: two plugins register the same name.
    """
    chosen = _override.get()
    if chosen is not None:
        return chosen
    with _lock:
        if not _process_catalogs:
            loaded = load_catalog()
            for failure in loaded.failures:
                _log.debug("%s", failure.error, exc_info=failure.error.__cause__)
                warnings.warn(str(failure.error), RuntimeWarning, stacklevel=2)
            _process_catalogs.append(loaded)
        return _process_catalogs[0]


@contextmanager
def using(other: Catalog) -> Iterator[Catalog]:
    """Make `catalog()` return another catalog inside the block and this context; for tests and embedded use."""
    token = _override.set(other)
    try:
        yield other
    finally:
        _override.reset(token)


def load_catalog() -> Catalog:
    """Build a new catalog from the installed plugins; raises PluginError when two of them register the same name."""
    found = Catalog()
    manager, origins = plugin_manager(found)
    for plugin, origin in origins:
        try:
            entries = _collect(manager, plugin, origin)
        except PluginError as error:
            found.failures.append(PluginFailure(origin, error))
            continue
        for entry in entries:
            found.add(entry)
    return found


def plugin_manager(report: Catalog) -> tuple[pluggy.PluginManager, list[tuple[Any, Origin]]]:
    """Return a plugin manager with every plugin that loads, and the plugins with their origins, in order of name.

    Args:
        report: its lists `failures` and `disabled` receive what was left out.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    disabled = {name.strip() for name in os.environ.get(DISABLED_VARIABLE, "").split(",")} - {""}
    loaded = []
    points = entry_points(group=hookspecs.PROJECT)
    for point in sorted(points, key=lambda p: (p.name, p.value)):
        origin = _origin(point)
        if point.name in disabled:
            report.disabled.append(origin)
            continue
        try:
            loaded.append((_register(manager, point, origin), origin))
        except PluginError as error:
            report.failures.append(PluginFailure(origin, error))
    return manager, loaded


def _origin(point: EntryPoint) -> Origin:
    dist = point.dist
    return Origin("unknown", "", point.name) if dist is None else Origin(dist.name, dist.version, point.name)


def _register(manager: pluggy.PluginManager, point: EntryPoint, origin: Origin) -> Any:
    """Import one plugin and register it; raises PluginError and leaves the manager as it was."""
    plugin = _guarded(origin, point.load)
    declared = _guarded(origin, lambda: getattr(plugin, "kvpolicy_api", hookspecs.PLUGIN_API_VERSION))
    if type(declared) is not int or declared != hookspecs.PLUGIN_API_VERSION:
        raise _failure(
            origin,
            f"it is written for plugin API {shown(declared)} and this kvpolicy has plugin API "
            f"{hookspecs.PLUGIN_API_VERSION}; install versions that fit together",
        )
    _guarded(origin, lambda: hash(plugin))  # pluggy puts plugins into sets
    try:
        _guarded(origin, lambda: manager.register(plugin, name=str(origin)))
        _guarded(origin, lambda: _check_hooks(manager, plugin))
    except PluginError:
        if manager.get_plugin(str(origin)) is plugin:
            manager.unregister(plugin)
        raise
    return plugin


def _check_hooks(manager: pluggy.PluginManager, plugin: Any) -> None:
    """Refuse hooks that would be ignored: misspelt ones (`check_pending` for one plugin) and undecorated ones."""
    hooks = [name for name in vars(hookspecs) if name.startswith("kvpolicy_")]
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        required = any(impl.plugin is plugin and not impl.optionalhook for impl in caller.get_hookimpls())
        if required and not caller.has_spec():
            raise PluginError(
                f"there is no hook {shown(caller.name)}.{did_you_mean(caller.name, hooks)} "
                f"The hooks are {', '.join(hooks)}"
            )
    for name in hooks:
        if hasattr(plugin, name) and name not in {caller.name for caller in callers}:
            raise PluginError(f"{name} is not decorated; write @kvpolicy.hookimpl above it")


def _collect(manager: pluggy.PluginManager, plugin: Any, origin: Origin) -> list[Entry]:
    """Call the hooks of one plugin; all that it registers, or PluginError and nothing."""
    staged = Catalog()
    calls = 0
    others = [p for p in manager.get_plugins() if p is not plugin]
    entries: list[Entry] = []

    def stage(make: Callable[[str, Any, Origin], Entry], name: str, what: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > MAX_REGISTRATIONS:
            raise _EndlessRegistration
        entry = make(name, what, origin)
        staged.add(entry)
        entries.append(entry)

    def run() -> None:
        components = manager.subset_hook_caller("kvpolicy_register_components", others)
        components(register=lambda name, component: stage(component_entry, name, component))
        policies = manager.subset_hook_caller("kvpolicy_register_policies", others)
        policies(register=lambda name, path_or_text: stage(policy_entry, name, path_or_text))
        backends = manager.subset_hook_caller("kvpolicy_register_backends", others)
        backends(register=lambda name, backend: stage(backend_entry, name, backend))
        tables = manager.subset_hook_caller("kvpolicy_register_tables", others)
        tables(register=lambda name, path: stage(table_entry, name, path))
        studies = manager.subset_hook_caller("kvpolicy_register_studies", others)
        studies(register=lambda name, path_or_text: stage(study_entry, name, path_or_text))

    _guarded(origin, run)
    return entries


class _EndlessRegistration(BaseException):
    """Ends a hook that registers without end, even if it catches every `Exception`."""


def _guarded(origin: Origin, step: Callable[[], T]) -> T:
    """Run one step of a plugin's code; whatever it raises, `SystemExit` too, becomes a PluginError that names it."""
    try:
        return step()
    except PluginError as error:
        raise _failure(origin, str(error)) from error
    except _EndlessRegistration:
        reason = f"it registers more than {MAX_REGISTRATIONS:,} names; register each component and policy once"
        raise _failure(origin, reason) from None
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a panic in an extension module is not an Exception
        raise _failure(origin, _described(error)) from error


def _described(error: BaseException) -> str:
    """Return type and first line of an exception, also of one that cannot be written out."""
    try:
        lines = str(error).splitlines()
    except Exception:  # noqa: BLE001 - a plugin's own __str__
        lines = []
    first = lines[0] if lines else ""
    first = first if len(first) <= _LONGEST_REASON else f"{first[:_LONGEST_REASON]}..."
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _failure(origin: Origin, reason: str) -> PluginError:
    return PluginError(
        f"plugin {origin.plugin!r} of {origin.distribution} {origin.version} failed to load: {reason.rstrip('.')}."
    )
