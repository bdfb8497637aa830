"""The recorder of kept sets, on a tiny model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from kvpolicy.testing.tables import stand_in_tables


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    file = Path(__file__).parents[2] / "scripts" / "kept_sets.py"
    spec = importlib.util.spec_from_file_location("kept_sets", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks there for the types of fields
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded(script, tmp_path_factory):
    file = tmp_path_factory.mktemp("kept") / "first.npz"
    with stand_in_tables():
        script.record(file, ["knorm", "adakv-snapkv", "full"], None, tiny=True)
    return file


def test_what_a_record_holds(recorded):
    found = np.load(recorded)
    assert str(found["full/error"]) == "nothing was evicted"
    for name, most in (("knorm", 88), ("adakv-snapkv", 2 * 88)):
        kept = [found[key] for key in found if key.startswith(f"{name}/") and key.endswith("/kept")]
        assert len(kept) >= 2 * 3
        assert all(layer.sum(1).min() > 0 and layer.sum(1).max() <= most for layer in kept)


def test_a_record_equals_itself_and_one_that_follows_it(script, recorded, tmp_path, capsys):
    assert script.compare(recorded, recorded, first=False) == 0
    other = tmp_path / "other.npz"
    with stand_in_tables():
        script.record(other, ["knorm", "adakv-snapkv", "full"], recorded, tiny=True)
    assert script.compare(recorded, other, first=False) == 0
    assert "0 of" in capsys.readouterr().out


def test_a_difference_is_named_with_the_gap_of_its_scores(script, recorded, tmp_path, capsys):
    changed = dict(np.load(recorded))
    kept, scores = changed["knorm/001/02/kept"].copy(), changed["knorm/001/02/scores"]
    known = np.isfinite(scores[1])
    lost, won = np.flatnonzero(kept[1])[0], np.flatnonzero(known & ~kept[1])[0]
    kept[1, lost], kept[1, won] = False, True
    changed["knorm/001/02/kept"] = kept
    file = tmp_path / "changed.npz"
    np.savez(file, **changed)
    assert script.compare(recorded, file, first=True) == 1
    said = capsys.readouterr().out
    gap = (scores[1, lost] - scores[1, won]) / np.abs(scores[1][known]).max()
    assert f"knorm: compaction 1, layer 2, head 1: [{lost}] for [{won}], scores differ by {gap:.1e}" in said


def test_what_another_record_says_is_carried_out(script, recorded, tmp_path):
    """After a change in the first compaction, the second has other candidates; they are those of the other record."""
    changed = dict(np.load(recorded))
    kept = changed["knorm/000/00/kept"].copy()
    lost, won = np.flatnonzero(kept[0])[0], np.flatnonzero(~kept[0])[-1]
    kept[0, lost], kept[0, won] = False, True
    changed["knorm/000/00/kept"] = kept
    file, followed = tmp_path / "changed.npz", tmp_path / "followed.npz"
    np.savez(file, **changed)
    script.record(followed, ["knorm"], file, tiny=True)
    scores = np.load(followed)["knorm/001/00/scores"][0]
    assert np.isnan(scores[lost])
    assert np.isfinite(scores[won])
