"""The laws: named properties that every component and every policy must obey.

`LAWS` holds all of them by name. A component for which one does not hold says so, with the reason, in its class
attribute `laws_not_applicable`; `docs/laws.md` lists them.
"""

from kvpolicy.testing.laws import engine, inputs, machine, parts, selection, symmetry
from kvpolicy.testing.laws._base import LAW_KINDS, LAWS, Law, LawBrokenError, UndecidedError, exceptions_of

__all__ = ["LAWS", "LAW_KINDS", "Law", "LawBrokenError", "UndecidedError", "exceptions_of"]
_ = (engine, inputs, machine, parts, selection, symmetry)
