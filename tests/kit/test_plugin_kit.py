"""A stranger's package: written by `kvpolicy new plugin`, built, installed into a fresh environment, used by name."""

from __future__ import annotations

import ast
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest

import kvpolicy
from kvpolicy.cli import main
from kvpolicy.cli.scaffolding import rendered
from kvsupport.stranger import Stranger, succeeded

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "third_party_plugin"
NAME = "example-plugin"
PAGE = ROOT / "docs" / "write-a-plugin.md"


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# -- the skeleton -----------------------------------------------------------------------------------------------------


def files_in(folder):
    skip = ("__pycache__", ".egg-info", "build", ".pytest_cache", ".hypothesis", ".ruff_cache")
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.endswith(skip) for part in path.relative_to(folder).parts)
    }


def test_the_example_is_what_the_command_writes():
    assert files_in(EXAMPLE) == dict(sorted(rendered(NAME).items()))


def test_new_plugin_writes_it(run, tmp_path):
    code, out, err = run("new", "plugin", "my-first-plugin", "--into", tmp_path)
    assert (code, err) == (0, "")
    assert f"pip install -e '{tmp_path}/my-first-plugin[test]'" in out
    written = files_in(tmp_path / "my-first-plugin")
    assert written == dict(sorted(rendered("my-first-plugin").items()))
    for path, text in written.items():
        assert "@@" not in text
        assert "example" not in text
        if path.endswith(".py"):
            ast.parse(text)
    project = tomllib.loads(written["pyproject.toml"])["project"]
    assert project["entry-points"]["kvpolicy"] == {"my-first-plugin": "my_first_plugin"}


@pytest.mark.parametrize(
    "name",
    ["", "My-plugin", "my_plugin", "1st", "a--b", "-a", "a-", "../evil", "a/b", "a b", "a\nb", "ä", "x" * 65, "json",
     "class", "kvpolicy", "tests", "torch", "transformers", "pytest", "yaml", "pyyaml", "kvpolicy-plugins", "con",
     "nul", "com1", "lpt9", "rkv", "full", "knorm"],
)  # fmt: skip
def test_new_plugin_refuses_names(name, run, tmp_path):
    code, out, err = run("new", "plugin", "--into", tmp_path, "--", name)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: NAME: .*\.\n", err), err
    assert not list(tmp_path.iterdir())


def test_new_plugin_refuses_folders(run, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for name, into, words in (
        ("taken", tmp_path, "exists already"),
        ("dangling", tmp_path, "exists already"),
        ("fine", tmp_path / "none", "there is no folder"),
        ("fine", tmp_path / "file", "there is no folder"),
    ):
        code, _, err = run("new", "plugin", name, "--into", into)
        assert code == 1
        assert words in err
        assert err.count("\n") == 1


# -- what it costs ----------------------------------------------------------------------------------------------------


def lines_of_python(text):
    """Count lines of code: no blank lines, comments or docstrings."""
    documented = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = text.splitlines()
    return sum(bool(re.match(r"\s*[^#\s]", line)) for n, line in enumerate(lines, 1) if n not in documented)


def lines_of_toml(text):
    return sum(bool(re.match(r"\s*[^#\s]", line)) for line in text.splitlines())


def minimal_package():
    """Return the smallest plugin of the documentation: its first TOML and its first Python block."""
    blocks = re.findall(r"```(toml|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return next(t for kind, t in blocks if kind == "toml"), next(t for kind, t in blocks if kind == "python")


def test_a_scorer_costs_at_most_12_lines_of_python_and_5_of_toml():
    toml, python = minimal_package()
    assert lines_of_toml(toml) <= 5
    assert lines_of_python(python) <= 12
    assert lines_of_python(rendered(NAME)["example_plugin/scorer.py"]) <= 12
    assert lines_of_python(rendered(NAME)["tests/test_laws.py"]) <= 4


# -- installed --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A fresh environment with the example and the minimal package built and installed; runs commands in it."""
    made = Stranger(tmp_path_factory.mktemp("stranger"))
    shutil.copytree(EXAMPLE, made.folder / "example")
    toml, module = minimal_package()
    (made.folder / "minimal").mkdir()
    (made.folder / "minimal" / "pyproject.toml").write_text(toml)
    (made.folder / "minimal" / f"{next(iter(plugin_points(toml).values()))}.py").write_text(module)
    for package in ("example", "minimal"):
        made.install(made.folder / package)
    return made


def plugin_points(toml):
    return tomllib.loads(toml)["project"]["entry-points"]["kvpolicy"]


def test_list_names_the_distribution(stranger):
    data = json.loads(succeeded(stranger("-m", "kvpolicy", "list", "--json")))
    assert not data["failed_plugins"]
    mine = {(row["kind"], row["name"]): row["from"] for row in data["entries"] if row["distribution"] != "kvpolicy"}
    toml, module = minimal_package()
    project = tomllib.loads(toml)["project"]
    scorer = re.search(r'register\("(\w+)"', module)[1]
    assert mine == {
        ("policy", NAME): f"{NAME} 0.1.0",
        ("policy", f"{NAME}-slope"): f"{NAME} 0.1.0",
        ("importance", "example_plugin_size"): f"{NAME} 0.1.0",
        ("allocator", "example_plugin_slope"): f"{NAME} 0.1.0",
        ("importance", scorer): f"{project['name']} {project['version']}",
    }


def test_it_is_used_by_name_from_yaml(stranger):
    own = stranger.folder / "own.yaml"
    own.write_text(
        "schema_version: 1\npolicy: own\nextends: rkv\nimportance: {use: example_plugin_size, order: 2.0}\n"
        "allocator: uniform\n"
    )
    assert "policy own is valid" in succeeded(stranger("-m", "kvpolicy", "validate", own))
    assert "example_plugin_size(order=2.0)" in succeeded(stranger("-m", "kvpolicy", "explain", own))
    own.write_text(own.read_text().replace("order: 2.0", "order: 0.5"))
    done = stranger("-m", "kvpolicy", "validate", own)
    assert done.returncode == 1
    assert "importance.order: should be greater than or equal to 1, got 0.5." in done.stderr


def test_the_schema_knows_it(stranger):
    schema = json.loads(succeeded(stranger("-m", "kvpolicy", "schema")))
    text = json.dumps(schema["$defs"]["importance"])
    assert "example_plugin_size" in text
    assert "Order of the norm: 1 sums magnitudes" in text


def test_generate_runs_it(stranger, tmp_path):
    from kvpolicy.testing.tiny import tiny_folder

    model = tiny_folder(tmp_path / "model")
    common = ("-m", "kvpolicy", "generate", "--model", model, "--budget", "24", "--max-new-tokens", "100")
    out = succeeded(stranger(*common, "--policy", NAME, "--compare", "full", "a prompt of a few words"))
    assert "peak" in out
    peak = re.search(r"KV entries per head, peak\W+(\d+)\W+(\d+)", out)
    assert peak is not None
    assert int(peak[1]) <= 24 + 64
    assert int(peak[1]) < int(peak[2])
    # Counts that differ need a store that can hold them; without one the refusal is a sentence.
    done = stranger(*common, "--policy", f"{NAME}-slope", "a prompt of a few words")
    if done.returncode:
        assert re.fullmatch(r"error: policy .*allocator ExamplePluginSlope.*\.\n", done.stderr), done.stderr


def test_its_own_tests_pass(stranger):
    done = stranger(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--kvpolicy-profile=brief",
        "tests",
        cwd=stranger.folder / "example",
    )
    assert re.search(r"[1-9]\d* passed", succeeded(done))


def test_check_runs_on_the_package(stranger):
    laws = ("deterministic", "exact_total", "row_alone", "engine_row_alone")  # its own tests put it through all of them
    out = succeeded(stranger("-m", "kvpolicy", "check", NAME, *(f"--law={law}" for law in laws), "--profile=brief"))
    assert "example_plugin_size" in out
    assert "example_plugin_slope" in out


@pytest.mark.parametrize("name", ["Loudest", "Decayed", "PeakAttention"])
def test_the_components_of_the_page_obey_the_laws(name):
    from kvpolicy.testing import check_component

    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (source,) = [block for block in blocks if f"class {name}(" in block]
    space = {}
    exec(compile(source, str(PAGE), "exec"), space)
    catalog = kvpolicy.catalog()
    catalog.register(f"page_{name.lower()}", space[name])
    try:
        results = check_component(space[name])
    finally:
        catalog.unregister("importance", f"page_{name.lower()}")
    assert not [str(result) for result in results if result.status == "failed"]
    assert sum(result.status == "passed" for result in results) > 8
