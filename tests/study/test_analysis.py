from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

from kvpolicy import KVPolicyError
from kvpolicy.study.analysis import VariantSummary, compare, cuts, estimate, holm, shown, summarise, tango
from kvpolicy.study.models import find_model
from kvpolicy.study.records import RunRecord, model_data
from kvpolicy.study.report.content import Commands, build
from kvpolicy.study.report.markdown import markdown
from kvpolicy.study.results import CellRecord, Results
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Outcome
from kvsupport.scripted import scripted_study

pytest.importorskip("scipy")


def row(name, values, *, metric="exact", condition="", dataset="d", failed=0):
    cell = CellRecord(name, condition, {}, "m", dataset, "", name, None)
    values = dict(enumerate(values))
    return VariantSummary(cell, len(values), failed, None, {}, {metric: values})


def test_a_proportion_gets_wilsons_interval():
    found = estimate([1.0] * 97 + [0.0] * 3, proportion=True)
    assert (found.value, found.problems) == (0.97, 100)
    assert (found.low, found.high) == pytest.approx((0.9155, 0.9897), abs=1e-3)
    perfect = estimate([1.0] * 20, proportion=True)
    assert perfect.high == 1
    assert perfect.low == pytest.approx(0.839, abs=1e-3)  # certainty takes more than 20 problems
    assert math.isnan(estimate([1.0], proportion=True).low)


def test_other_means_get_a_bootstrap_interval():
    generator = random.Random(0)
    values = [generator.gauss(10, 2) for _ in range(200)]
    found = estimate(values, proportion=False)
    half = 1.96 * 2 / math.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.2)
    assert found.low < found.value < found.high
    assert estimate(values, proportion=False) == found
    assert estimate([3.0, 3.0, 3.0], proportion=False).low == 3


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = random.Random(1)
    hits = 0
    for _ in range(200):
        found = estimate([float(generator.random() < 0.8) for _ in range(60)], proportion=True)
        hits += found.low <= 0.8 <= found.high
    assert 0.9 <= hits / 200 <= 0.99


def test_mcnemar_looks_only_at_the_problems_that_differ():
    base = [1.0] * 50 + [0.0] * 50
    better = [1.0] * 49 + [0.0] + [1.0] * 9 + [0.0] * 41
    (found,) = compare([row("a", base), row("b", better)], "exact")
    assert (found.wins, found.losses) == (9, 1)
    assert found.difference.value == pytest.approx(0.08)
    assert found.p == pytest.approx(2 * (1 + 10) / 2**10)  # two-sided sign test of 9 to 1
    assert (
        (found.difference.low, found.difference.high) == tango(9, 1, 100) == pytest.approx((0.0226, 0.1541), abs=1e-4)
    )
    assert found.difference.low < found.difference.value < found.difference.high
    assert found.baseline == "a"


@pytest.mark.parametrize(("wins", "losses", "count"), [(0, 14, 16), (9, 1, 100), (3, 3, 20), (0, 0, 16), (1, 0, 2)])
def test_mcnemars_interval_goes_beyond_the_estimate_on_both_sides(wins, losses, count):
    low, high = tango(wins, losses, count)
    assert -1 < low < (wins - losses) / count < high < 1
    assert tango(losses, wins, count) == pytest.approx((-high, -low))


def test_mcnemars_interval_ends_where_all_problems_are_lost():
    assert tango(0, 16, 16) == pytest.approx((-1, -0.6128), abs=1e-4)
    assert tango(16, 0, 16) == pytest.approx((0.6128, 1), abs=1e-4)


def test_mcnemars_interval_holds_zero_as_long_as_mcnemars_score_test_does_not_reject():
    for count in (20, 50):
        for wins in range(12):
            for losses in range(8):
                low, high = tango(wins, losses, count)
                square = (wins - losses) ** 2 / max(wins + losses, 1)
                assert (low <= 0 <= high) == (square <= 3.8415)


def test_mcnemars_interval_covers_the_truth_as_often_as_it_says():
    generator, hits = random.Random(3), 0
    for _ in range(400):
        kinds = generator.choices((1, -1, 0), (0.05, 0.3, 0.65), k=40)
        low, high = tango(kinds.count(1), kinds.count(-1), 40)
        hits += low <= 0.05 - 0.3 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_pairing_finds_what_two_intervals_would_hide():
    generator = random.Random(2)
    base = [generator.gauss(0, 1) for _ in range(80)]
    shifted = [x - 0.1 + generator.gauss(0, 0.05) for x in base]
    (found,) = compare([row("a", base, metric="kl"), row("b", shifted, metric="kl")], "kl")
    assert found.p < 0.001
    assert found.difference.high < 0
    assert not found.paired
    assert estimate(shifted, proportion=False).high > estimate(base, proportion=False).low


def test_only_problems_that_both_have_are_compared_and_conditions_are_kept_apart():
    rows = [
        row("a", [1.0, 0.0, 1.0, 1.0], condition="x"), row("b", [0.0, 0.0], condition="x"),
        row("a", [0.0, 0.0], condition="y"), row("b", [1.0, 1.0], condition="y"),
        row("full", [1.0, 1.0, 1.0]),
    ]  # fmt: skip
    x, y = compare(rows, "exact")
    assert (x.difference.value, x.difference.problems, y.difference.value) == (-0.5, 2, 1.0)
    assert [c.difference.value for c in compare(rows, "exact", "full")] == pytest.approx([-1 / 3, -1, -1, 0])
    with pytest.raises(KVPolicyError, match=r"there is no variant 'bb'\. Did you mean 'b'"):
        compare(rows, "exact", "bb")


def test_several_seeds_of_a_problem_are_one_observation():
    """Values between 0 and 1 are no successes to count: the test falls back to flipping signs."""
    (found,) = compare([row("a", [0.0] * 12), row("b", [0.5] * 12)], "exact")
    assert not found.paired
    assert found.p == pytest.approx(2 / 2**12, abs=1e-3)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    rows = [row("a", [0.0] * 20), row("b", [1.0] * 8 + [0.0] * 12), row("c", [1.0] * 7 + [0.0] * 13)]
    b, c = compare(rows, "exact")
    assert (b.p_holm, c.p_holm) == pytest.approx((2 * b.p, max(2 * b.p, c.p)))


def test_as_tables_show_it():
    assert shown(estimate([1.0] * 97 + [0.0] * 3, proportion=True), "exact") == "97.0 [91.5, 99.0]"
    assert shown(estimate([12345.6], proportion=False), "bytes_peak") == "12,346"


def test_a_single_problem_proves_nothing():
    (found,) = compare([row("a", [0.5], metric="kl"), row("b", [0.4], metric="kl")], "kl")
    assert found.difference.value == pytest.approx(-0.1)
    assert math.isnan(found.difference.low)
    assert (found.losses, found.paired, found.p) == (1, False, 1.0)


@pytest.mark.parametrize(("limit", "own", "cut"), [(40, None, 2), (40, 60, 1), (80, None, 0)])
def test_answers_of_the_full_cache_that_were_cut_are_counted(tmp_path, limit, own, cut):
    """Of answers of 40, 60 and 20 tokens; `own` is the dataset's number, which goes before the study's."""
    dataset = {"use": "needle", "words": 20, "chat": False} | ({"max_new_tokens": own} if own else {})
    spec = StudySpec(
        study="cut", models=["nowhere"], datasets=[dataset], samples=3, axes={"policy": ["random"]},
        conditions={"budget": [64]}, sampling={"max_new_tokens": limit},
    )  # fmt: skip
    lengths = (40.0, 60.0, 20.0)
    scripted_study(spec, tmp_path / "r.sqlite", lambda task, item: Outcome(
        None, {"exact": 1.0, "tokens": min(lengths[item.problem.index], float(own or limit))}, "x"
    ))  # fmt: skip
    with Results(tmp_path / "r.sqlite") as results:
        found = cuts(summarise(results))
        report = markdown(build(results, Commands("run", "report")))
    assert [sentence.split(" answers")[0] for sentence in found] == ([f"{cut} of 3"] if cut else [])
    assert ("and were cut there; raise it" in report) == bool(cut)


def test_what_was_cut_is_counted_by_each_datasets_own_limit_in_a_published_file_too():
    """The answers of "long" ended by themselves, at more tokens than the study allows elsewhere."""
    datasets = [
        {"use": "needle", "words": 20, "chat": False, "name": "short", "max_new_tokens": 30},
        {"use": "needle", "words": 20, "chat": False, "name": "long", "max_new_tokens": 80},
        {"use": "ruler", "tokens": 256, "name": "published"},
    ]
    cell = CellRecord("full", "", {}, "m", "", None, "d", None, keys=("a",))
    study = {"datasets": datasets, "sampling": {"max_new_tokens": 50}}
    for dataset, tokens, cut in (("short", 30, 1), ("long", 60, 0), ("long", 80, 1), ("published", 50, 0)):
        record = RunRecord("a", "generate", "m", dataset, 0, 0, "d", None, {"tokens": float(tokens)}, 9)
        (found,) = summarise(_Recorded([record]), cells=[replace(cell, dataset=dataset)], study=study)
        assert (found.cut, found.at_end) == (cut, 0), (dataset, tokens)


@pytest.mark.parametrize(("tokens", "said"), [(100, "the model's last position"), (120, "`max_new_tokens`"), (99, "")])
def test_answers_that_end_at_the_last_position_of_the_model_are_cut_too(tokens, said):
    positions = 28 + max(tokens, 100)
    study = {"datasets": [{"use": "needle"}], "sampling": {"max_new_tokens": 120}}
    cell = CellRecord("full", "", {}, "m", "needle-300", None, "d", None, keys=("a",))
    record = RunRecord("a", "generate", "m", "needle-300", 0, 0, "d", None, {"tokens": float(tokens)}, 28)
    recorded = _Recorded([record], [{"name": "m", "positions": str(positions)}])
    sentences = cuts(summarise(recorded, cells=[cell], study=study))
    assert [sentence.partition(" reached ")[2].partition(" and were cut there")[0] for sentence in sentences] == (
        [said] if said else []
    )


def test_how_many_positions_a_model_has_is_noted(model_folder):
    found = find_model(str(model_folder), "auto", "cpu")
    assert found.positions == json.loads((model_folder / "config.json").read_text())["max_position_embeddings"]
    assert model_data(found)["positions"] == str(found.positions)


class _Recorded:
    """Runs that are in no file."""

    def __init__(self, records, models=()):
        self._records, self._models = records, models

    def records(self, keys, *, outputs):
        return self._records

    def models(self):
        return self._models
