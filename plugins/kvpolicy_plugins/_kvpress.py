"""What the adapter of kvpress needs: its scorers by name, and stand-ins for what a view does not have."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from kvpolicy.errors import UnsupportedError


def make_press(name: str, parameters: Mapping[str, Any]) -> Any:
    """Return a new scorer of kvpress; raises ValueError when there is none, or when it would not be itself here."""
    try:
        library = import_module("kvpress")
    except ImportError:
        raise ValueError("kvpress is not installed; install it with: pip install 'kvpolicy[kvpress]'") from None
    cls = getattr(library, name, None)
    base: Any = library.ScorerPress
    if not (isinstance(cls, type) and issubclass(cls, base)) or cls is base:
        raise ValueError(f"kvpress has no scorer {name!r}; name a subclass of its ScorerPress")
    for method, what in (("compress", "does more than score"), ("post_init_from_model", "reads the model")):
        if getattr(cls, method) is not getattr(base, method):
            raise ValueError(f"{name} {what}, which the adapter would leave out; use kvpolicy's own component")
    if "compression_ratio" in parameters:
        raise ValueError("compression_ratio follows from the budget; remove it from `parameters`")
    try:
        return cls(**parameters)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{name} does not take these parameters ({error}); give what its class in kvpress takes"
        ) from None


def press_scores(press: Any, keys: Tensor, values: Tensor, ratio: float, layer: int) -> Tensor:
    """Return scores fp32 `[B, H, N]` of keys `[B, H, N, D]` and values.

    Raises UnsupportedError for a press that wants more than these.

    Args:
        press: a new scorer; its compression ratio is set.
        keys: after RoPE.
        values: of the same slots.
        ratio: share that is to be evicted.
        layer: index of the layer.
    """
    name = type(press).__name__
    press.compression_ratio = ratio
    module = _Lacking(name, "the attention module", layer_idx=layer, head_dim=keys.shape[-1])
    hidden, inputs = _Lacking(name, "hidden states"), _Lacking(name, "the model's inputs")
    try:
        scores: Tensor = press.score(module, hidden, keys, values, None, inputs)
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{name} cannot score keys and values alone ({error or type(error).__name__}), and a view holds no more; "
            "name a press that reads only these, or use kvpolicy's own component."
        ) from error
    return scores.float()


class _Lacking(SimpleNamespace):
    """Stands for what a view does not have; whoever reads it is told so."""

    def __init__(self, press: str, what: str, **known: Any) -> None:
        super().__init__(**known)
        self.__dict__["_said"] = press, what

    def __getattr__(self, name: str) -> Any:
        press, what = self.__dict__["_said"]
        raise UnsupportedError(f"{press} reads {what} ({name}), which no view holds; use kvpolicy's own component.")

    def __getitem__(self, key: Any) -> Any:
        return self.__getattr__(str(key))
