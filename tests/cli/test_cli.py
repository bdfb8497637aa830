from __future__ import annotations

import gc
import json
import re
import subprocess
import sys

import pytest

import kvpolicy
from kvpolicy import PluginError, SpecError
from kvpolicy.cli import main
from kvpolicy.cli.showing import allowed
from kvpolicy.loading import installed
from kvpolicy.loading.entries import Origin, PluginFailure
from kvpolicy.study.schema import files_schema

GOOD = """\
schema_version: 1
policy: mine
description: Keeps large keys. Sometimes.
paper: "arXiv:0000.00000"
departures: ["It is [bold]shorter[/]."]
budget: {tokens: 64}
trigger: {every: 16}
protect: {recent: 8}
importance: key_norm
post: [rerotate]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def broken_catalog():
    catalog = installed.load_catalog()
    catalog.failures.append(
        PluginFailure(Origin("bad", "1", "p"), PluginError("plugin 'p' of bad 1 failed to load: boom."))
    )
    catalog.disabled.append(Origin("sleepy", "2", "q"))
    with installed.using(catalog):
        yield catalog


def test_help_needs_no_heavy_library(tmp_path):
    program = (
        "import sys; from kvpolicy.cli import main\ncode = main(['--help'])\n"
        "print(code, *(m for m in ('torch', 'pydantic', 'transformers', 'yaml') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "generate" in done.stdout
    assert done.stdout.splitlines()[-1] == "0"


def test_python_dash_m(tmp_path):
    command = [sys.executable, "-P", "-m", "kvpolicy", "validate", "gone.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gone.yaml: there is no such file.\n"


def test_version(run):
    assert run("--version") == (0, f"kvpolicy {kvpolicy.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["nope"], ["show"], ["list", "--colour"], ["generate", "x", "--max-new-tokens", "0"]]
)
def test_wrong_usage_is_exit_code_2(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "Usage" in err


def test_list_shows_everything_and_where_it_is_from(run):
    code, out, err = run("list")
    assert (code, err) == (0, "")
    for entry in kvpolicy.catalog().entries():
        assert entry.name in out
    for entry in kvpolicy.catalog().policies():
        assert entry.name in out
    assert f"kvpolicy {kvpolicy.__version__}" in out


def test_list_one_kind(run):
    code, out, _ = run("list", "--kind", "mixer")
    assert code == 0
    names = [line.split()[line.startswith("mixer")] for line in out.splitlines()[1:]]  # the kind is said once
    assert set(names) >= {"linear", "importance_only"}
    assert "key_norm" not in out
    code, out, err = run("list", "--kind", "mixr")
    assert (code, out) == (1, "")
    assert err.startswith("error: --kind: 'mixr' is not a kind. Did you mean 'mixer'?")


def test_list_as_json(run, broken_catalog):
    code, out, _ = run("list", "--json")
    assert code == 0
    listed = json.loads(out)
    found = {(entry["kind"], entry["name"]): entry for entry in listed["entries"]}
    assert len(found) == len(listed["entries"])
    assert set(found) == {(entry.kind, entry.name) for entry in broken_catalog}
    assert found["study", "rkv-lambda"]["summary"] == "How much of R-KV's score should be importance?"
    assert found["importance", "key_norm"]["distribution"] == "kvpolicy"
    assert found["importance", "key_norm"]["plugin"] == "builtin-plugins"
    assert found["policy", "rkv"]["summary"]
    assert listed["failed_plugins"] == [{"plugin": "bad 1 (p)", "error": "plugin 'p' of bad 1 failed to load: boom."}]
    assert listed["disabled_plugins"] == ["sleepy 2 (q)"]


def test_list_shows_failed_and_disabled_plugins(run, broken_catalog):
    _, out, _ = run("list", "--kind", "post")
    assert "not loaded: plugin 'p' of bad 1 failed to load: boom." in out
    assert "turned off: plugin sleepy 2 (q)" in out


def test_list_shows_policies_of_the_search_path(run, file, monkeypatch):
    monkeypatch.setenv("KVPOLICY_POLICY_PATH", str(file.parent))
    (file.parent / "wrong.yaml").write_text("policy: wrong\n")
    listed = json.loads(run("list", "--kind", "policy", "--json")[1])["entries"]
    found = {entry["name"]: entry for entry in listed}
    assert (found["mine"]["summary"], found["mine"]["from"]) == ("Keeps large keys", str(file))
    assert "schema_version: is missing" in found["wrong"]["summary"]


def test_a_plugin_that_fails_is_one_warning_line(run, monkeypatch):
    def fail():
        catalog = kvpolicy.Catalog()
        catalog.failures.append(PluginFailure(Origin("bad"), PluginError("plugin 'p' failed to load: boom.")))
        return catalog

    monkeypatch.setattr(installed, "_process_catalogs", [])
    monkeypatch.setattr(installed, "load_catalog", fail)
    with pytest.warns(RuntimeWarning, match="boom"):
        code, out, _ = run("list")
    assert code == 0
    assert "not loaded: plugin 'p'" in out


def test_warnings_are_printed_as_one_line(tmp_path):
    # In a process of its own: pytest turns warnings into errors.
    info = tmp_path / "bad-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvpolicy]\nbad-plugin = bad_plugin_module\n")
    (tmp_path / "bad_plugin_module.py").write_text("raise RuntimeError('boom')\n")
    program = (
        f"import sys; sys.path.append({str(tmp_path)!r})\nfrom kvpolicy import cli; sys.exit(cli.main(['show', 'rkw']))"
    )
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    warning, error = done.stderr.splitlines()
    reason = "plugin 'bad-plugin' of bad 1.0 failed to load: RuntimeError: boom."
    assert warning == f"warning: {reason}"
    assert error.startswith("error: unknown policy 'rkw'. Did you mean 'rkv'?")
    assert error.endswith(reason)
    assert done.returncode == 1


def test_show(run, file):
    code, out, err = run("show", file)
    assert (code, err) == (0, "")
    assert "arXiv:0000.00000" in out
    assert "extends" not in out
    assert "- It is [bold]shorter[/]." in out
    block = out[out.index("schema_version") : out.index("part ")]
    shown = kvpolicy.PolicySpec.from_yaml(block)
    assert shown == kvpolicy.load(file, description="", departures=[])
    assert "Entries that gather above the budget before a compaction" in out
    assert "16 (default 128)" in out
    assert "integer >= 1" in out


@pytest.mark.parametrize("name", [e.name for e in kvpolicy.catalog().policies()])
def test_show_every_registered_policy(run, name):
    code, out, err = run("show", name)
    assert (code, err) == (0, "")
    assert f"policy: {name}" in out


def test_show_what_is_not_there(run, tmp_path):
    assert run("show", "rkw")[2].startswith("error: unknown policy 'rkw'. Did you mean 'rkv'?")
    assert run("show", tmp_path) == (1, "", f"error: {tmp_path}: is a directory; give one policy file.\n")


def test_validate(run, file, tmp_path):
    bad, worse = tmp_path / "bad.yaml", tmp_path / "worse.yaml"
    bad.write_text(GOOD.replace("tokens: 64", "tokens: 0"))
    worse.write_text("")
    assert run("validate", file) == (0, f"{file}: policy mine is valid.\n", "")
    code, out, err = run("validate", bad, file, worse)
    assert code == 1
    assert out == f"{file}: policy mine is valid.\n"
    first, second = err.splitlines()
    assert first == f"{bad}:6:10: budget.tokens: 0 is no budget; write at least 1 KV entry per head."
    assert second.startswith(f"{worse}: is empty;")


def test_debug_shows_the_traceback(run, file, monkeypatch):
    file.write_text("")
    with pytest.raises(SpecError):
        main(["--debug", "show", str(file)])
    with pytest.raises(SpecError):
        main(["--debug", "validate", str(file)])
    assert run("show", file)[0] == 1  # the option does not outlive its call
    monkeypatch.setenv("KVPOLICY_DEBUG", "1")
    with pytest.raises(SpecError):
        main(["show", str(file)])


def test_schema(run, tmp_path):
    code, out, _ = run("schema")
    assert code == 0
    assert json.loads(out) == files_schema()
    target = tmp_path / "policy.schema.json"
    assert run("schema", "--out", target) == (0, "", "")
    assert target.read_text() == out
    code, _, err = run("schema", "--out", tmp_path / "no" / "x.json")
    assert code == 1
    assert (
        err == f"error: --out: {tmp_path}/no/x.json cannot be written (No such file or directory); name another file.\n"
    )


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "minimum": 1}, "integer >= 1"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number > 0, <= 1"),
        ({"enum": ["max", "mean"], "type": "string"}, "max | mean"),
        ({"anyOf": [{"type": "integer"}, {"const": "all"}]}, "integer | all"),
        ({"$ref": "#/x"}, ""),
    ],
)
def test_allowed_values_in_short(schema, text):
    assert allowed(schema) == text


UNNEEDED = (
    "transformers ray sqlite3 scipy datasets matplotlib jinja2 triton hypothesis huggingface_hub pandas vllm accelerate"
)


@pytest.mark.parametrize("words", [["list"], ["show", "rkv"], ["validate", "rkv"], ["schema"]])
def test_looking_something_up_loads_only_what_it_needs(words):
    """Apart from torch itself, whose import takes longer than all else together."""
    script = (
        "import sys; from kvpolicy.cli import main; code = main(sys.argv[2:])\n"
        "from kvpolicy.contracts.component import _texts_of\n"
        "loaded = {name.partition('.')[0] for name in sys.modules} & set(sys.argv[1].split())\n"
        "print(code, sorted(loaded), _texts_of.cache_info().currsize, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, UNNEEDED, *words], capture_output=True, text=True, check=True
    )
    code, loaded, described = re.fullmatch(r"(\d) (\[.*\]) (\d+)\n", done.stderr).groups()
    assert (code, loaded) == ("0", "[]")
    if words[0] in ("list", "validate"):  # which say nothing of parameters: no source is read for what it says of them
        assert described == "0"


def test_a_command_of_its_own_process_leaves_the_collector_as_it_was_and_has_nothing_left_to_look_through():
    code = (
        "import gc, sys; sys.argv = ['kvpolicy', 'show', 'rkv']; from kvpolicy.cli import main; code = main(); "
        "print('end', code, gc.isenabled(), gc.get_freeze_count() > 10_000)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "end 0 True True"
    # Others may have loaded what complains of objects that stay: they end as Python does.
    longer = code.replace("'show', 'rkv'", "'plan', 'rkv', '--model', 'reasoner'").replace("> 10_000", "> 0")
    done = subprocess.run([sys.executable, "-P", "-c", longer], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].endswith("True False")
    before = gc.get_freeze_count()
    assert main(["show", "rkv"]) == 0
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, before)
