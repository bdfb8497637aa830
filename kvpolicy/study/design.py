"""From a base policy, axes and a design to the variants that are compared."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from kvpolicy.errors import SpecError
from kvpolicy.spec import PolicySpec
from kvpolicy.spec.problems import FieldError, Problems, shown
from kvpolicy.spec.yaml_text import KeyPath
from kvpolicy.study.problem import Compress

Design = Literal["grid", "one-at-a-time", "paired"]

POLICY: Final = "policy"
"""The axis whose values are whole policies."""
BUDGET: Final = "budget"
COMPRESS: Final = "compress"
"""The axis whose values say what is compressed once: it is no part of a policy."""
FULL: Final = "full"
"""Name of the full cache, the reference of every study."""
MOST_VARIANTS: Final = 2_000
_MOST_PROBLEMS: Final = 20  # each is a policy that was tried

_LARGE: Final = 1 << 30  # stands for a budget that is known only after the full cache has run


@dataclass(frozen=True)
class TraceBudget:
    """A budget as a share of the tokens that the full cache sees, prompt included, on average over the problems."""

    share: float

    def __str__(self) -> str:
        return f"{100 * self.share:g}% of the trace"

    def tokens(self, trace: float) -> int:
        """Return the budget in entries per head for traces of `trace` tokens."""
        return max(1, round(self.share * trace))


@dataclass(frozen=True)
class Axis:
    """A path of the policy specification and the values that it takes.

    Attributes:
        path: dotted path, such as ``mixer.weight``, ``importance``, ``budget``, or ``policy`` for whole policies.
        values: plain values as in a policy file; `PolicySpec` for ``policy``; `TraceBudget` is allowed for ``budget``.
        place: the field of the study that it stands in.
    """

    path: str
    values: tuple[Any, ...]
    place: Literal["axes", "conditions"] = "axes"

    @property
    def data(self) -> list[Any]:
        """The values as they are written in a file."""
        return [_data(value) for value in self.values]

    def __hash__(self) -> int:
        return hash((self.path, json.dumps(self.data, sort_keys=True)))


@dataclass(frozen=True)
class Variant:
    """One policy that is measured.

    Attributes:
        name: what distinguishes it from the others on the axes.
        condition: what distinguishes it on the conditions; empty if there are none.
        policy: the policy; its budget stands for nothing if `trace` is given.
        trace: the budget as a share of the full cache's trace.
        compress: what is compressed to the budget once; None leaves that to the policy's trigger and phase.
        settings: path -> value as text, for axes and conditions.
    """

    name: str
    condition: str
    policy: PolicySpec
    trace: TraceBudget | None = None
    settings: tuple[tuple[str, str], ...] = ()
    compress: Compress | None = None

    @property
    def label(self) -> str:
        """Name and condition."""
        return f"{self.name} | {self.condition}" if self.condition else self.name

    def resolved(self, trace: float | None) -> PolicySpec:
        """Return the policy with its budget in entries.

        Args:
            trace: tokens that the full cache sees on average; needed if `self.trace` is given.

        Raises:
            SpecError: fewer entries than the policy protects.
        """
        if self.trace is None:
            return self.policy
        if trace is None:
            raise SpecError(
                "budget: the full cache has not answered any problem yet, so a share of its trace is no number."
            )
        return self.policy.replace("budget", {"tokens": self.trace.tokens(trace)})


Assignment = tuple[tuple[Axis, int], ...]
"""Axes, each with the index of one of its values."""


def expand(
    base: PolicySpec | None,
    axes: Sequence[Axis],
    conditions: Sequence[Axis],
    design: Design,
    exclude: Sequence[Mapping[str, Any]] = (),
    compress: Compress | None = None,
) -> list[Variant]:
    """Return all variants, in the order of the file; raises FieldError, located at the value that is wrong.

    Args:
        base: the policy that is varied; None if an axis or condition names whole policies.
        axes: what is compared.
        conditions: circumstances in which the comparison is made: every variant meets every combination.
        design: grid: all combinations of the axes; one-at-a-time: the base, and each other value of each axis alone;
            paired: the first values of all axes, the second values of all axes, and so on.
        exclude: combinations that are left out, as path -> value.
        compress: what is compressed once, where no axis says it.

    The full cache is left out, whatever its budget: every study measures it once, as the reference.
    """
    # No more is counted than has to be: a product of long axes would take all memory.
    choices = list(itertools.islice(_assignments(axes, design), MOST_VARIANTS + 1))
    circumstances = list(itertools.islice(_assignments(conditions, "grid"), MOST_VARIANTS + 1))
    if len(choices) * len(circumstances) > MOST_VARIANTS:
        raise FieldError(
            ("axes",), f"make more than {MOST_VARIANTS:,} variants, with all conditions; leave out some values."
        )
    variants: dict[str, Variant] = {}
    known: dict[tuple[str, str], str] = {}
    problems = Problems()
    blamed: set[KeyPath] = set()
    for condition, choice in itertools.product(circumstances, choices):
        assignment = (*choice, *condition)
        if _excluded(assignment, exclude) or any((axis.place, axis.path, i) in blamed for axis, i in assignment):
            continue
        try:
            variant = _variant(base, choice, condition, design, compress)
        except FieldError as error:
            blamed |= {problem.path for problem in error}
            said = {(problem.path[:-1], problem.message) for problem in problems.found}
            # What is wrong with an axis itself is so at each of its values.
            problems.found += (p for p in error if (p.path[:-1], p.message) not in said)
            if len(problems.found) >= _MOST_PROBLEMS:
                break
            continue
        if variant is None:
            continue
        what = json.dumps([identity(variant.policy), str(variant.trace), variant.compress])
        if (variant.condition, what) in known:
            if design == "one-at-a-time":  # a value that the base has
                continue
            other = known[variant.condition, what]
            raise FieldError(("axes",), f"{variant.name!r} and {other!r} are the same policy; remove one.")
        if variant.label in variants:
            raise FieldError(("axes",), f"two different variants are called {variant.label!r}; rename one policy.")
        known[variant.condition, what] = variant.name
        variants[variant.label] = variant
    problems.check()
    if not variants:
        if exclude:
            raise FieldError(("exclude",), "leaves no variant; remove some of it.")
        raise FieldError(
            ("axes",), "name nothing but the full cache, which every study measures; name a policy that evicts."
        )
    return list(variants.values())


def _assignments(axes: Sequence[Axis], design: Design) -> Iterator[Assignment]:
    if design == "grid":
        for indices in itertools.product(*(range(len(axis.values)) for axis in axes)):
            yield tuple(zip(axes, indices, strict=True))
    elif design == "paired":
        lengths = {axis.path: len(axis.values) for axis in axes}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{path} has {n}" for path, n in lengths.items())
            raise FieldError(("design",), f"paired axes need as many values each, but {counts}.")
        for index in range(next(iter(lengths.values()), 1)):
            yield tuple((axis, index) for axis in axes)
    else:
        yield ()
        for axis in axes:
            yield from (((axis, index),) for index in range(len(axis.values)))


def _excluded(assignment: Assignment, exclude: Sequence[Mapping[str, Any]]) -> bool:
    values = {axis.path: _short(axis.values[i]) for axis, i in assignment}
    return any(all(values.get(path) == _short(value) for path, value in each.items()) for each in exclude)


def _variant(
    base: PolicySpec | None, choice: Assignment, condition: Assignment, design: Design, compress: Compress | None
) -> Variant | None:
    """Return one policy that is measured, or None when it is the full cache."""
    chosen = {axis.path: axis.values[i] for axis, i in (*condition, *choice)}
    start, compress = chosen.pop(POLICY, base), chosen.pop(COMPRESS, compress)
    trace = chosen.get(BUDGET)
    changes = {path: value for path, value in chosen.items() if not isinstance(value, TraceBudget)}
    if isinstance(trace, TraceBudget):
        changes[BUDGET] = {"tokens": _LARGE}
    if _is_full(start, changes):
        return None
    try:
        policy = start.replace(changes) if changes else start
    except SpecError as error:
        raise _blamed(start, (*condition, *choice), error) from None
    name = _name(choice, every=design == "one-at-a-time") or policy.policy
    return Variant(
        name,
        _name(condition),
        policy,
        trace if isinstance(trace, TraceBudget) else None,
        tuple((axis.path, _short(axis.values[i])) for axis, i in (*choice, *condition)),
        compress,
    )


def _is_full(start: PolicySpec, changes: Mapping[str, Any]) -> bool:
    """Whether a policy keeps everything and still ranks nothing once all but its budget has been changed."""
    if start.budget.fraction != 1.0:
        return False
    others = {path: value for path, value in changes.items() if path.split(".")[0] != BUDGET}
    try:
        built = (start.replace(others) if others else start).build()
    except SpecError:
        return False  # which is said with the rest
    return not built.ranks


def _blamed(start: PolicySpec, assignment: Assignment, error: SpecError) -> FieldError:
    """Find the value that is wrong on its own; otherwise it is the combination."""
    for axis, i in assignment:
        value = axis.values[i]
        if axis.path in (POLICY, COMPRESS) or isinstance(value, TraceBudget):
            continue
        try:
            start.replace(axis.path, value)
        except SpecError as alone:
            message = str(alone).removeprefix(f"{axis.path}: ")
            if start.policy not in message:
                message = f"{message} (The policy is {start.policy!r}.)"
            return FieldError((axis.place, axis.path, i), message, type(alone))
    return FieldError(
        ("axes",), f"{_name(assignment, every=True)} cannot be combined: {error} Write `exclude` to leave it out."
    )


def _name(assignment: Assignment, *, every: bool = False) -> str:
    """Return what tells an assignment from others; axes of a single value do not, unless `every` is to be named."""
    parts = []
    for axis, i in assignment:
        if len(axis.values) == 1 and not every and axis.path != POLICY:
            continue
        text = _short(axis.values[i])
        parts.append(text if axis.path == POLICY else f"{axis.path}={text}")
    return ", ".join(parts)


def _short(value: Any) -> str:
    """Return a value as labels show it."""
    if isinstance(value, PolicySpec):
        return value.policy
    if isinstance(value, Mapping) and isinstance(value.get("use"), str):
        rest = ", ".join(f"{key}={_short(v)}" for key, v in value.items() if key != "use")
        return f"{value['use']}({rest})" if rest else value["use"]
    if isinstance(value, Mapping) and set(value) == {"tokens"}:
        return _short(value["tokens"])
    # On an axis of something else it may be anything.
    if isinstance(value, Mapping) and set(value) == {"trace"} and isinstance(value["trace"], int | float):
        return str(TraceBudget(value["trace"]))
    if isinstance(value, str | TraceBudget):
        return str(value)
    return json.dumps(value)


def identity(policy: PolicySpec) -> dict[str, Any]:
    """Return what makes a policy act as it does: all but its name and texts."""
    texts = ("policy", "description", "paper", "departures")
    return {field: value for field, value in policy.to_data().items() if field not in texts}


def _data(value: Any) -> Any:
    if isinstance(value, PolicySpec):
        return value.to_data()
    return {"trace": value.share} if isinstance(value, TraceBudget) else value


def read_trace(value: Any, path: KeyPath) -> TraceBudget:
    """Return the budget that ``{trace: 0.1}`` stands for; raises FieldError."""
    share = value["trace"]
    if len(value) > 1:
        raise FieldError(path, f"{{trace: ...}} stands alone, got {shown(value)}.")
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise FieldError((*path, "trace"), f"should be a number above 0 and at most 1, got {shown(share)}.")
    return TraceBudget(float(share))
