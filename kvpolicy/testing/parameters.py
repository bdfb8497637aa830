"""Draws the parameters of components: from a pydantic model to a strategy of its instances, kept small."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from kvpolicy.testing._extra import require_hypothesis

require_hypothesis()

from hypothesis import strategies as st  # noqa: E402
from hypothesis.strategies import SearchStrategy  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402

from kvpolicy.contracts.components import Component, kind_of  # noqa: E402
from kvpolicy.errors import UnsupportedError  # noqa: E402
from kvpolicy.loading.installed import catalog  # noqa: E402
from kvpolicy.tables import TableOf  # noqa: E402
from kvpolicy.testing.tables import NAMES, stand_in_tables  # noqa: E402

MOST = 5
"""Largest integer parameter that is drawn: a window of 5 in a cache of 16 shows what a window of 50 in 160 would."""

C = TypeVar("C", bound=Component)


def components(cls: type[C]) -> SearchStrategy[C]:
    """Draw instances of a component class: parameters within their declared bounds, some left at their defaults.

    Integers are drawn from 0 to `MOST`, floats at, near and between their bounds, `Literal` and `bool` from all values,
    components from those that are registered, calibration tables from two stand-ins, which can be read inside of
    `kvpolicy.testing.tables.stand_in_tables` only. Other parameters keep their defaults; where one has none, the
    instances are those that `Component.examples` returns.

    Raises:
        UnsupportedError: a parameter without a default cannot be drawn, and there are no examples.
    """
    optional: dict[str, SearchStrategy[Any]] = {}
    required: dict[str, SearchStrategy[Any]] = {}
    for name, field in cls.model_fields.items():
        values = _values(field)
        if field.is_required():
            if values is None and cls.examples():
                return st.sampled_from(list(cls.examples()))
            if values is None:
                raise UnsupportedError(
                    f"{cls.__name__}.{name}: values of {field.annotation} cannot be drawn; give the parameter a "
                    "default, or let the class method `examples` return instances to check."
                )
            required[name] = values
        elif values is not None:
            optional[name] = values
    drawn = st.fixed_dictionaries(required, optional=optional)
    return drawn.map(lambda values: _made(cls, values)).filter(lambda made: made is not None)  # type: ignore[return-value]


def small(component: C) -> C:
    """Return the component with its large integers made small (odd stays odd), so that small tensors reach them."""
    changes: dict[str, Any] = {}
    for name in type(component).model_fields:
        value = getattr(component, name)
        if isinstance(value, Component):
            changes[name] = small(value)
        if type(value) is int and value > MOST:
            changes[name] = MOST - 1 + value % 2 if name != "seed" else value
    made = _made(type(component), {**dict(component), **changes}) if changes else component
    return component if made is None else made


def _made(cls: type[C], values: dict[str, Any]) -> C | None:
    try:
        with stand_in_tables():
            return cls(**values)
    except ValidationError:  # a validator of the class refuses the combination
        return None


def _values(field: FieldInfo) -> SearchStrategy[Any] | None:  # noqa: PLR0911  # one for each type
    annotation = field.annotation
    if annotation is None:
        return None
    options = [option for option in get_args(annotation) if option is not type(None)]
    if get_origin(annotation) in (Union, UnionType) and len(options) == 1 < len(get_args(annotation)):
        values = _values(FieldInfo.merge_field_infos(field, annotation=options[0]))
        return None if values is None else st.none() | values
    if isinstance(annotation, type) and issubclass(annotation, Component):
        return _registered(annotation)
    low, high, open_low, open_high = _bounds(field)
    if any(isinstance(mark, TableOf) for mark in field.metadata):
        return st.sampled_from(NAMES)
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


def _registered(base: type[Component]) -> SearchStrategy[Component]:
    """Draw registered components of a kind, or of a class, that are not made of other components themselves."""

    def simple(cls: type[Component]) -> bool:
        fields = cls.model_fields.values()
        return issubclass(cls, base) and not any(
            isinstance(f.annotation, type) and issubclass(f.annotation, Component) for f in fields
        )

    def drawn() -> SearchStrategy[Component]:
        known = [entry.component for entry in catalog().entries(kind_of(base)) if simple(entry.component)]
        return st.sampled_from(known).flatmap(components)

    return st.deferred(drawn)


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
