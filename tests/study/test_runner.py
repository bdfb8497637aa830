from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

import kvpolicy
from kvpolicy import KVPolicyError
from kvpolicy.study import work
from kvpolicy.study.analysis import compare, summarise
from kvpolicy.study.executors import Executor, Inline, Processes
from kvpolicy.study.models import find_model
from kvpolicy.study.results import Results, ResultsError
from kvpolicy.study.runs import tasks_of

EVERYTHING = {
    "datasets": [
        {"use": "needle", "words": 20, "chat": False, "forced": True},
        {"use": "generator", "family": "prompt-recall", "level": "short", "max_new_tokens": 20},
    ],
    "conditions": {"budget": [{"trace": 0.3}, 40], "trigger.interval": [16]},
    "seeds": [0, 1],
    "metrics": ["exact", "kl", "attention_mass", "seconds"],
}


@pytest.fixture
def everything(study):
    return study.make(**EVERYTHING)


def test_every_variant_meets_every_problem(study, everything, tmp_path):
    progress = study.run(everything, tmp_path / "r.sqlite")
    assert len(progress.recorded) == len(set(progress.recorded)) == sum(progress.stages.values())
    # 2 datasets x 2 seeds of 4 fresh problems; the needles are also read under teacher forcing
    assert progress.stages == {"full cache": 16, "variants": 4 * (16 + 8)}
    with Results(tmp_path / "r.sqlite") as results:
        rows = summarise(results)
        cells = results.cells()
    assert [row.cell.name for row in rows] == ["full", "rkv", "random", "rkv", "random"] * 2
    assert {row.failed for row in rows} == {0}
    needles = rows[:5]
    assert needles[0].metrics["retained_fraction"].value == 1
    assert {len(row.values["exact"]) for row in rows} == {8}
    assert set(needles[1].metrics) >= {"exact", "tokens", "kl", "top1", "attention_mass", "bytes_peak", "seconds"}
    full = needles[0].metrics["resident_peak"].value + 1  # the last token of an answer is never fed
    assert f"tokens: {round(0.3 * full)}" in cells[1].policy
    assert "tokens: 40" in cells[3].policy
    assert {c.baseline for c in compare(rows, "kl")} == {"rkv"}


def test_a_second_run_has_nothing_to_do_and_more_problems_add_to_it(study, tmp_path):
    spec, path = study.make(), tmp_path / "r.sqlite"
    study.run(spec, path)
    assert study.run(spec, path).recorded == []
    more = study.run(spec.model_copy(update={"samples": 6}), path)
    assert len(more.recorded) == 2 * 3


class Shuffled(Inline):
    """Runs tasks here, each with its items in another order than it was given them."""

    def submit(self, task):
        order = random.Random(len(task.items)).sample(range(len(task.items)), len(task.items))
        future = super().submit(replace(task, items=tuple(task.items[i] for i in order)))
        found = dict(zip(order, future.result(), strict=True))
        future = Future()
        future.set_result([found[i] for i in range(len(order))])
        return future


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_neither_batch_size_nor_order_changes_a_result(study, table, tmp_path, settings):
    fields = {**EVERYTHING, "datasets": EVERYTHING["datasets"][:1], "conditions": {"budget": [{"trace": 0.3}]}}
    spec = study.make(**fields, samples=5, batch=4, sampling={"max_new_tokens": 30, **settings})
    made = study.plan(spec)
    study.run(spec, tmp_path / "4.sqlite", made=made)
    for of_seed in [made.problems(*place) for place in made.places()]:
        for problems in of_seed.values():
            random.Random(3).shuffle(problems)
    made.spec = spec.model_copy(update={"batch": 1})
    study.run(spec, tmp_path / "1.sqlite", made=made)
    made.spec = spec.model_copy(update={"batch": 7})
    study.run(spec, tmp_path / "7.sqlite", made=made, executor=Shuffled())
    expected = table(tmp_path / "4.sqlite")
    assert len({record[7] for record in expected[0]}) > 10
    assert table(tmp_path / "1.sqlite") == expected
    assert table(tmp_path / "7.sqlite") == expected


def test_a_failure_is_recorded_and_the_rest_goes_on(study, tmp_path):
    """A prompt that is pinned needs more entries than the budget has: known only when the model runs."""
    spec = study.make(axes={"policy": ["rkv", "random-pinned"]}, conditions={"budget": [64], "trigger.interval": [8]})
    study.run(spec, tmp_path / "r.sqlite")
    with Results(tmp_path / "r.sqlite") as results:
        full, rkv, pinned = summarise(results)
    assert (full.failed, rkv.failed, rkv.runs) == (0, 0, 4)
    assert (pinned.runs, pinned.failed) == (0, 4)
    assert pinned.error.startswith("budget: 64 entries per head are fewer than the ")
    assert study.run(spec, tmp_path / "r.sqlite").recorded == []
    assert len(study.run(spec, tmp_path / "r.sqlite", retry_failed=True).recorded) == 4


def test_one_bad_run_does_not_take_its_batch_along(study, tmp_path, monkeypatch):
    spec = study.make(samples=8, batch=8)
    made = study.plan(spec)
    bad = made.problems(*made.places()[0])[0][5]
    generate = work._generate

    def fragile(task, items, model, tokenizer):
        if any(item.problem == bad for item in items) and task.policy["policy"] != "full":
            raise RuntimeError("out of memory\nwith details")
        return generate(task, items, model, tokenizer)

    monkeypatch.setattr(work, "_generate", fragile)
    study.run(spec, tmp_path / "r.sqlite", made=made)
    with Results(tmp_path / "r.sqlite") as results:
        records = results.records()
    assert {(r.problem, r.error) for r in records if r.error} == {(5, "RuntimeError: out of memory.")}
    assert len(records) == 3 * 8


def test_a_budget_below_the_protection_is_a_failure_of_that_cell_alone(study, tmp_path):
    spec = study.make(conditions={"budget": [{"trace": 0.01}, 64]}, axes={"policy": ["rkv"]})
    study.run(spec, tmp_path / "r.sqlite")
    with Results(tmp_path / "r.sqlite") as results:
        _, small, large = summarise(results)
    assert small.error.endswith(
        "entries are fewer than the 12 that are protected (sinks 4, recent 8); raise the budget or protect less."
    )
    assert (small.runs, large.runs) == (0, 4)


def test_a_policy_is_run_with_each_seed_only_if_it_is_random(study, tmp_path, folder):
    text = {"use": "text", "path": str(folder / "cat.txt"), "tokens": 120, "prompt_tokens": 20}
    pytest.importorskip("datasets")
    study.run(study.make(datasets=[text], seeds=[0, 1, 2]), tmp_path / "r.sqlite")
    with Results(tmp_path / "r.sqlite") as results:
        rows = summarise(results)
        kls = {r.metrics["kl"] for r in results.records() if r.digest == rows[2].cell.digest}
    assert [row.runs for row in rows] == [1, 1, 3]
    assert len(kls) == 3
    assert rows[0].metrics["kl"].value < 1e-12


def test_a_question_of_far_too_many_tokens_is_refused_by_its_beginning(study, folder, tmp_path, monkeypatch):
    """Tokens of the whole would take some 500 bytes each."""
    (folder / "long.jsonl").write_text(json.dumps({"question": "a b " * 500_000, "answer": "1"}) + "\n")
    spec = study.make(datasets=[{"use": "jsonl", "path": str(folder / "long.jsonl"), "chat": False}], samples=1)
    monkeypatch.setattr(work, "prompt_ids", lambda *_: pytest.fail("all of it was made tokens"))
    study.run(spec, tmp_path / "r.sqlite")
    with Results(tmp_path / "r.sqlite") as results:
        errors = {record.error for record in results.records()}
    assert all(error.startswith("prompt: makes a text of more than ") for error in errors)


def test_a_text_that_is_too_short_is_a_failure(study, tmp_path, folder):
    pytest.importorskip("datasets")
    text = {"use": "text", "path": str(folder / "cat.txt"), "tokens": 5000}
    study.run(study.make(datasets=[text]), tmp_path / "r.sqlite")
    with Results(tmp_path / "r.sqlite") as results:
        assert {r.error for r in results.records()} == {
            "text 0 has 2274 tokens, but 5000 are asked for; write fewer `tokens`."
        }


class Dying(Executor):
    """Runs tasks here, but dies with all that is under way when a certain problem is among them."""

    slots = 2
    crashed = (BrokenProcessPool,)

    def __init__(self, bad):
        self.bad, self.inline, self.restarts, self.dead = bad, Inline(), 0, False

    def submit(self, task):
        self.dead |= any(item.problem.index == self.bad for item in task.items)
        if not self.dead:
            return self.inline.submit(task)
        future = Future()
        future.set_exception(BrokenProcessPool("a process died"))
        return future

    def restart(self):
        self.restarts += 1
        self.dead = False

    def close(self):
        pass


def test_a_worker_that_dies_costs_one_run(study, table, tmp_path):
    spec = study.make(samples=6, batch=3)
    dying = Dying(4)
    study.run(spec, tmp_path / "r.sqlite", executor=dying)
    study.run(spec, tmp_path / "whole.sqlite")
    records, _ = table(tmp_path / "r.sqlite")
    assert [r for r in records if r[6] is None] == [r for r in table(tmp_path / "whole.sqlite")[0] if r[2] != 4]
    lost = [r for r in records if r[6] is not None]
    assert {(r[2], r[6].partition(",")[0]) for r in lost} == {(4, "the worker process died")}
    assert len(lost) == 3
    assert dying.restarts > 3


def test_two_runs_do_not_write_one_file(study, tmp_path):
    with (
        FileLock(f"{tmp_path / 'r.sqlite'}.lock"),
        pytest.raises(ResultsError, match="another `kvpolicy study run` is"),
    ):
        study.run(study.make(), tmp_path / "r.sqlite")


def test_a_folder_that_is_no_model_is_said_in_one_sentence(tmp_path, model_folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(KVPolicyError, match=r"^models: '.*empty' cannot be loaded: ") as caught:
        find_model(str(tmp_path / "empty"), "auto", "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        KVPolicyError, match=r"^models: there is no folder './nowhere'; give a model folder or a hub id\."
    ):
        find_model("./nowhere", "auto", "cpu")
    with pytest.raises(
        KVPolicyError, match=r"^models: 'nowhere' cannot be loaded: there is no such folder, and as an id"
    ):
        find_model("nowhere", "auto", "cpu")
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "empty" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(KVPolicyError, match=r"has no weights \(\*.safetensors\)"):
        find_model(str(tmp_path / "empty"), "auto", "cpu")


def test_small_models_run_in_float64_on_a_cpu(model_folder):
    found = find_model(str(model_folder), "auto", "cpu")
    assert found.dtype == "float64"
    assert find_model(str(model_folder), "float32", "cpu").fingerprint != found.fingerprint
    assert work.load(found)[0].dtype is __import__("torch").float64


def test_a_model_that_cannot_be_loaded_by_a_worker_fails_its_runs(study, tmp_path, monkeypatch):
    def broken(model):
        raise KVPolicyError("models: 'x' cannot be loaded: no memory.")

    spec = study.make()
    made = study.plan(spec)
    monkeypatch.setattr(work, "load", broken)
    study.run(spec, tmp_path / "r.sqlite", made=made)
    with Results(tmp_path / "r.sqlite") as results:
        rows = summarise(results)
    assert rows[0].error == "models: 'x' cannot be loaded: no memory."
    assert rows[0].failed == 4


def test_processes_give_the_same_table(study, everything, table, tmp_path):
    study.run(everything, tmp_path / "here.sqlite")
    study.run(everything, tmp_path / "there.sqlite", executor=Processes(2))
    assert table(tmp_path / "there.sqlite") == table(tmp_path / "here.sqlite")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_while_it_works_the_table_is_that_of_an_unbroken_run(kills, study, table, tmp_path, model_folder):
    """SIGKILL to the command while it works; nothing is repeated, nothing lost, and no worker is left behind."""
    spec = study.make(**{**EVERYTHING, "samples": 8, "batch": 2, "sampling": {"max_new_tokens": 90}})
    file, path = tmp_path / "s.yaml", tmp_path / "r.sqlite"
    file.write_text(spec.to_yaml())
    command = [sys.executable, "-P", "-m", "kvpolicy", "study", "run", str(file), "--out", str(path), "--workers", "2"]

    def recorded():
        try:
            with Results(path) as results:
                return dict(results._db.execute("SELECT key, finished FROM runs"))
        except ResultsError:  # not there, or just being made
            return {}

    seen = {}
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while len(recorded()) < len(seen) + 15 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert process.poll() is None, "it ended before it could be killed"
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(workers) >= 2
        deadline = time.monotonic() + 30
        while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(alive(pid) for pid in workers)
        found = recorded()
        assert len(found) >= len(seen) + 15
        assert seen.items() <= found.items()  # what was finished before was not run again
        seen = found
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=500, check=True)
    assert seen.items() <= recorded().items()
    study.run(spec, tmp_path / "whole.sqlite")
    assert table(path) == table(tmp_path / "whole.sqlite")


def stat(pid):
    """State and parent of a process; None if there is none."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return state, int(parent)


def children(pid):
    """The processes that a process has started."""
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [each for each in found if (stat(each) or ("", 0))[1] == pid]


def alive(pid):
    return (stat(pid) or ("Z", 0))[0] != "Z"


def test_studies_need_no_library_of_the_extra_to_be_read(tmp_path):
    """All modules but those that run models can be imported without datasets, scipy, ray, and even transformers."""
    code = """
import importlib, pkgutil, sys
for name in ("datasets", "math_verify", "scipy", "ray", "transformers"):
    sys.modules[name] = None
import kvpolicy.study
for module in pkgutil.iter_modules(kvpolicy.study.__path__):
    if module.name not in ("decoding", "forcing"):  # these run models
        importlib.import_module(f"kvpolicy.study.{module.name}")
import kvpolicy.cli.studying, kvpolicy.cli.study_tables, kvpolicy.cli.study_progress
from kvpolicy import KVPolicyError
from kvpolicy.study.analysis import estimate
from kvpolicy.study.executors import Ray
from kvpolicy.study.models import find_model
from kvpolicy.study.dataset_rows import load_rows
for act in (
    lambda: estimate([0.0, 1.0], proportion=True),
    lambda: Ray(None, None),
    lambda: load_rows("json", where="x.jsonl"),
    lambda: find_model("smollm2", "auto", "cpu"),
):
    try:
        act()
    except KVPolicyError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "the intervals of a study need scipy; install it with: pip install 'kvpolicy[study]'.",
        "--on ray needs ray; install it with: pip install 'kvpolicy[ray]'.",
        "datasets: x.jsonl needs datasets; install it with: pip install 'kvpolicy[study]'.",
        "a study needs transformers; install it with: pip install 'kvpolicy[hf]'.",
    ]


def test_components_of_the_registry_are_found_by_name_in_a_worker(study):
    spec = study.make()
    (task, _), *_ = tasks_of(study.plan(spec).reference_runs(), 4, None)
    assert kvpolicy.PolicySpec(**task.policy).policy == "full"
