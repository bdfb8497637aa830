"""hypothesis belongs to the extra `test`; this names it where it is missing."""

from __future__ import annotations

from importlib.util import find_spec


def require_hypothesis() -> None:
    """Raise ImportError with one sentence when hypothesis is not installed."""
    if find_spec("hypothesis") is None:
        raise ImportError(
            "kvpolicy.testing: laws and strategies need hypothesis; install it with: pip install 'kvpolicy[test]'."
        )
