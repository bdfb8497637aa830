from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from kvpolicy.study.executors import Inline
from kvpolicy.study.models import find_model
from kvpolicy.study.results import Results
from kvpolicy.study.runner import Runner
from kvpolicy.study.runs import Plan
from kvpolicy.study.spec import StudySpec
from kvpolicy.testing.tiny import tiny_folder

WORDS = "the cat sat on a mat and then it ran away from the big dog who was not amused at all by it"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model in float64 (it is small), with a tokenizer of one token per character."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", "qwen3")


@pytest.fixture
def folder(tmp_path):
    """A folder with a JSON Lines file of 12 sums and a text of 500 words."""
    rows = [{"problem": f"What is {i} plus {3 * i}?", "answer": str(4 * i)} for i in range(12)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "cat.txt").write_text(" ".join([WORDS] * 25))
    return tmp_path


class Counted:
    """Progress that is kept."""

    def __init__(self):
        self.stages = {}
        self.recorded = []

    def begin(self, stage, runs, tokens):
        self.stages[stage] = runs

    def advance(self, runs, outcomes, tokens):
        self.recorded += [run.key for run in runs]


@pytest.fixture
def study(model_folder):
    """Return functions that make and run a study of the tiny model in this process."""

    def make(**fields):
        data = {
            "study": "small",
            "models": [str(model_folder)],
            "datasets": [{"use": "needle", "words": 20, "chat": False}],
            "axes": {"policy": ["rkv", "random"]},
            "conditions": {"budget": [64], "trigger.interval": [16]},
            "samples": 4,
            "sampling": {"max_new_tokens": 40},
            "batch": 4,
        }
        return StudySpec(**{**data, **fields})

    def plan(spec):
        return Plan(spec, [find_model(name, spec.dtype, "cpu") for name in spec.models])

    def run(spec, path, *, executor=None, made=None, retry_failed=False):
        progress = Counted()
        with Results(path, spec.study) as results, executor or Inline() as where:
            Runner(made or plan(spec), results, where, progress, retry_failed=retry_failed).run()
        return progress

    return SimpleNamespace(make=make, plan=plan, run=run)


@pytest.fixture
def table():
    """Return a function that reads all that a results file says, but times."""

    def place(r):
        return r.model, r.dataset, r.problem, r.seed, r.digest, r.kind, r.error, r.output

    def numbers(r):  # attention weights are fp32
        return sorted((name, round(value, 6)) for name, value in r.metrics.items() if name != "seconds")

    def read(path):
        with Results(path) as results:
            records = [(*place(r), *numbers(r)) for r in results.records()]
            return records, results.cells()

    return read
