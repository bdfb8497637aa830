"""The base of every component.

Apart from `components`, and without torch, like `trigger`: a scheduler that only counts entries needs no tensors.
"""

from __future__ import annotations

import ast
import inspect
import sys
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self
from weakref import WeakKeyDictionary

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from torch import Tensor

    from kvpolicy.contracts.slot_state import NewTokens, SlotState
    from kvpolicy.contracts.view import CacheView

LONGEST_TEXT: Final = 1 << 31
"""No text has more tokens, for positions have 32 bits: a larger budget, interval or window comes to nothing."""

DEEPEST: Final = 16
"""Components that may be held one by the other."""


class Component(BaseModel, ABC):
    """Base of every component: frozen, hashable, printable, and strict about its parameters.

    Class attributes:
        needs: names out of `NEEDS` without which the component cannot work.
        shorthand: the parameter that a bare value in YAML stands for, as in ``trigger: {every: 128}``.
        paper: where the method comes from.
        laws_not_applicable: law name -> reason, for `kvpolicy.testing`; `laws_excused` where it hangs on parameters.
        whole_prompt: the prompt must come in one forward pass, because its tokens look ahead; no `prefill_chunk`.
        same_for_layers: the result does not depend on `layer_idx`, so that several layers may be scored as one view
            with more rows. A promise that a law checks; False is always right.
        formerly: former name of a parameter -> its present one; files that use it are read on, with a warning.
        phases: the phases in which the component makes sense; a policy with another phase is refused.

    A field may itself hold a component (``base: ImportanceScorer``); in YAML it is written as a reference. A whole
    number is at most `LONGEST_TEXT` in size, unless its field declares an upper bound of its own, as a seed does
    (``Field(ge=0, lt=2**64)``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    needs: ClassVar[frozenset[str]] = frozenset()
    shorthand: ClassVar[str | None] = None
    paper: ClassVar[str] = ""
    laws_not_applicable: ClassVar[Mapping[str, str]] = {}
    formerly: ClassVar[Mapping[str, str]] = {}
    whole_prompt: ClassVar[bool] = False
    same_for_layers: ClassVar[bool] = False
    phases: ClassVar[frozenset[str]] = frozenset({"prefill", "decode"})

    @field_validator("*")
    @classmethod
    def _bounded(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse numbers that no text can reach, and components that are nested without need."""
        name = info.field_name or ""
        if type(value) is int and abs(value) > LONGEST_TEXT and not has_upper_bound(cls.model_fields[name]):
            raise ValueError(f"should be at most {LONGEST_TEXT}, for no text has more tokens")
        held, depth = [value], 0
        while held := [inner for each in held if isinstance(each, Component) for inner in dict(each).values()]:
            depth += 1
            if depth >= DEEPEST:
                raise ValueError(f"holds components that are nested more than {DEEPEST} deep; nest fewer")
        return value

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        """Return pydantic's JSON schema, with what the class says of its parameters."""
        schema = super().model_json_schema(*args, **options)
        for name, text in descriptions(cls).items():
            if text:
                schema["properties"][name]["description"] = text
        return schema

    def laws_excused(self) -> Mapping[str, str]:
        """Return the laws that do not apply with these parameters, and why; `laws_not_applicable` by default."""
        return self.laws_not_applicable

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Return instances for `kvpolicy.testing` where parameters cannot be drawn, such as a file; none by default."""
        return ()

    def members(self) -> Iterator[Component]:
        """Yield this component and then those that its fields hold."""
        yield self
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Component):
                yield from value.members()

    def slot_state(self) -> tuple[SlotState, ...]:
        """Declare the slot-aligned memory that this component keeps; none by default."""
        return ()

    def remember(self, view: CacheView) -> Mapping[str, Tensor]:
        """Return new slot state by name, `[B, H, N]`, to be kept with the entries that a compaction leaves.

        Called once per layer and compaction, after the selection and before anything is moved, with the view that was
        scored. Nothing by default.
        """
        return {}

    def enter(self, tokens: NewTokens) -> Mapping[str, Tensor]:
        """Return the slot state of new tokens by name, `[B, H, q]`, made of what the layer's attention reads of them.

        Only for components that declare the need ``hidden_states``. Called once for every token and layer, after its
        key has been stored; the hidden states are not kept.
        """
        raise TypeError(f"{type(self).__name__} needs no hidden states and must not be asked what they say.")

    def observed_queries(self) -> int:
        """How many of the last queries the component wants to see in `CacheView.queries`; 0 by default."""
        return 0


_NAMES: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def note_name(component: type[Component], name: str) -> None:
    """Remember what files call a component."""
    _NAMES[component] = name


def named(component: Component) -> str:
    """Return what files call a component: the name that it is registered by, or that of its class if it is not."""
    return _NAMES.get(type(component), type(component).__name__)


def has_upper_bound(field: FieldInfo) -> bool:
    """Return whether a field itself declares how large its value may be."""
    return any(getattr(mark, name, None) is not None for mark in field.metadata for name in ("le", "lt"))


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Return what a class says of its fields: the text below each, or `Field(description=...)`; "" if nothing.

    The source is read when somebody asks. Left to pydantic (`use_attribute_docstrings`) it would be read for every
    class that is made, which takes longer than all else of importing the bundled components.
    """
    below: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        below |= _texts_of(owner.__module__).get(owner.__qualname__, {})
    return {name: info.description or below.get(name, "") for name, info in model.model_fields.items()}


@lru_cache(maxsize=256)
def _texts_of(module: str) -> dict[str, dict[str, str]]:
    """Return the texts below annotated names, for every class of a module by its qualified name."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):  # it has no source
        return {}
    found: dict[str, dict[str, str]] = {}

    def read(body: Sequence[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[f"{prefix}{node.name}"] = _texts_below(node.body)
                read(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                read(node.body, f"{prefix}{node.name}.<locals>.")
            else:
                read([each for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt)], prefix)

    read(tree.body, "")
    return found


def _texts_below(body: Sequence[ast.stmt]) -> dict[str, str]:
    found = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            value = text.value.value if isinstance(text.value, ast.Constant) else None
            if isinstance(value, str):
                found[field.target.id] = inspect.cleandoc(value)
    return found
