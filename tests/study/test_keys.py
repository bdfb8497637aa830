"""What is in a run's key, and that results of this epoch are what they were."""

from __future__ import annotations

import hashlib
import json

import pytest

import kvpolicy
from kvpolicy import KVPolicyError, PolicySpec
from kvpolicy.study import keys
from kvpolicy.study.keys import EPOCH, Codes
from kvpolicy.study.results import Results

RECORDED = {
    "epoch": 3,
    "rkv": "25e131cbc1a8",
    "h2o": "ab0a92d20456",
    "random": "9c9d038a5858",
    "snapkv": "91852c8f2fba",
    "pyramidkv": "23fbef001859",
    "full": "c5ceca867c00",
}
"""Hashes of what each policy generated and how much it held; made by the test below."""


def test_results_of_this_epoch_are_what_they_were(study, tmp_path):
    """If a change to kvpolicy changes them on purpose, raise `EPOCH` by one and put what is found into `RECORDED`."""
    policies = [name for name in RECORDED if name not in ("epoch", "full")]
    made = study.make(
        axes={"policy": policies},
        conditions={"budget": [80], "trigger": [{"every": 16}], "phase": ["decode"]},
        datasets=[{"use": "needle", "words": 20, "chat": False, "forced": True}],
        samples=2,
    )
    study.run(made, tmp_path / "r.sqlite")
    found = {"epoch": EPOCH}
    with Results(tmp_path / "r.sqlite") as results:
        records = {record.key: record for record in results.records()}
        for cell in results.cells():
            runs = [records[key] for key in cell.keys]
            assert {run.error for run in runs} == {None}, cell.name
            told = sorted(
                (run.kind, run.problem, run.output, *(f"{run.metrics.get(m, 0):.6f}" for m in ("resident_mean", "kl")))
                for run in runs
            )
            found[cell.name] = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
    assert found == RECORDED


SCORER = """\
import torch
from kvpolicy import ImportanceScorer
{line}

class Mine(ImportanceScorer):
    def score(self, view):
        return torch.zeros(view.shape[:3])
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a scorer that uses a helper of a helper; returns its folder and a function that gives its code."""
    import importlib
    import sys

    folder = tmp_path / "mine_for_keys"
    (folder / "deep").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "scorer.py": SCORER.format(line="from mine_for_keys.deep import helper"),
        "deep/__init__.py": "",
        "deep/helper.py": "def act():\n    from .. import other\n",
        "other.py": "",
        "unused.py": "",
    }.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("mine_for_keys.scorer")
    kvpolicy.catalog().register("mine_for_keys", module.Mine)
    spec = kvpolicy.load("rkv", importance="mine_for_keys")
    yield folder, lambda: Codes().of(spec)
    kvpolicy.catalog().unregister("importance", "mine_for_keys")
    for name in [name for name in sys.modules if name.startswith("mine_for_keys")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["scorer.py", "deep/helper.py", "other.py", "deep/__init__.py"])
def test_the_code_of_a_component_is_that_of_all_it_imports_from_its_package(package, name):
    folder, code = package
    before = code()
    assert code() == before
    (folder / "unused.py").write_text("# other\n")
    assert code() == before
    (folder / name).write_text((folder / name).read_text() + "# other\n")
    assert code() != before


def test_a_component_without_a_source_is_refused():
    space = {}
    exec(SCORER.format(line=""), {"__name__": "nowhere"}, space)
    kvpolicy.catalog().register("without_source", space["Mine"])
    try:
        with pytest.raises(KVPolicyError, match=r"^component Mine: has no source file, so a study could not tell when"):
            Codes().of(kvpolicy.load("rkv", importance="without_source"))
    finally:
        kvpolicy.catalog().unregister("importance", "without_source")


def test_a_table_is_part_of_the_code(tmp_path):
    from dataclasses import replace

    from kvpolicy.tables import load_table, save_table

    table = load_table("smollm2-135m/headkv", "head_scores")
    path = tmp_path / "t.safetensors"
    save_table(table, path)
    spec = PolicySpec.from_yaml(kvpolicy.load("headkv").replace("allocator.table", str(path)).to_yaml())
    before = Codes().of(spec)
    save_table(replace(table, tensors={"scores": table.tensors["scores"].flip(0)}), tmp_path / "u.safetensors")
    other = kvpolicy.load("headkv").replace("allocator.table", str(tmp_path / "u.safetensors"))
    assert Codes().of(other) != before
    save_table(table, tmp_path / "u.safetensors")


def test_policies_that_share_components_share_their_code_and_nothing_else():
    codes = Codes()
    rkv = kvpolicy.load("rkv")
    assert codes.of(rkv) == codes.of(rkv.replace("budget", {"tokens": 64}))
    assert codes.of(rkv) != codes.of(kvpolicy.load("snapkv"))
    assert set(keys.WORDS) >= {"code", "content", "weights", "dtype", "max_new_tokens"}
