"""Hidden states: what a layer's attention is called with, for policies that have the need ``hidden_states``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.handover import hand_over, handed_over


def leave_hidden_states(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Let attention modules leave what they are called with for their attention function; return what undoes it."""
    made = []
    for module in modules:
        made.append(module.register_forward_pre_hook(_leave, with_kwargs=True))
        made.append(module.register_forward_hook(_forget, always_call=True))

    def undo() -> None:
        for handle in made:
            handle.remove()

    return undo


def hidden_states(module: nn.Module, tokens: int) -> Tensor:
    """Return what a module whose attention is under way was called with, `[B, tokens, E]`.

    Raises:
        UnsupportedError: it was not called with such a tensor, or its hooks do not run.
    """
    found = handed_over(module)
    if found is None or found.dim() != 3 or found.shape[1] != tokens:
        raise UnsupportedError(
            f"{type(module).__name__} is not called with the hidden states [batch, tokens, size] of its tokens in a "
            "way that can be watched; choose a policy without the need `hidden_states`."
        )
    return found


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = kwargs.get("hidden_states", args[0] if args else None)
    hand_over(module, given.detach() if isinstance(given, Tensor) else None)


def _forget(module: nn.Module, _args: Any, _output: Any) -> None:
    hand_over(module, None)
