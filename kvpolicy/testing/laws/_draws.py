"""Draws what each kind of subject is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from kvpolicy.contracts.components import Component, SlotState, kind_of
from kvpolicy.policy.policy import Policy
from kvpolicy.testing.cases import Case, Layer
from kvpolicy.testing.strategies import MAX_SLOTS, cache_views
from kvpolicy.testing.tensors import codes, scores, valid_slots


def kind_of_subject(subject: Any) -> str:
    """Return the kind of a component, or ``policy``."""
    return "policy" if isinstance(subject, Policy) else kind_of(type(subject))


@st.composite
def cases(draw: DrawFn, /, subject: Any, **view: Any) -> Case:
    """Draw a case for a component or a policy; keyword arguments go to `cache_views`."""
    kind = kind_of_subject(subject)
    if kind == "policy":
        return draw(policy_cases(subject, **view))
    if kind == "allocator":
        return draw(allocator_cases(subject))
    asks = {"needs": needs_of(subject), "states": states_of(subject), "observe": observed_by(subject)}
    seen = draw(cache_views(**{**asks, **view}))
    aligned: dict[str, Tensor] = {}
    counts = None
    if kind == "mixer":
        aligned = {name: spoilt(draw(scores(*seen.shape)), seen.valid) for name in ("importance", "redundancy")}
    elif kind == "selector":
        protected = seen.valid & marks(draw(codes(seen.valid.numel())), seen.valid, 4)
        aligned = {"scores": spoilt(draw(scores(*seen.shape)), seen.valid), "protected": protected}
        counts = drawn_counts(draw(codes(seen.shape[0] * seen.shape[1])), protected.sum(-1), seen.valid.sum(-1))
    elif kind == "post":
        kept = seen.valid & marks(draw(codes(seen.valid.numel())), seen.valid, 2)
        aligned = {"kept": kept | seen.newest(1)}
    return Case((Layer(seen, aligned),), counts)


def marks(drawn: list[int], like: Tensor, one_in: int) -> Tensor:
    """Turn codes into a mask of about one slot in so many."""
    return torch.tensor(drawn).reshape(like.shape) % one_in == 1


def drawn_counts(drawn: list[int], least: Tensor, most: Tensor) -> Tensor:
    """Turn codes into int64 counts between two bounds."""
    return least + torch.tensor(drawn).reshape(least.shape) % (most - least + 1)


def spoilt(x: Tensor, valid: Tensor) -> Tensor:
    """Put NaN where no slot is valid."""
    return x.masked_fill(~valid, float("nan"))


@st.composite
def allocator_cases(draw: DrawFn, subject: Any) -> Case:
    """Draw scores, protections and validity of one to three layers, and a budget that holds what is protected.

    Heads and layers hold equally many entries as far as the allocator's `counts` says that it gives them equal shares.
    """
    rows, heads, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, MAX_SLOTS))
    layers: list[Layer] = []
    valid: Tensor | None = None
    total = draw(st.integers(1, 3))
    for index in range(total):
        if valid is None or subject.counts != "equal":
            valid = draw(valid_slots(rows, heads, slots, ragged=subject.counts == "per_head"))
        protected = valid & marks(draw(codes(valid.numel())), valid, 4)
        view = draw(cache_views(valid=valid, layer=(index, total)))
        layers.append(Layer(view, {"scores": spoilt(draw(scores(rows, heads, slots)), valid), "protected": protected}))
    most = torch.stack([layer.aligned["protected"].sum(-1).amax(-1) for layer in layers]).amax(0).tolist()
    drawn = zip(draw(codes(rows)), most, strict=True)
    return Case(tuple(layers), budget=tuple(max(n, 1) + code % (slots + 3 - max(n, 1)) for code, n in drawn))


@st.composite
def policy_cases(draw: DrawFn, /, policy: Policy, **view: Any) -> Case:
    """Draw the layers of a model, and for each row a budget that holds what is protected."""
    total = draw(st.integers(1, 2))
    asks: dict[str, Any] = {"needs": needs_of(policy), "states": states_of(policy), "observe": observed_by(policy)}
    shared: Literal["none", "heads"] = "none" if policy.selector.scope == "head" else "heads"
    view.setdefault("slots", draw(st.integers(1, MAX_SLOTS) | st.just(MAX_SLOTS)))
    first = draw(cache_views(**asks, ragged=False, shared=shared, layer=(0, total), **view))
    views = [first]
    others = range(1, total)
    views += [draw(cache_views(**asks, valid=first.valid, layer=(i, total), seen_by=first)) for i in others]
    least = least_budget(policy, views)
    # Mostly less than there is, for else nothing is evicted.
    there = first.valid.sum(-1).amax(-1).tolist()
    most = [n - 1 if draw(st.integers(0, 3)) else first.shape[2] + 2 for n in there]
    drawn = zip(draw(codes(len(least))), least, most, strict=True)
    budget = tuple(low + code % max(1, high - low + 1) for code, low, high in drawn)
    return Case(tuple(Layer(v) for v in views), budget=budget)


def least_budget(policy: Policy, views: list[Any]) -> list[int]:
    """Return, by row, the smallest budget that holds what the policy protects, at least 1."""
    protected = torch.stack([policy.masks(view)[0] for view in views])
    if policy.selector.scope != "head":
        protected = protected.any(2, keepdim=True)
    if policy.selector.scope == "model":
        protected = protected.any(0, keepdim=True)
    return [max(1, int(n)) for n in protected.sum(-1).amax((0, 2))]


def one_case(subject: Any) -> SearchStrategy[dict[str, Any]]:
    """Draw just a case."""
    return st.fixed_dictionaries({"case": cases(subject)})


def case_and(**more: SearchStrategy[Any]) -> Any:
    """Return a function: subject -> strategy of a case and further keyword arguments."""
    return lambda subject: st.fixed_dictionaries({"case": cases(subject), **more})


def order(most: int = 3) -> SearchStrategy[tuple[int, ...]]:
    """Draw an order of `most` things that changes places from two things on; what a case does not have is left out."""
    return st.permutations(range(most)).map(lambda o: tuple(o if o.index(1) < o.index(0) else reversed(o)))


def _members(subject: Component | Policy) -> Sequence[Component]:
    return subject.components if isinstance(subject, Policy) else list(subject.members())


def needs_of(subject: Component | Policy) -> frozenset[str]:
    """Return what a component or a policy needs, with all that it is made of."""
    return frozenset().union(*(c.needs for c in _members(subject)))


def states_of(subject: Component | Policy) -> tuple[SlotState, ...]:
    """Return the slot state of a component or a policy, with all that it is made of."""
    return tuple(state for c in _members(subject) for state in c.slot_state())


def observed_by(subject: Component | Policy) -> int:
    """Return how many queries a component or a policy looks at, with all that it is made of."""
    return max(c.observed_queries() for c in _members(subject))
