"""Checks components, policies and packages against the laws."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import isabstract
from typing import Any, Final, Literal

from kvpolicy.testing._extra import require_hypothesis

require_hypothesis()

import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, given, reject, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402

import kvpolicy  # noqa: E402
from kvpolicy.contracts.components import Component, kind_of  # noqa: E402
from kvpolicy.errors import KVPolicyError, UnsupportedError, did_you_mean  # noqa: E402
from kvpolicy.loading.entries import same_package  # noqa: E402
from kvpolicy.policy.policy import Policy  # noqa: E402
from kvpolicy.spec import PolicySpec  # noqa: E402
from kvpolicy.testing.laws import LAWS, Law, LawBrokenError, UndecidedError, exceptions_of  # noqa: E402
from kvpolicy.testing.laws.machine import latest_steps  # noqa: E402
from kvpolicy.testing.parameters import components, small  # noqa: E402
from kvpolicy.testing.scaling import small_policy  # noqa: E402
from kvpolicy.testing.source import pasteable_test, tensors_of  # noqa: E402
from kvpolicy.testing.tables import stand_in_tables  # noqa: E402

ProfileName = Literal["brief", "quick", "thorough"]
PROFILES: Final[Mapping[str, int]] = {"brief": 5, "quick": 20, "thorough": 1000}
"""Profile -> examples per law and subject. `thorough` draws others every time, the rest the same every time."""

_STEPS = {"brief": 12, "quick": 12, "thorough": 50}  # of the state machine
_DECIDED_LEAST = 0.25  # share of the examples that must have said something
_SILENT_LEAST = 20  # so many examples that say nothing are drawn again, however few are wanted

Status = Literal["passed", "failed", "undecided", "not applicable"]
BAD: Final[frozenset[Status]] = frozenset({"failed", "undecided"})
"""What must not be taken for a law that holds."""


@dataclass(frozen=True)
class Failure:
    """Why a law does not hold.

    Attributes:
        message: what went wrong, in a sentence or two.
        example: the smallest example found, readable; "" when there was nothing to draw.
        test: source of a test that fails for the same reason; "" when drawing already failed.
    """

    message: str
    example: str = ""
    test: str = ""


@dataclass(frozen=True)
class Result:
    """One law and one subject.

    Attributes:
        law: name of the law.
        subject: name of the component or policy.
        status: ``passed``, ``failed``, ``undecided`` (too few examples said anything) or ``not applicable``.
        reason: why it does not apply, or why it is undecided.
        failure: details of a failure.
        seconds: wall time.
        decided: examples that said something.
    """

    law: str
    subject: str
    status: Status
    reason: str = ""
    failure: Failure | None = None
    seconds: float = 0.0
    decided: int = 0

    def expect(self) -> None:
        """Raise AssertionError with all details if the law does not hold, or if that is undecided."""
        if self.status in BAD:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        if self.failure is None:
            return f"{self.subject}: {self.law} {self.status}{': ' + self.reason if self.reason else ''}"
        law = LAWS.get(self.law)
        parts = [f"{self.subject} breaks the law {self.law}: {self.failure.message}"]
        if law is not None:
            parts.append(f"The law: {law.text}\nWhy: {law.reason}")
        if self.failure.example:
            parts.append(f"Smallest example:\n{self.failure.example}")
        if self.failure.test:
            parts.append(f"As a test:\n{self.failure.test}")
        return "\n\n".join(parts)


@dataclass(frozen=True)
class Subject:
    """A component class, a component or a policy under the name it has in tables.

    Attributes:
        name: for tables.
        kind: kind of component, or ``policy``.
        what: what is checked; None for a policy that cannot be read.
        error: why it cannot be read.
    """

    name: str
    kind: str
    what: type[Component] | Component | Policy | None
    error: str = ""

    @property
    def laws(self) -> list[Law]:
        """The laws about this kind."""
        return [law for law in LAWS.values() if self.kind in law.kinds and not self.error]

    def drawn(self) -> st.SearchStrategy[Any]:
        """Draw instances: of a class with drawn parameters, small like the caches, else always the same one."""
        return components(self.what).map(small) if isinstance(self.what, type) else st.just(self.what)


def subject_of(what: Any, name: str | None = None) -> Subject:
    """Return the subject for a component class or instance, a policy, a specification, or a policy's name or file.

    Policies are made small (`kvpolicy.testing.scaling`): few slots must show what thousands would.
    """
    if isinstance(what, str):
        what = kvpolicy.load(what)
    if isinstance(what, PolicySpec):
        what = what.build()
    if isinstance(what, Policy):
        return Subject(name or what.name, "policy", small_policy(what))
    cls = what if isinstance(what, type) else type(what)
    kind = kind_of(cls)
    if isabstract(cls):
        raise UnsupportedError(
            f"{cls.__name__} is abstract; implement {', '.join(sorted(getattr(cls, '__abstractmethods__', ())))}."
        )
    return Subject(name or cls.__name__, kind, what)


def check_component(
    component: type[Component] | Component, profile: ProfileName = "quick", name: str | None = None
) -> list[Result]:
    """Check a component class (with drawn parameters) or an instance against every law about its kind."""
    return check(subject_of(component, name), profile)


def check_policy(policy: Policy | PolicySpec | str, profile: ProfileName = "quick") -> list[Result]:
    """Check a policy, made small, against every law about policies."""
    return check(subject_of(policy), profile)


def check_package(distribution: str, profile: ProfileName = "quick") -> list[Result]:
    """Check all components and policies that an installed distribution registers; raises KVPolicyError if none."""
    return [result for subject in subjects_of_package(distribution) for result in check(subject, profile)]


def subjects_of_package(distribution: str | None) -> list[Subject]:
    """Return what a distribution registers, or all that is registered; raises KVPolicyError if there is nothing."""

    def wanted(entry: Any) -> bool:
        return distribution is None or same_package(entry.origin.distribution, distribution)

    found = kvpolicy.catalog()
    subjects = [subject_of(e.component, f"{e.kind}.{e.name}") for e in found.entries() if wanted(e)]
    subjects += [_registered_policy(e.name) for e in found.policies() if wanted(e)]
    if not subjects:
        entries: list[Any] = [*found.entries(), *found.policies()]
        names = sorted({e.origin.distribution for e in entries})
        failed = "".join(f" Note: {failure.error}" for failure in found.failures)
        raise KVPolicyError(
            f"package {distribution!r} registers no component and no policy.{did_you_mean(distribution or '', names)} "
            f"Packages that do: {', '.join(names)}.{failed}"
        )
    return subjects


def _registered_policy(name: str) -> Subject:
    """Return a policy, or the reason why it cannot be read: the others are checked all the same."""
    try:
        return subject_of(kvpolicy.load(name), name)
    except KVPolicyError as error:
        return Subject(name, "policy", None, str(error))


def check(
    subject: Subject,
    profile: ProfileName = "quick",
    *,
    laws: Iterable[Law] | None = None,
    shrink: bool = True,
    done: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Check one subject.

    Args:
        subject: what to check.
        profile: how many examples, see `PROFILES`.
        laws: only these.
        shrink: look for the smallest failing example.
        done: called with each result, for progress bars.

    Raises KVPolicyError when there is no such profile.
    """
    if profile not in PROFILES:
        raise KVPolicyError(f"profile: {profile!r} is none; write {', '.join(PROFILES)}.")
    if subject.error:
        return [Result("can_be_read", subject.name, "failed", failure=Failure(subject.error))]
    results = [*_unknown_exceptions(subject)]
    for law in subject.laws if laws is None else laws:
        start = time.perf_counter()
        result = _Trial(law, subject, profile, shrink).result()
        results.append(replace(result, seconds=time.perf_counter() - start))
        if done is not None:
            done(results[-1])
    return results


def _unknown_exceptions(subject: Subject) -> list[Result]:
    """Refuse exceptions that are no laws, or that come without a reason."""
    what = subject.what
    declared = what.laws_not_applicable if isinstance(what, type) else exceptions_of(what)
    return [Result(name, subject.name, "failed", failure=Failure(why)) for name, why in _wrong(declared).items()]


def _wrong(declared: Mapping[str, str]) -> dict[str, str]:
    """Return what is wrong with declared exceptions, by their names."""
    found = {}
    for name, reason in declared.items():
        if name not in LAWS:
            found[name] = f"an exception is declared from {name!r}, which is no law.{did_you_mean(name, LAWS)}"
        elif not str(reason).strip():
            found[name] = f"no reason for {name!r} is given; say in a sentence why it cannot hold."
    return found


class _Trial:
    """One law and one subject; remembers the last failing example, which after shrinking is the smallest.

    An example decides, or is excused (the drawn instance is an exception), or says nothing (`UndecidedError`). Those
    that say nothing are drawn again, as many times as there are examples; if hardly any is left, so is the law.
    """

    def __init__(self, law: Law, subject: Subject, profile: ProfileName, shrink: bool) -> None:
        self.law, self.subject, self.profile = law, subject, profile
        self.excused: set[str] = set()
        self.silent: Counter[str] = Counter()
        self.decided = 0
        self.failing: tuple[Any, dict[str, Any], Exception] | None = None
        examples = max(1, round(PROFILES[profile] * law.effort)) if law.effort else 1
        self.settings = settings(
            max_examples=examples,
            stateful_step_count=_STEPS[profile],
            derandomize=profile != "thorough",
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )

    def result(self) -> Result:
        """Run the law."""
        made = partial(Result, self.law.name, self.subject.name)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with stand_in_tables():  # the shipped ones are of one model, examples have all shapes
                self._machine() if self.law.machine is not None else self._search()
        except Unsatisfiable:
            pass
        except Exception as error:  # noqa: BLE001  # a broken component may raise anything
            return made("failed", failure=self._failure(error), decided=self.decided)
        finally:
            torch.set_num_threads(threads)
        if self.excused and not self.decided and not self.silent:
            return made("not applicable", reason="; ".join(sorted(self.excused)))
        if self.decided < _DECIDED_LEAST * self.settings.max_examples:
            return made("undecided", reason=self._too_few(), decided=self.decided)
        return made("passed", decided=self.decided)

    def _too_few(self) -> str:
        why = ", ".join(f"{count} times {reason}" for reason, count in self.silent.most_common())
        return (
            f"only {self.decided} of {self.settings.max_examples} examples said anything "
            f"({why or 'no more could be drawn'})"
        )

    def _excuse(self, made: Any) -> str | None:
        declared = exceptions_of(made)
        told = self.subject.what.laws_not_applicable if isinstance(self.subject.what, type) else declared
        for name, wrong in _wrong(declared).items():
            if name not in told:
                raise LawBrokenError(wrong)
        why = self.law.unless(made) if self.law.unless is not None else None
        return why or declared.get(self.law.name)

    def _search(self) -> None:
        @self.settings
        @given(st.data())
        def trial(data: st.DataObject) -> None:
            made = data.draw(self.subject.drawn())
            excuse = self._excuse(made)
            if excuse is not None:
                self.excused.add(excuse)
                reject()
            drawn = data.draw(self.law.draws(made)) if self.law.draws is not None else {}
            try:
                self.law.statement(made, **drawn)
                self.decided += 1
            except UndecidedError as error:
                self.silent[str(error)] += 1
                # A subject about which the law never says anything must not make hypothesis search for ever.
                if self.silent.total() < max(self.settings.max_examples, _SILENT_LEAST):
                    reject()
            except Exception as error:
                self.failing = (made, drawn, error)
                raise

        trial()

    def _machine(self) -> None:
        made = self.subject.what
        excuse = self._excuse(made)
        if excuse is not None:
            self.excused.add(excuse)
            return
        assert self.law.machine is not None
        machine = self.law.machine(made)
        try:
            run_state_machine_as_test(machine, settings=self.settings)
        except Exception as error:
            self.failing = (made, {"steps": latest_steps()}, error)
            raise
        self.decided, silent = machine.decided, machine.runs - machine.decided
        if silent:
            self.silent["nothing was evicted"] = silent

    def _failure(self, error: Exception) -> Failure:
        if self.failing is None:
            return Failure(f"while an example was drawn: {_said(error)}")
        made, drawn, cause = self.failing
        lines = [f"subject: {made!r}"] if isinstance(made, Component) else []
        for name, value in drawn.items():
            lines += tensors_of(value, name if name != "case" else "")
        return Failure(_said(cause), "\n".join(lines), pasteable_test(self.law.name, _said(cause), made, drawn))


def _said(error: BaseException) -> str:
    text = str(error).strip()
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"
