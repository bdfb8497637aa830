"""Every kernel compiles for GPUs that nobody here has, without spills and with matrix instructions: ``make test-aot``.

The table of resources is written by ``python -P -m kvpolicy_kernels.aot --full --write tests/aot/resources.json``.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kvpolicy_kernels import aot
from kvpolicy_kernels.variants import variants

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="what is interpreted cannot be compiled"),
]

TABLE = json.loads(Path(__file__).with_name("resources.json").read_text(encoding="utf-8"))
ALL, SOME = aot.unique(variants(full=True)), aot.unique(variants(full=False))
CASES = [
    pytest.param(target, name, id=f"{target} {name}", marks=() if name in SOME else pytest.mark.slow)
    for name in ALL
    for target in aot.TARGETS
]


@pytest.mark.parametrize(("target", "name"), CASES)
def test_compiles_within_the_table(target, name):
    found = aot.compile_for(target, ALL[name])
    assert not list(aot.failures(target, ALL[name], found, TABLE.get(name, {}).get(target, {}).get("registers")))


def test_the_table_has_every_variant_and_no_other():
    assert set(SOME) <= set(ALL)
    assert set(TABLE) == set(ALL)
    assert all(set(row) == set(aot.TARGETS) for row in TABLE.values())


def test_the_representative_set_has_every_kernel_and_all_that_multiply():
    kernels = {launch.name for launch in SOME.values()}
    assert kernels == {launch.name for launch in ALL.values()}
    multiplying = {ALL[name].name for name, row in TABLE.items() if all(of["products"] for of in row.values())}
    assert multiplying == {
        "scan.scan_keys",
        "window.mean_weights",
        "similarity.exempt",
        "ragged.attend_part",
        "density.sum_near",
    }
    assert all(of["matrix"] or not of["products"] for row in TABLE.values() for of in row.values())
    assert not any(of["spills"] for row in TABLE.values() for of in row.values())


def test_what_is_wrong_is_named():
    name = next(n for n in SOME if n.startswith("similarity.exempt"))
    good = aot.Resources(registers=100, spills=0, shared=1024, matrix=8, conversions=3, products=2)
    moving = next(launch for launch in SOME.values() if launch.name == "compaction.move_kept")

    def problems(known=100, launch=SOME[name], **wrong):
        return list(aot.failures("gfx942", launch, replace(good, **wrong), known))

    assert problems() == problems(registers=116) == []
    assert problems(registers=117) == ["needs 117 registers and the committed table says 100"]
    assert problems(known=None) == ["is not in the committed table"]
    assert problems(spills=8) == ["spills 8"]
    assert problems(shared=65537) == ["needs 65537 bytes of shared memory and gfx942 has 65536"]
    assert problems(matrix=0) == ["has no matrix instruction"]
    assert problems(matrix=0, products=0) == []
    assert problems(launch=moving) == ["changes layouts 3 times"]


def test_a_part_that_is_compiled_leaves_the_other_rows(tmp_path, monkeypatch, capsys):
    file = tmp_path / "resources.json"
    file.write_text(json.dumps(TABLE | {"gone.kernel fp32": {}}))
    monkeypatch.setattr("sys.argv", ["aot", "--kernel", "similarity.fold", "--target", "sm_120", "--write", str(file)])
    assert aot.main() == 0
    compiled = [name for name in SOME if name.startswith("similarity.fold")]
    assert capsys.readouterr().out.count("similarity.fold_sums") == len(compiled) > 0
    written = json.loads(file.read_text())
    assert set(written) == set(TABLE)
    for name, row in TABLE.items():
        untouched = set(row) - ({"sm_120"} if name in compiled else set())
        assert {target: written[name][target] for target in untouched} == {target: row[target] for target in untouched}
    file.write_text(json.dumps({name: row for name, row in TABLE.items() if name != compiled[0]}))
    monkeypatch.setattr(
        "sys.argv", ["aot", "--missing", "--kernel", "similarity.", "--target", "sm_80", "--write", str(file)]
    )
    assert aot.main() == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("sm_80")] != []
    assert set(json.loads(file.read_text())[compiled[0]]) == {"sm_80"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--calls", "no_such_module:calls"], "--calls no_such_module:calls is no function"),
        (["--calls", "kvpolicy_kernels.variants"], "write MODULE:FUNCTION"),
        (["--calls", ":"], "write MODULE:FUNCTION"),
        (["--missing"], "by the file of --write; name one"),
        (["--kernel", "no.such"], "nothing is launched"),
        (["--write", "list.json"], "list.json is no table"),
        (["--write", "text.json"], "text.json is no table"),
        (["--write", "."], ". is no table"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    Path("text.json").write_text("not JSON")
    monkeypatch.setattr("sys.argv", ["aot", *arguments])
    assert aot.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1
