"""Loads plugins: entry points of the group ``kvpolicy``, each guarded, so that a broken one is named and left out."""

from __future__ import annotations

import itertools
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import pluggy

from kvpolicy.errors import PluginError, did_you_mean
from kvpolicy.loading import hookspecs
from kvpolicy.loading.entries import Catalog, Origin, PluginFailure, shown

DISABLED_VARIABLE: Final = "KVPOLICY_DISABLED_PLUGINS"
"""Environment variable: names of entry points that are not loaded, separated by commas."""

DEBUG_VARIABLE: Final = "KVPOLICY_DEBUG_PLUGINS"
"""Environment variable: if set, each plugin is named on standard error before it is loaded."""

MAX_REGISTRATIONS: Final = 1_000
"""How often one plugin may call `register`; a hook that registers without end is cut off there."""

_LONGEST_REASON: Final = 300
_NAMELESS: Final = "unknown"

T = TypeVar("T")

_log = logging.getLogger("kvpolicy")
_lock = threading.RLock()
_process_catalogs: list[Catalog] = []  # none before the first use, then one
_override: ContextVar[Catalog | None] = ContextVar("kvpolicy_catalog", default=None)
_loading: ContextVar[bool] = ContextVar("kvpolicy_loading", default=False)


def catalog() -> Catalog:
    """Return the catalog of this process; the first call loads the plugins.

    Plugins that fail are left out, with one warning each; see `Catalog.failures`.

    Raises:
        PluginError: two plugins register the same name.
    """
    chosen = _override.get()
    if chosen is not None:
        return chosen
    if _loading.get():  # a plugin that asks for what it is a part of
        raise PluginError("the catalog is asked for while it is being loaded; register, and look names up later.")
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
    disabled = {name.strip() for name in os.environ.get(DISABLED_VARIABLE, "").split(",")} - {""}
    token = _loading.set(True)
    try:
        for point in sorted(_entry_points(found), key=lambda p: (p.name, p.value)):
            origin = _origin(point.dist, point.name)
            if point.name in disabled:
                found.disabled.append(origin)
                continue
            if os.environ.get(DEBUG_VARIABLE):  # at once, for the process may not outlive the import
                sys.stderr.write(f"kvpolicy loads plugin {point.name!r} of {origin.distribution!r} ({point.value!r})\n")
                sys.stderr.flush()
            try:
                brought = _collect(_plugin_manager(point, origin), origin)
            except PluginError as error:
                found.failures.append(PluginFailure(origin, error))
                continue
            for entry in brought:
                found.add(entry)
    finally:
        _loading.reset(token)
    return found


def _entry_points(report: Catalog) -> list[EntryPoint]:
    """Return the entry points of the group; a package whose list cannot be read is reported, whoever's plugin it is."""
    try:
        return list(entry_points(group=hookspecs.PROJECT))
    except Exception:  # noqa: BLE001 - one broken file spoils the list of all
        _log.debug("entry points are read one package at a time", exc_info=True)
    found: list[EntryPoint] = []
    known = set()
    for dist in distributions():
        origin = _origin(dist)
        name = re.sub(r"[-_.]+", "-", origin.distribution).lower()
        if name in known:  # the first of a name on the path counts, as for importlib.metadata
            continue
        known |= {name} - {_NAMELESS}
        try:
            found += dist.entry_points.select(group=hookspecs.PROJECT)
        except Exception as error:  # noqa: BLE001
            sentence = f"{origin}: its entry_points.txt cannot be read ({_described(error)}); reinstall the package."
            report.failures.append(PluginFailure(origin, PluginError(sentence)))
    return found


def _origin(dist: Distribution | None, plugin: str = "") -> Origin:
    try:
        metadata: Any = (dist and dist.metadata) or {}
        return Origin(metadata.get("Name") or _NAMELESS, metadata.get("Version") or "", plugin)
    except Exception:  # noqa: BLE001 - a damaged package
        return Origin(_NAMELESS, "", plugin)


def _plugin_manager(point: EntryPoint, origin: Origin) -> pluggy.PluginManager:
    """Import one plugin and give it a manager of its own; raises PluginError."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    plugin = _guarded(origin, point.load)
    declared = _guarded(origin, lambda: getattr(plugin, "kvpolicy_api", hookspecs.PLUGIN_API_VERSION))
    if type(declared) is not int or declared != hookspecs.PLUGIN_API_VERSION:
        raise _failure(
            origin,
            f"it is written for plugin API {shown(declared)} and this kvpolicy has plugin API "
            f"{hookspecs.PLUGIN_API_VERSION}; install versions that fit together",
        )
    _guarded(origin, lambda: manager.register(plugin, name=origin.plugin))
    _guarded(origin, lambda: _check_hooks(manager, plugin))
    return manager


def _check_hooks(manager: pluggy.PluginManager, plugin: Any) -> None:
    """Refuse hooks that would be ignored: misspelt ones (`check_pending` with a suggestion) and undecorated ones."""
    hooks = [name for name in vars(hookspecs) if name.startswith("kvpolicy_")]
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        if not caller.has_spec() and not all(impl.optionalhook for impl in caller.get_hookimpls()):
            raise PluginError(
                f"there is no hook {shown(caller.name)}.{did_you_mean(caller.name, hooks)} "
                f"The hooks are {', '.join(hooks)}"
            )
    for name in hooks:
        if hasattr(plugin, name) and name not in {caller.name for caller in callers}:
            raise PluginError(f"{name} is not decorated; write @kvpolicy.hookimpl above it")


def _collect(manager: pluggy.PluginManager, origin: Origin) -> Catalog:
    """Call the hooks of one plugin; all that it registers, or PluginError and nothing.

    The hooks run in a thread: one that registers without end may catch whatever `register` raises, but it cannot go on
    when `register` does not return. Inside of an import they run here: what they import might wait for its end.
    """
    here = threading.current_thread() if _inside_an_import() else None
    brought = Catalog()
    calls = itertools.count(1)
    outcome: SimpleQueue[BaseException | None] = SimpleQueue()

    def taking(add: Callable[[str, Any, Origin], None]) -> Callable[[str, Any], None]:
        def register(name: str, what: Any, /) -> None:
            if next(calls) > MAX_REGISTRATIONS:
                reason = f"it registers more than {MAX_REGISTRATIONS:,} names; register each component and policy once"
                outcome.put(_failure(origin, reason))
                if here is threading.current_thread():
                    raise SystemExit
                threading.Event().wait()
            add(name, what, origin)

        return register

    def run() -> None:
        hook = manager.hook
        hook.kvpolicy_register_components(register=taking(brought.register))
        hook.kvpolicy_register_policies(register=taking(brought.register_policy))
        hook.kvpolicy_register_backends(register=taking(brought.register_backend))
        hook.kvpolicy_register_tables(register=taking(brought.register_table))
        hook.kvpolicy_register_studies(register=taking(brought.register_study))

    def hooks() -> None:
        try:
            outcome.put(_guarded(origin, run))
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            outcome.put(error)

    if here is None:
        threading.Thread(target=copy_context().run, args=(hooks,), name=str(origin), daemon=True).start()
    else:
        hooks()
    failed = outcome.get()
    if failed is not None:
        raise failed
    return brought


def _inside_an_import() -> bool:
    # Module code may also be run by others (`exec` in a worker process): only the import system holds locks meanwhile.
    return any(f.f_globals.get("__name__") == "importlib._bootstrap" for f, _ in traceback.walk_stack(None))


def _guarded(origin: Origin, step: Callable[[], T]) -> T:
    """Run one step of a plugin's code; whatever it raises, `SystemExit` too, becomes a PluginError that names it."""
    try:
        return step()
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a panic in an extension module is not an Exception
        raise _failure(origin, _described(error)) from error


def _described(error: BaseException) -> str:
    """Return type and first line of an exception, also of one that cannot be written out; of our own the sentence."""
    try:
        lines = str(error).splitlines()
    except BaseException:  # noqa: BLE001 - a plugin's own __str__
        lines = []
    first = lines[0] if lines else ""
    if type(error) is PluginError and len(lines) == 1:
        return first
    first = first if len(first) <= _LONGEST_REASON else f"{first[:_LONGEST_REASON]}..."
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _failure(origin: Origin, reason: str) -> PluginError:
    package = f"{origin.distribution} {origin.version}".strip()
    return PluginError(f"plugin {origin.plugin!r} of {package} failed to load: {reason.rstrip('.')}.")
