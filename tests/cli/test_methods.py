from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvpolicy
from kvpolicy import Catalog
from kvpolicy.cli import main
from kvpolicy.cli.app import app
from kvpolicy.cli.methods import methods_markdown
from kvpolicy.loading import installed
from kvpolicy.loading.entries import Origin

ROOT = Path(__file__).resolve().parents[2]


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    return {re.match(r"\| \[([^]]+)\]", line)[1]: [c.strip() for c in line.strip("|").split(" | ")] for line in lines}


def test_the_page_in_the_docs_is_up_to_date():
    spec = importlib.util.spec_from_file_location("methods_script", ROOT / "scripts" / "methods.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python scripts/methods.py"


def test_every_bundled_policy_has_a_row_and_its_departures():
    text = methods_markdown("kvpolicy")
    found = rows(text)
    names = [e.name for e in kvpolicy.catalog().policies() if e.origin.distribution == "kvpolicy"]
    assert list(found) == sorted(names)
    for name in names:
        spec = kvpolicy.load(name)
        assert f"### {name}\n" in text
        for departure in spec.departures:
            assert " ".join(departure.split()) in text


def test_a_row_says_parts_needs_and_memory():
    found = rows(methods_markdown("kvpolicy"))
    _, paper, parts, runs, needs, freed = found["rkv"]
    assert paper == "[arXiv:2505.24133](https://arxiv.org/abs/2505.24133)"
    assert parts.startswith("importance `window_attention`; redundancy `key_cosine`; mixer `linear`; protect `sinks`")
    assert (runs, needs, freed) == ("decoding, every 128", "`queries`", "yes")
    assert found["full"][3:] == ["never", "–", "no, keeps everything"]
    assert found["pyramidkv"][5] == "yes, by layer"
    assert found["adakv-snapkv"][5] == "yes, by head"


def test_the_command_prints_it_and_takes_a_package():
    run = CliRunner()
    assert run.invoke(app, ["list", "--markdown", "--package", "kvpolicy"]).output == methods_markdown("kvpolicy")
    assert rows(run.invoke(app, ["list", "--markdown", "--package", "nobody"]).output) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--markdown", "--json"], "leave the others out"),
        (["--markdown", "--kind", "policy"], "leave the others out"),
        (["--kind", "study", "--runs", "decode"], "--runs: says when a policy compacts"),
        (["--kind", "tabel"], "Did you mean 'table'?"),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys, arguments, message):
    assert main(["list", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_package_is_the_same_however_its_name_is_written(capsys):
    everything = methods_markdown()
    assert methods_markdown("KVPolicy") == everything
    assert main(["list", "--markdown", "--package", "nobody"]) == 1
    assert capsys.readouterr().err == "error: --package: 'nobody' registers no policy; write one of kvpolicy.\n"


def test_tables_are_listed_and_a_damaged_one_is_named(tmp_path, capsys):
    assert main(["list", "--kind", "table", "--json"]) == 0
    entries = {e["name"]: e for e in json.loads(capsys.readouterr().out)["entries"]}
    assert entries["smollm2-135m/qfilter"]["summary"].startswith(
        "query_filters of smollm2-135m-instruct: the direction"
    )
    assert entries["smollm2-135m/qfilter"]["distribution"] == "kvpolicy"
    damaged = tmp_path / "it.safetensors"
    damaged.write_bytes(b"nothing")
    catalog = Catalog()
    catalog.register_table("a/b", damaged, Origin("somebody"))
    with installed.using(catalog):
        assert main(["list"]) == 0
    assert "not valid: table" in " ".join(capsys.readouterr().out.split())
