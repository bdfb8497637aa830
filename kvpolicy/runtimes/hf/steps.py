"""A model's `forward` is wrapped while a cache is attached to it whose steps are opened on the host.

A compiled `forward` runs no Python of ours: the wrapper is what does, before it. It is the outermost frame of whatever
is compiled (`model.forward`, `model.__call__`, the model); dynamo leaves that frame alone and goes on with the model's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpolicy.cache.entering import NEED
from kvpolicy.errors import SpecError, UnsupportedError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf.attach import implementation_of, lock, undo, undo_left
from kvpolicy.runtimes.hf.graph import GraphPasses
from kvpolicy.runtimes.hf.implementations import family
from kvpolicy.runtimes.hf.naming import passed

Forward = Callable[..., Any]
_untraced: Callable[[Forward], Forward] = torch.compiler.disable
_WRAPPER = "_kvpolicy_wrapper"


def slots_of(policy: Policy, graph: bool | int) -> int:
    """Return how many slots a cache's arenas have whose steps are to be one graph.

    Args:
        policy: what evicts.
        graph: True for as many as the policy bounds its entries to, or a number of slots.

    Raises:
        UnsupportedError: the policy cannot be served like that.
        SpecError: the number makes no sense.
    """
    if not policy.traits.length_is_counted:
        raise UnsupportedError(
            f"graph: how many entries policy {policy.name!r} keeps does not follow from counters (trait "
            "length_is_counted), so its arena has no fixed size; leave out graph=True, or choose a policy that keeps "
            "equal counts."
        )
    bound = policy.bound
    if graph is True:
        if bound is None:
            raise UnsupportedError(
                f"graph: policy {policy.name!r} has no bound, so its arena has no fixed size; give the number of "
                "entries per head to make room for, as in graph=4096."
            )
        return bound
    if not isinstance(graph, int) or graph < max(bound or 1, 1):
        raise SpecError(
            f"graph: {graph!r} is no number of slots for policy {policy.name!r}; write True, or at least {bound or 1}."
        )
    return graph


def _wrapped(original: Forward) -> Forward:
    """Return a method that opens a step and then runs `original`, which takes the model first."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        passes = getattr(passed(kwargs), "opens_steps", None)
        if passes is None:
            return original(self, *args, **kwargs)
        opened, kwargs = _open(passes, self, args, kwargs)
        output = original(self, *args, **kwargs)
        if opened and passes.engine.turn.ready:
            raise UnsupportedError(
                "graph: the attention of the last step did not go through transformers' attention registry while this "
                "cache was in use; do not change the model's attention implementation inside the cache's `with` block."
            )
        return output

    return forward


@_untraced
def _open(passes: GraphPasses, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Open the step that a call of `forward` brings, if it does; return whether, and what to call it with."""
    inputs = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    tokens = next((each for each in inputs if each is not None), None)
    given = kwargs.get("attention_mask")
    by_kind = given if isinstance(given, dict) else {"": given}  # models with several kinds of layers take a dict
    mask = next((each for each in by_kind.values() if each is not None), None)
    if tokens is None or tokens.shape[1] != 1 or len(args) > 1 or (mask is not None and mask.dim() != 2):
        return False, kwargs
    if model is not passes.model:
        raise passes.foreign(model)
    if not passes.begin_step(tokens.shape[0], mask):
        return False, kwargs
    # It has been read, and would have another shape at every step.
    blank = dict.fromkeys(by_kind) if by_kind is given else None
    return True, kwargs if mask is None else {**kwargs, "attention_mask": blank}


class _Wrapper:
    """A model's wrapped `forward`.

    Attributes:
        before: what the instance had as `forward`, None where it was its class's.
        uses: attachments that are not undone.
        method: what the instance has now.
    """

    def __init__(self, model: nn.Module) -> None:
        before: Forward | None = vars(model).get("forward")
        original: Any = type(model).forward if before is None else _as_method(before)
        # All wrappers share one code object, and dynamo skips frames by that. It must not be told so of the method in
        # use, which would then break a graph that reaches it further in.
        skip = importlib.import_module("torch._dynamo.decorators").skip  # slow to import, and needed for this alone
        skip(_wrapped(original))
        self.before, self.uses = before, 0
        self.method = MethodType(_wrapped(original), model)
        setattr(self.method.__func__, _WRAPPER, self)

    def leave(self) -> None:
        """Give up one use; the last one restores what there was, unless somebody has replaced it meanwhile."""
        self.uses -= 1
        model: Any = self.method.__self__
        if self.uses or vars(model).get("forward") is not self.method:
            return
        if self.before is None:
            del model.forward
        else:
            model.forward = self.before


def _as_method(forward: Forward) -> Forward:
    @functools.wraps(forward)
    def method(_self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return method


def open_before_forward(model: nn.Module) -> Callable[[], None]:
    """Wrap a model's `forward`; return a function that undoes it (the last one restores).

    The wrapper is a method of the instance: a copy of the model gets one of its own, which does nothing for the caches
    of the first.
    """
    try:
        with lock:
            current = vars(model).get("forward")
            wrapper: _Wrapper | None = getattr(current, _WRAPPER, None)
            if wrapper is None or wrapper.method is not current:
                wrapper = _Wrapper(model)
                model.forward = wrapper.method
            wrapper.uses += 1
    finally:
        undo_left()
    return functools.partial(undo, [wrapper.leave])


def refuse_in_a_graph(
    model: PreTrainedModel,
    policy: Policy,
    layers: Sequence[Any],
    evictable: Sequence[int],
    shared: Mapping[int, Sequence[int]],
) -> None:
    """Raise UnsupportedError if the steps of a model cannot be one graph.

    Args:
        model: a decoder.
        policy: what evicts.
        layers: the layers of its cache.
        evictable: which of them a policy works on.
        shared: owner -> readers, of layers whose keys others read.
    """
    name = type(model).__name__
    if NEED in policy.needs:
        raise UnsupportedError(
            f"graph: policy {policy.name!r} needs hidden_states, which hooks of the attention modules bring, and a "
            "graph runs none; leave out graph=True."
        )
    base = implementation_of(model.config.get_text_config(decoder=True))
    if family(base) not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"graph: attention implementation {base!r} takes the lengths of rows from the host; load the model with "
            "attn_implementation='sdpa', or leave out graph=True."
        )
    moving = [i for i, layer in enumerate(layers) if i not in evictable and not layer.is_compileable]
    if moving:
        raise UnsupportedError(
            f"graph: layer {moving[0]} of {name} keeps a {type(layers[moving[0]]).__name__}, whose tensors grow with "
            "the text; leave out graph=True."
        )
    if shared:
        raise UnsupportedError(
            f"graph: several layers of {name} read the keys of layer {min(shared)}, and their queries are put together "
            "on the host; leave out graph=True."
        )
