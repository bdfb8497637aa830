"""Libraries of the extra `study`; each missing one is named in a sentence."""

from __future__ import annotations

import importlib
from types import ModuleType

from kvpolicy.errors import KVPolicyError


def library(name: str, purpose: str, *, package: str = "kvpolicy[study]") -> ModuleType:
    """Import an optional library.

    Args:
        name: name of the module.
        purpose: the first words of the error, such as "the intervals of a study need".
        package: what to install.

    Raises:
        KVPolicyError: the library is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise KVPolicyError(f"{purpose} {name.partition('.')[0]}; install it with: pip install '{package}'.") from None
