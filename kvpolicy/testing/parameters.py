"""Draws the parameters of components: from a pydantic model to a strategy of its instances, kept small."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args, get_origin

from kvpolicy.testing._extra import require_hypothesis

require_hypothesis()

from hypothesis import strategies as st  # noqa: E402
from hypothesis.strategies import SearchStrategy  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402

from kvpolicy.components import Component  # noqa: E402
from kvpolicy.errors import UnsupportedError  # noqa: E402

MOST = 5
"""Largest integer parameter that is drawn: a window of 5 in a cache of 16 shows what a window of 50 in 160 would."""

C = TypeVar("C", bound=Component)


def components(cls: type[C]) -> SearchStrategy[C]:
    """Draw instances of a component class: parameters within their declared bounds, some left at their defaults.

    Integers are drawn from 0 to `MOST`, floats at, near and between their bounds, `Literal` and `bool` from all values.

    Raises:
        UnsupportedError: a parameter without a default has a type that cannot be drawn; check an instance instead.
    """
    optional: dict[str, SearchStrategy[Any]] = {}
    required: dict[str, SearchStrategy[Any]] = {}
    for name, field in cls.model_fields.items():
        values = _values(field)
        if field.is_required():
            if values is None:
                raise UnsupportedError(
                    f"{cls.__name__}.{name}: values of {field.annotation} cannot be drawn; give the parameter a "
                    "default, or check an instance instead of the class."
                )
            required[name] = values
        elif values is not None:
            optional[name] = values
    drawn = st.fixed_dictionaries(required, optional=optional)
    return drawn.map(lambda values: _made(cls, values)).filter(lambda made: made is not None)  # type: ignore[return-value]


def small(component: C) -> C:
    """Return the component with its large integers made small (odd stays odd), so that small tensors reach them."""
    changes = {}
    for name in type(component).model_fields:
        value = getattr(component, name)
        if type(value) is int and value > MOST:
            changes[name] = MOST - 1 + value % 2 if name != "seed" else value
    made = _made(type(component), {**dict(component), **changes}) if changes else component
    return component if made is None else made


def _made(cls: type[C], values: dict[str, Any]) -> C | None:
    try:
        return cls(**values)
    except ValidationError:  # a validator of the class refuses the combination
        return None


def _values(field: FieldInfo) -> SearchStrategy[Any] | None:
    annotation = field.annotation
    low, high, open_low, open_high = _bounds(field)
    if get_origin(annotation) is Literal:
        return st.sampled_from(list(get_args(annotation)))
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        least = 0 if low is None else int(low) + open_low
        most = least + MOST if high is None else min(int(high) - open_high, least + MOST)
        return st.integers(least, max(most, least))
    if annotation is float:
        bottom = 0.0 if low is None else float(low)
        top = max(bottom, 1.0) if high is None else float(high)
        top = top if top > bottom else bottom + 1.0
        shares = [0.0] * (not open_low) + [1.0] * (not open_high) + [0.5, 0.1, 0.9]
        return st.sampled_from([bottom + share * (top - bottom) for share in shares])
    return None


def _bounds(field: FieldInfo) -> tuple[float | None, float | None, bool, bool]:
    """Return (lower, upper, lower excluded, upper excluded)."""
    low = high = None
    open_low = open_high = False
    for limit in field.metadata:
        if getattr(limit, "ge", None) is not None:
            low = limit.ge
        if getattr(limit, "gt", None) is not None:
            low, open_low = limit.gt, True
        if getattr(limit, "le", None) is not None:
            high = limit.le
        if getattr(limit, "lt", None) is not None:
            high, open_high = limit.lt, True
    return low, high, open_low, open_high
