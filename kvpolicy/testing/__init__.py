"""For tests of kvpolicy and of its plugins.

`laws_of` makes pytest tests of a component or policy; `check_component`, `check_policy` and `check_package` return
results; `LAWS` are the laws; `cache_views`, `scores`, `budgets`, `components`, `policy_specs` and `studies` are
hypothesis strategies: all these need hypothesis, of the extra `test`. `poisoned_memory` fills unwritten memory with
NaN.

`tiny` makes small random models; it alone needs transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kvpolicy.testing.checking import Failure as Failure
    from kvpolicy.testing.checking import Result as Result
    from kvpolicy.testing.checking import check_component as check_component
    from kvpolicy.testing.checking import check_package as check_package
    from kvpolicy.testing.checking import check_policy as check_policy
    from kvpolicy.testing.laws import LAWS as LAWS
    from kvpolicy.testing.laws import Law as Law
    from kvpolicy.testing.laws import LawBrokenError as LawBrokenError
    from kvpolicy.testing.poison import poisoned_memory as poisoned_memory
    from kvpolicy.testing.pytest_plugin import laws_of as laws_of
    from kvpolicy.testing.strategies import budgets as budgets
    from kvpolicy.testing.strategies import cache_views as cache_views
    from kvpolicy.testing.strategies import components as components
    from kvpolicy.testing.strategies import policy_specs as policy_specs
    from kvpolicy.testing.strategies import scores as scores
    from kvpolicy.testing.study_specs import studies as studies

_MODULES: Final = {
    "checking": ("Failure", "Result", "check_component", "check_package", "check_policy"),
    "laws": ("LAWS", "Law", "LawBrokenError"),
    "poison": ("poisoned_memory",),
    "pytest_plugin": ("laws_of",),
    "strategies": ("budgets", "cache_views", "components", "policy_specs", "scores"),
    "study_specs": ("studies",),
}
_HOME: Final = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvpolicy.testing' has no attribute {name!r}")
    if name != "poisoned_memory":
        from kvpolicy.testing._extra import require_hypothesis

        require_hypothesis()
    value = getattr(import_module(f"kvpolicy.testing.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
