from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvpolicy.cli import main, study_progress
from kvpolicy.cli.studying import duration
from kvpolicy.study import executors

pytest.importorskip("scipy")

STUDY = """\
schema_version: 1
kind: study
study: small
axes: {{policy: [rkv, random]}}
conditions: {{budget: [64], trigger.interval: [16]}}
models: [{model}]
datasets: [{{use: needle, words: 20, chat: false}}]
samples: 4
sampling: {{max_new_tokens: 30}}
quick: {{samples: 2}}
"""


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, model_folder):
    """Return a function that runs a command in the folder of `small.yaml`, workers in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(executors, "Processes", lambda workers: executors.Inline())
    (tmp_path / "small.yaml").write_text(STUDY.format(model=model_folder))

    def call(*arguments):
        code = main(["study", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_plan_run_status(run, tmp_path):
    code, out, _ = run("plan", "small.yaml", "--workers", 2)
    assert code == 0
    assert re.search(r"tiny runs in float64 on cpu\.$", out, flags=re.MULTILINE)
    assert re.search(
        r"2 variants and the full cache, 12 runs; about 360 tokens, about \d+ (s|min) with 2 workers\.", out
    )
    assert not (tmp_path / "small.sqlite").exists()
    code, out, err = run("run", "small.yaml")
    assert code == 0
    assert "variants: 8/8 runs" in err
    assert re.search(r"^ *rkv +4 +0\.0 \[0\.0, 49\.0\]", out, flags=re.MULTILINE)
    assert re.search(r"p \(Holm\) = 1 *$", out, flags=re.MULTILINE)
    assert out.rstrip().endswith("Recorded in small.sqlite.")
    assert run("status", "small.yaml")[1] == (
        "small.sqlite: 12 of 12 runs are recorded, 0 of them failed; about 0 tokens are left.\n"
    )
    assert (
        "12 runs, 12 of them recorded already; about 0 tokens; no time was estimated"
        in run("plan", "small.yaml", "--no-probe")[1]
    )
    code, again, err = run("run", "small.yaml")
    assert (code, err) == (0, "")
    assert again == out
    assert {file.name for file in tmp_path.iterdir()} == {"small.yaml", "small.sqlite", "small.sqlite.lock"}


def test_what_is_missing_for_the_end_is_said_at_the_beginning(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    code, out, err = run("run", "small.yaml")
    wanted = "error: the intervals of a study need scipy; install it with: pip install 'kvpolicy[study]'.\n"
    assert (code, out, err) == (1, "", wanted)
    assert [file.name for file in tmp_path.iterdir()] == ["small.yaml"]


@pytest.mark.parametrize("columns", [None, "72"])
def test_no_number_of_a_table_is_cut_short(run, monkeypatch, columns):
    """A pipe gets the width that the table needs; where it is narrow, cells go on in the next line."""
    if columns is None:
        monkeypatch.delenv("COLUMNS")
    else:
        monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = run("run", "small.yaml")
    assert code == 0
    assert "…" not in out
    if columns is None:
        assert re.search(r"^ *random +4 .* 0\.0 \[-49\.0, 49\.0\], p \(Holm\) = 1 *$", out, flags=re.MULTILINE)
    else:
        assert max(map(len, out.splitlines())) <= 72
        words = " ".join(out.split())
        assert "Not shown for lack of room: tokens, resident_mean, resident_peak, " in words
        assert re.search(r"^ *random +4 +\d\.\d \[\d\.\d, \d+\.\d\]", out, flags=re.MULTILINE), "every digit is there"


def test_quick_has_a_file_of_its_own(run, tmp_path):
    code, out, _ = run("run", "small.yaml", "--quick")
    assert code == 0
    assert "Recorded in small-quick.sqlite." in out
    code, out, _ = run("status", "small.yaml", "--quick")
    assert out.startswith("small-quick.sqlite: 6 of 6 runs")
    assert not (tmp_path / "small.sqlite").exists()


def test_failures_are_counted_and_named(run, tmp_path):
    text = (tmp_path / "small.yaml").read_text().replace("rkv, random", "rkv, random-pinned")
    (tmp_path / "small.yaml").write_text(text)
    code, out, err = run("run", "small.yaml")
    assert code == 0
    assert "8/8 (4 failed) runs" in err
    assert re.search(
        r"4 failed: budget: 64 entries per head are fewer than the \d+ that policy 'random-pinned' protects", out
    )
    assert "12 runs are recorded, 4 of them failed" in run("status", "small.yaml")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "smal"), "error: unknown study 'smal'."),
        (("plan", "none.yaml"), "error: none.yaml: there is no such file."),
        (("run", "small.yaml", "--on", "mars"), "error: --on: 'mars' is not known; write local or ray.\n"),
        (("run", "small.yaml", "--device", "meta"), "error: --device: 'meta' cannot be used: it computes nothing; "),
        (("plan", "small.yaml", "--device", "tpu:x"), "error: --device: 'tpu:x' cannot be used: "),
        (("status", "none.sqlite"), "error: none.sqlite: there is no such file; run the study first"),
        (("prune", "small.yaml"), "error: small.sqlite: there is no such file; run the study first"),
        (("run", "small.yaml", "--address", "x"), "error: --address: is for Ray; write `--on ray` too.\n"),
        (("run", "small.yaml", "--out", "no/r.sqlite"), "error: --out: there is no folder "),
        (("status", "small.yaml"), "error: small.sqlite: there is no such file; run the study first"),
    ],
)
def test_wrong_use_is_said_in_one_sentence(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_output_that_cannot_be_written_is_one_sentence(run, tmp_path):
    run("run", "small.yaml")
    command = [sys.executable, "-P", "-m", "kvpolicy", "study", "status", "small.sqlite"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (
        1, "error: standard output: cannot be used (No space left on device); name another one.\n",
    )  # fmt: skip


def test_a_study_that_waits_for_the_full_cache_has_not_failed(run, tmp_path, monkeypatch):
    text = (tmp_path / "small.yaml").read_text().replace("budget: [64]", "budget: [{trace: 0.5}]")
    (tmp_path / "small.yaml").write_text(text)

    def stop(self, task):
        raise KeyboardInterrupt

    monkeypatch.setattr(executors.Inline, "submit", stop)
    assert run("run", "small.yaml")[0] == 130
    for study in ("small.yaml", "small.sqlite"):
        out = run("status", study)[1]
        runs = 12 if study == "small.yaml" else 4  # without the study, those of the full cache are all that is known
        assert out.startswith(f"small.sqlite: 0 of {runs} runs are recorded, 0 of them failed")
        assert out.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(run, monkeypatch):
    def stop(self, task):
        raise KeyboardInterrupt

    monkeypatch.setattr(executors.Inline, "submit", stop)
    code, _, err = run("run", "small.yaml")
    assert code == 130
    assert err.endswith("Stopped. small.sqlite holds what is finished; the same command goes on from there.\n")


def test_a_log_gets_a_line_now_and_then_also_while_one_batch_takes_long(run, monkeypatch):
    """On a base of one batch per stage nothing would be said until it ends."""
    monkeypatch.setattr(study_progress, "_FIRST_LINE", 0.2)
    monkeypatch.setattr(study_progress, "_LONGEST_PAUSE", 0.4)
    submit = executors.Inline.submit

    def slow(self, task):
        time.sleep(1.0)
        return submit(self, task)

    monkeypatch.setattr(executors.Inline, "submit", slow)
    code, _, err = run("run", "small.yaml")
    assert code == 0
    lines = err.splitlines()
    assert len([line for line in lines if line.startswith("full cache: 0/4 runs, 0 tokens/s, ")]) >= 2
    assert len([line for line in lines if line.startswith("variants: 8/8 runs, ")]) == 1
    assert lines[-1].startswith("variants: 8/8 runs, ")


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
