"""KV-cache eviction policies as compositions of components, declared in YAML.

Importing this package loads neither plugins nor transformers nor triton; names below are imported when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpolicy.lazy import attach

if TYPE_CHECKING:
    from kvpolicy.contracts.budget import Budget as Budget
    from kvpolicy.contracts.components import BudgetAllocator as BudgetAllocator
    from kvpolicy.contracts.components import Component as Component
    from kvpolicy.contracts.components import ImportanceScorer as ImportanceScorer
    from kvpolicy.contracts.components import Mixer as Mixer
    from kvpolicy.contracts.components import PostOperation as PostOperation
    from kvpolicy.contracts.components import Protection as Protection
    from kvpolicy.contracts.components import RedundancyScorer as RedundancyScorer
    from kvpolicy.contracts.components import Selector as Selector
    from kvpolicy.contracts.components import SlotState as SlotState
    from kvpolicy.contracts.components import Trigger as Trigger
    from kvpolicy.contracts.view import CacheView as CacheView
    from kvpolicy.contracts.view import Rope as Rope
    from kvpolicy.errors import BudgetError as BudgetError
    from kvpolicy.errors import CacheStateError as CacheStateError
    from kvpolicy.errors import ComponentError as ComponentError
    from kvpolicy.errors import FormerNameWarning as FormerNameWarning
    from kvpolicy.errors import KVPolicyError as KVPolicyError
    from kvpolicy.errors import PluginError as PluginError
    from kvpolicy.errors import ScoreError as ScoreError
    from kvpolicy.errors import SpecError as SpecError
    from kvpolicy.errors import TableError as TableError
    from kvpolicy.errors import UnknownComponentError as UnknownComponentError
    from kvpolicy.errors import UnreachableError as UnreachableError
    from kvpolicy.errors import UnsupportedError as UnsupportedError
    from kvpolicy.loading.entries import Catalog as Catalog
    from kvpolicy.loading.hookspecs import hookimpl as hookimpl
    from kvpolicy.loading.installed import catalog as catalog
    from kvpolicy.policy.policy import Policy as Policy
    from kvpolicy.spec import ComponentRef as ComponentRef
    from kvpolicy.spec import PolicySpec as PolicySpec
    from kvpolicy.spec import json_schema as json_schema
    from kvpolicy.spec import load as load

    __version__: str


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kvpolicy")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0+unknown"


if not TYPE_CHECKING:  # a type checker would take any name for one of the package's
    __getattr__, __dir__, __all__ = attach(__name__, {"__version__": _version})
