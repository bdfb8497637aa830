"""The script that proves and measures on a GPU: one whole JSON and a sentence for each part, whatever happens to it.

That all of its parts run is what `make gpu-dry` shows, in CI.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_proof.sh"
FOLDER = ROOT / "scripts" / "gpu_proof"
MODULES = ("main", "page", "parts", "supervise", "bare")
GOOD = 'open({!r}, "w").write(\'{{"rows": [{{"outcome": "measured"}}, {{"outcome": "not run: no time"}}]}}\')'


@pytest.fixture
def proof(monkeypatch):
    """The script's modules, under names that are theirs for the length of a test."""
    monkeypatch.syspath_prepend(FOLDER)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("main")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def supervisor(proof):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield proof.Supervisor()
    for number, handler in before.items():
        signal.signal(number, handler)


def part(proof, name, code, seconds=20.0, **more):
    """A part that runs some Python, with the file for its figures as `{!r}`."""

    def command(setting, _seconds):
        return [sys.executable, "-S", "-c", code.format(str(setting.figures(name))) if "{" in code else code]

    return proof.Part(name, "something", seconds, command, **more)


def ran(proof, supervisor, tmp_path, parts, whole=60.0, **setting):
    (tmp_path / "logs").mkdir(exist_ok=True)
    report = proof.Report(tmp_path, parts, dry=False)
    proof.run_parts(
        parts,
        proof.Setting(sys.executable, tmp_path, dry=False, **setting),
        report,
        supervisor,
        dict(os.environ),
        whole,
    )
    data = json.loads((tmp_path / "gpu_proof.json").read_text())
    assert data == report.data, "what is written is what is known"
    return {p["name"]: (p["outcome"], p["why"]) for p in data["parts"]}, report


def test_each_part_ends_in_its_own_way_and_the_others_run(proof, supervisor, tmp_path, capsys):
    parts = [
        part(proof, "hangs", "import time; time.sleep(60)", seconds=1.0),
        part(proof, "good", GOOD),
        part(proof, "fails", "import sys; print('it is broken'); sys.exit(4)"),
        part(proof, "crashes", "import os; os.kill(os.getpid(), 11)"),
        part(proof, "says nothing", "pass"),
        part(proof, "not there", GOOD, skip=lambda _: "it is not there."),
        part(
            proof, "tests", "print('tests/a.py::b[x y] PASSED [ 50%]\\ntests/a.py::c SKIPPED (no) [100%]')",
            tests=True,
        ),
        part(proof, "no test", "print('tests/a.py::c SKIPPED (no) [100%]')", tests=True),
        part(
            proof, "bad test", "print('[gw1] [ 9%] FAILED tests/a.py::c \\n[gw0] [ 9%] PASSED tests/a.py::b ')",
            tests=True,
        ),
        part(proof, "no program", GOOD),
        part(proof, "last", GOOD),
    ]  # fmt: skip
    object.__setattr__(parts[-2], "command", lambda *_: [str(tmp_path / "nothing")])
    outcomes, report = ran(proof, supervisor, tmp_path, parts)
    assert outcomes == {
        "good": ("passed", "1 of 2 lines measured"),
        "fails": ("failed", "exit status 4: it is broken"),
        "crashes": ("failed", "the process died of signal 11; its log says more."),
        "hangs": ("over its limit", outcomes["hangs"][1]),
        "says nothing": ("failed", "0 of 0 lines measured"),
        "not there": ("skipped", "it is not there."),
        "tests": ("passed", "1 tests, 1 skipped"),
        "no test": ("failed", "exit status 0, 0 tests passed, 1 skipped: tests/a.py::c SKIPPED (no) [100%]"),
        "bad test": ("failed", "1 of 2 tests failed: tests/a.py::c"),
        "no program": ("failed", f"it cannot be started: No such file or directory ({tmp_path / 'nothing'})."),
        "last": ("passed", "1 of 2 lines measured"),
    }
    assert outcomes["hangs"][1].startswith("it was ended after ")
    assert report.code == 1
    closing = importlib.import_module("page").closing(report.data)
    assert closing.endswith("parts: 3 passed, 7 failed, 1 skipped")
    assert "| hangs | over its limit |" in closing
    capsys.readouterr()


def test_unspent_time_is_the_next_parts_and_the_whole_has_an_end(proof, supervisor, tmp_path, capsys):
    quick, wait = "pass", "import time; time.sleep(60)"
    parts = [
        part(proof, "a", quick, 3.0), part(proof, "skipped", GOOD, 1.5, skip=lambda _: "no."),
        part(proof, "b", wait, 1.0), part(proof, "c", GOOD, 9.0),
    ]  # fmt: skip
    outcomes, report = ran(proof, supervisor, tmp_path, parts, whole=12.0)
    assert outcomes["b"][0] == "over its limit"
    assert 3.5 < report.data["parts"][2]["seconds"] < 9
    assert outcomes["c"] == ("not run", "the 12 s of the whole were used up.")
    capsys.readouterr()


def test_a_signal_ends_the_part_with_all_that_it_started_and_the_rest_is_not_run(proof, supervisor, tmp_path, capsys):
    beside = tmp_path / "beside"
    stop = (
        "import os, signal, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(beside)!r}, 'w').write(str(child.pid))\n"
        "print('tests/a.py::b PASSED', flush=True)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    parts = [part(proof, "good", GOOD), part(proof, "stops", stop, tests=True), part(proof, "never", GOOD)]
    begin = time.monotonic()
    outcomes, report = ran(proof, supervisor, tmp_path, parts)
    assert time.monotonic() - begin < 30
    assert outcomes == {
        "good": ("passed", "1 of 2 lines measured"),
        "stops": ("stopped", "the script was told to stop; 1 tests had passed and 0 failed."),
        "never": ("not run", "the script was told to stop (SIGTERM)."),
    }
    assert report.code == 1
    status = Path(f"/proc/{beside.read_text()}/stat")
    assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] in ("Z", "X")
    capsys.readouterr()


def test_what_a_killed_script_had_is_in_its_json(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import os, sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "from pathlib import Path\n"
        "import main\n"
        f"out = Path({str(tmp_path)!r}); (out / 'logs').mkdir()\n"
        "good = lambda s, _: [sys.executable, '-S', '-c', '''import json, sys\n"
        'json.dump({"rows": [{"outcome": "measured"}]}, open(sys.argv[1], "w"))\'\'\', str(s.figures(\'a\'))]\n'
        "kill = lambda s, _: [sys.executable, '-S', '-c', 'import os; os.kill(os.getppid(), 9)']\n"
        "parts = [main.Part(n, '', 20, c) for n, c in (('a', good), ('b', kill), ('c', good))]\n"
        "report = main.Report(out, parts, dry=False)\n"
        "setting = main.Setting(sys.executable, out, False)\n"
        "main.run_parts(parts, setting, report, main.Supervisor(), dict(os.environ), 60)\n"
    )
    done = subprocess.run([sys.executable, "-P", driver], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    parts = json.loads((tmp_path / "gpu_proof.json").read_text())["parts"]
    assert [p["outcome"] for p in parts] == ["passed", "not finished", "not run"]
    assert parts[0]["figures"] == {"rows": [{"outcome": "measured"}]}
    assert parts[1]["why"] == "the script was ended from outside meanwhile."


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An interpreter without a single package."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("wheels", [None, "empty", "nowhere"])
def test_missing_packages_are_one_sentence_and_the_json_is_whole(bare_python, wheels, tmp_path):
    (tmp_path / "empty").mkdir()
    given = [] if wheels is None else ["--wheels", tmp_path / wheels]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"KVPOLICY_PYTHON": str(bare_python)}
    done = subprocess.run(
        [SCRIPT, "--dry", "--out", tmp_path / "out", *given],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    data = json.loads((tmp_path / "out" / "gpu_proof.json").read_text())
    reasons = {p["why"] for p in data["parts"]}
    assert {p["outcome"] for p in data["parts"]} == {"not run"}
    assert len(reasons) == 1
    (reason,) = reasons
    expected = {
        None: "this Python lacks torch>=2.11 (is not installed), triton>=3.6 (is not installed), transformers>=5.17",
        "empty": f"the wheels in {tmp_path / 'empty'} do not make up for torch>=2.11",
        "nowhere": f"--wheels: there is no folder {tmp_path / 'nowhere'}; make it with --collect-wheels.",
    }
    assert reason.startswith(expected[wheels])
    assert "parts: 0 passed, 7 failed, 0 skipped" in done.stdout


def test_a_folder_that_cannot_be_written_is_one_sentence(proof, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert proof.main(["--dry", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == (
        f"gpu_proof: --out {tmp_path / 'file'} cannot be written (Not a directory); name another folder.\n"
    )


def test_a_fault_of_the_script_leaves_a_whole_json(proof, supervisor, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("oh no")

    monkeypatch.setattr(proof, "run_parts", broken)
    monkeypatch.setattr(proof, "probe", lambda *_: None)
    assert proof.main(["--dry", "--out", str(tmp_path)], [part(proof, "good", GOOD)]) == 1
    (only,) = json.loads((tmp_path / "gpu_proof.json").read_text())["parts"]
    assert (only["outcome"], only["why"]) == ("not run", "the script itself failed: RuntimeError: oh no.")
    assert "| good | not run |" in capsys.readouterr().out


def test_without_a_gpu_the_whole_is_refused_in_one_sentence(tmp_path):
    environment = os.environ | {
        "KVPOLICY_PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [SCRIPT, "--out", tmp_path], env=environment, check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    data = json.loads((tmp_path / "gpu_proof.json").read_text())
    assert {p["why"] for p in data["parts"]} == {
        "torch sees no CUDA or HIP device here; --dry runs every part on the CPU at toy sizes."
    }
    assert data["machine"]["torch"]
    assert data["dry"] is False


def test_wheels_make_up_for_what_is_missing_and_for_nothing_else(proof, tmp_path, monkeypatch):
    wheels, bare = tmp_path / "wheels", importlib.import_module("bare")
    wheels.mkdir()
    for name, size in (("kvdemo_one", "2.0"), ("kvdemo_two", "1.0")):
        info = f"{name}-{size}.dist-info"
        with zipfile.ZipFile(wheels / f"{name}-{size}-py3-none-any.whl", "w") as wheel:
            needs = "Requires-Dist: kvdemo-two\n" if name == "kvdemo_one" else ""
            wheel.writestr(f"{name}.py", f"version = {size!r}\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {size}\n{needs}")
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(bare, "needs", lambda: ["kvdemo-one>=2", "pytest>=1"])
    monkeypatch.setattr(bare, "MACHINE", ("torch>=2",))
    target = tmp_path / "target"
    assert bare.take(wheels, target) == []
    assert sorted(file.name for file in target.glob("*.py")) == ["kvdemo_one.py", "kvdemo_two.py"]
    monkeypatch.setattr(bare, "needs", lambda: ["kvdemo-one>=3"])
    with pytest.raises(bare.UnusableError, match=r"do not make up for kvdemo-one>=3 \(No matching distribution"):
        bare.take(wheels, tmp_path / "other")
    monkeypatch.setattr(bare, "needs", lambda: ["pytest>=999"])
    with pytest.raises(bare.UnusableError, match=r"lacks pytest>=999 \(is \d.* here\); install it, or carry wheels"):
        bare.take(None, tmp_path / "other")


def test_a_checkout_on_the_path_brings_all_that_an_install_registers(proof, tmp_path):
    bare = importlib.import_module("bare")
    site = bare.make_site(tmp_path / "site")
    assert {file.name for file in site.iterdir()} == {
        "kvpolicy", "kvpolicy_plugins", "kvpolicy_kernels", "kvpolicy_registry", "kvpolicy-0.1.0.dist-info",
        "sitecustomize.py",
    }  # fmt: skip
    code = (
        "import importlib.metadata as m, kvpolicy, sys\n"
        "points = {(p.group, p.name, p.value) for p in m.distribution('kvpolicy').entry_points}\n"
        "names = {e.kind: e.origin.distribution for e in kvpolicy.catalog()}\n"
        "print(kvpolicy.__file__, sorted(points), names['backend'], kvpolicy.load('rkv-density').policy)\n"
    )
    packages = [each for each in sys.path if each.endswith("site-packages")]
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code], check=False, capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *packages])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = bare.project()["entry-points"]
    points = sorted((group, name, value) for group, each in said.items() for name, value in each.items())
    assert done.stdout == f"{site / 'kvpolicy' / '__init__.py'} {points} kvpolicy rkv-density\n"


def test_the_page_is_what_the_script_writes(proof, tmp_path, monkeypatch, capsys):
    page = importlib.import_module("page")
    assert page.PAGE.read_text(encoding="utf-8") == page.text()
    report = json.loads((Path(__file__).parent / "gpu_proof_example.json").read_text())
    made = page.block(report)
    for expected in (
        "Some GPU, torch 2.11.0",
        "| `kernels` | every kernel against float64",
        "| rkv | 8192 | 8 | 310.5 | 25.00 [24.00, 26.00] | 1.2% | 17.0 |",
        "| DynamicCache | 32768 | 32 | not run: it needs about 153 GB, more than 120 GB |  |  |  |",
        "| redundancy | triton | 1152 | 80.0 [79.0, 81.0] | 900 | 20% | 24.0 | 3% |",
        "| rkv, captured | 1 | 4.00 [4.00, 4.00] |",
        "### decode-qwen2-1.5b\n\nNot measured.",
    ):
        assert expected in made
    monkeypatch.setattr(page, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text(f"# Title\n\n{page.FIRST}{page.LAST}behind\n")
    for wrong, message in (({"dry": True}, "is of a dry run"), ([], "is no gpu_proof.json")):
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        assert page.main([str(tmp_path / "wrong.json")]) == 2
        assert message in capsys.readouterr().err
    assert not page.KEPT.exists()
    (tmp_path / "right.json").write_text(json.dumps(report))
    assert page.main([str(tmp_path / "right.json")]) == 0
    assert json.loads(page.KEPT.read_text()) == report
    assert page.PAGE.read_text() == f"# Title\n\n{page.FIRST}\n{made}\n{page.LAST}behind\n"
    assert page.main([]) == 0
    assert page.PAGE.read_text() == f"# Title\n\n{page.FIRST}\n{made}\n{page.LAST}behind\n"


@pytest.mark.slow
def test_commands_for_a_gpu_are_understood_and_say_that_there_is_none(proof, tmp_path):
    setting = proof.Setting(sys.executable, tmp_path, dry=False, workers=1)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    for part in proof.PARTS:
        command = part.command(setting, part.seconds) + (["--collect-only", "-q"] if part.tests else [])
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        if part.tests:
            assert done.returncode == 0, done.stdout
            assert "collected" in done.stdout
        else:
            assert done.returncode == 2, done.stderr
            assert done.stderr.endswith("and there is none here.\n")
