"""For tests of kvpolicy and of its plugins.

`laws_of` makes pytest tests of a component or policy; `check_component`, `check_policy` and `check_package` return
results; `LAWS` are the laws; `cache_views`, `scores`, `budgets`, `components`, `policy_specs` and `studies` are
hypothesis strategies: all these need hypothesis, of the extra `test`. `poisoned_memory` fills unwritten memory with
NaN.

`tiny` makes small random models; it alone needs transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpolicy.lazy import attach

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

if not TYPE_CHECKING:  # a type checker would take any name for one of the package's
    __getattr__, __dir__, __all__ = attach(__name__)
