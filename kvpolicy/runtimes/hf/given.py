"""What a caller gives: a policy in one of its forms, a model, tokens, numbers; and a sentence for what is none."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kvpolicy.errors import CacheStateError, SpecError, UnsupportedError
from kvpolicy.loading.entries import shown
from kvpolicy.policy.policy import Policy

if TYPE_CHECKING:
    from kvpolicy.spec import PolicySpec

Amount = float | Mapping[str, Any]
"""A budget as `kvpolicy.load` takes it: entries (an integer), a share of the tokens, or a mapping."""


def resolve(policy: Policy | PolicySpec | str | Path, budget: Amount | None = None) -> Policy:
    """Return the `Policy` that a name, path, specification or policy stands for.

    Args:
        policy: what stands for it.
        budget: takes the place of its own, as in `kvpolicy.load`.

    Raises:
        SpecError: it is not valid, or a finished `Policy` is given another budget.
    """
    if isinstance(policy, Policy):
        if budget is not None:
            raise SpecError("budget: a finished policy has one already; give a name, a path or a specification.")
        return policy
    from kvpolicy.spec import PolicySpec, load

    if isinstance(policy, str | Path):
        return load(policy, budget).build()
    if not isinstance(policy, PolicySpec):
        raise SpecError(
            f"policy: {type(policy).__name__} is not a policy; give a name, a path, a PolicySpec or a Policy."
        )
    return (policy if budget is None else policy.replace("budget", budget)).build()


def check_model(model: object, order: str) -> None:
    """Raise UnsupportedError for what is neither a model of transformers nor a wrapper around one.

    Args:
        model: what was given.
        order: how the arguments follow each other, for the message.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnsupportedError(f"model: {type(model).__name__} is no model of transformers; the order is {order}.")


def check_ids(input_ids: object) -> None:
    """Refuse what is no tensor `[rows, tokens]`, above all what the tokenizer returned, and a text."""
    if isinstance(input_ids, Tensor) and input_ids.ndim == 2:
        return
    got = f"a tensor of shape {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
    raise CacheStateError(
        "input_ids: should be a tensor of token ids [rows, tokens], as in "
        f'tokenizer(text, return_tensors="pt")["input_ids"], got {got}.'
    )


def check_whole(name: str, number: object) -> None:
    """Raise CacheStateError for what is neither a whole number nor None."""
    if isinstance(number, bool) or (number is not None and not isinstance(number, Integral)):
        raise CacheStateError(f"{name}: {shown(number)} is no whole number; write one of at least 1.")
