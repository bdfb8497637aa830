"""Results of a study whose runs nobody has to wait for: no model is loaded, a function says what each run gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from kvpolicy.study.executors import Executor, Outcomes
from kvpolicy.study.models import ModelRef
from kvpolicy.study.results import Results
from kvpolicy.study.runner import Runner
from kvpolicy.study.runs import Plan, Run
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Item, Outcome, Task

Script = Callable[[Task, Item], Outcome]
"""What a run gives, by its task (kind, model, policy as plain values) and its item (problem, seed)."""


class Scripted(Executor):
    """Asks a function instead of running a task.

    Args:
        script: the function; what it raises, a worker would have raised.
    """

    def __init__(self, script: Script) -> None:
        self.script = script

    def submit(self, task: Task) -> Outcomes:
        """Ask for every item of a task."""
        future: Outcomes = Future()
        future.set_result([self.script(task, item) for item in task.items])
        return future

    def close(self) -> None:
        """Do nothing."""


class _Silent:
    def begin(self, stage: str, runs: int, tokens: int) -> None:
        pass

    def advance(self, runs: Sequence[Run], outcomes: Sequence[Outcome], tokens: int) -> None:
        pass


def scripted_study(spec: StudySpec, path: Path, script: Script) -> None:
    """Write the results file that `kvpolicy study run` would write if runs gave what the script says.

    Args:
        spec: the study; its models need not exist.
        path: the results file.
        script: what each run gives; those of the full cache need the metric ``tokens``.
    """
    models = [ModelRef(name, name, None, f"{i:016x}", "float64", "cpu") for i, name in enumerate(spec.models, 1)]
    with Results(path, spec.study) as results, Scripted(script) as executor:
        Runner(Plan(spec, models), results, executor, _Silent()).run()
