"""How long a study will take, by a probe that a script answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvpolicy import KVPolicyError
from kvpolicy.study import estimate
from kvpolicy.study.models import ModelRef
from kvpolicy.study.runs import Plan
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Outcome

REFUSED = "the policy does not fit."


@pytest.fixture
def plan():
    """One batch of the full cache and one of each of two policies, 40 tokens each."""
    spec = StudySpec(
        study="s", models=["m"], datasets=[{"use": "needle", "words": 20}], samples=4, axes={"policy": ["rkv", "h2o"]},
        conditions={"budget": [64]}, sampling={"max_new_tokens": 40},
    )  # fmt: skip
    return Plan(spec, [ModelRef("m", "m", None, "0", "float64", "cpu")])


@pytest.fixture
def probe(monkeypatch):
    """Return a function that says what the probe's runs give; each takes 6 seconds."""
    clock = iter(range(0, 10_000, 6))
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))

    def answer(script):
        def execute(task):
            return [script(task, item) for item in task.items]

        monkeypatch.setattr(estimate, "execute", execute)

    return answer


def test_an_answer_that_ends_before_the_probe_does_not_make_it_fast(plan, probe):
    probe(lambda task, item: Outcome(None, {"tokens": 12.0}, "x", (1,) * 12, 9))
    assert estimate.measure(plan).seconds == pytest.approx(3 * 40 * 6 / 12)


def test_what_cannot_be_run_takes_no_time(plan, probe):
    def script(task, item):
        if task.policy["policy"] == "full":
            return Outcome(error=REFUSED)
        return Outcome(None, {"tokens": 48.0}, "x", (1,) * 48, 9)

    probe(script)
    assert estimate.measure(plan).seconds == pytest.approx(2 * 40 * 6 / 48)


def test_a_study_of_which_nothing_can_be_run_has_no_time(plan, probe):
    probe(lambda task, item: Outcome(error=REFUSED))
    with pytest.raises(KVPolicyError, match="the probe failed, as the study would: the policy does not fit"):
        estimate.measure(plan)
