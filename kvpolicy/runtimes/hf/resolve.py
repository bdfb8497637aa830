"""What may stand for a policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvpolicy.errors import SpecError
from kvpolicy.policy.policy import Policy

if TYPE_CHECKING:
    from kvpolicy.spec import PolicySpec


def resolve(policy: Policy | PolicySpec | str | Path) -> Policy:
    """Return the `Policy` that a name, path, specification or policy stands for."""
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str | Path):
        from kvpolicy.spec import load

        policy = load(policy)
    build: Callable[[], Policy] | None = getattr(policy, "build", None)
    if build is None:
        raise SpecError(
            f"policy: {type(policy).__name__} is not a policy; give a name, a path, a PolicySpec or a Policy."
        )
    return build()
