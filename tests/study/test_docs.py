"""docs/studies.md is true: its files load, its Python runs, its errors are what kvpolicy says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvpolicy
from kvpolicy import SpecError
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.sources import SOURCES
from kvpolicy.study.spec import FIELDS, find_study

PAGES = Path(__file__).resolve().parents[2] / "docs"
PAGE = (PAGES / "studies.md").read_text(encoding="utf-8")


def test_every_file_and_error_is_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(yaml|python)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    errors = 0
    for language, text in blocks:
        if language == "python":
            exec(compile(text, "docs/studies.md", "exec"), {})
            continue
        path = Path(re.match(r"# file: (\S+)\n", text)[1])
        path.write_text(text, encoding="utf-8")
        expected = re.search(r"^# error: (.*)\n", text, flags=re.MULTILINE)
        if expected is None:
            assert find_study(path).quickened().samples == 8
            continue
        errors += 1
        with pytest.raises(SpecError) as caught:
            find_study(path)
        assert str(caught.value) == expected[1]
    assert errors == 2


def test_all_fields_metrics_and_datasets_are_there():
    for name in (*FIELDS, *METRICS, *SOURCES):
        assert re.search(rf"^\| [^|]*`{name}`", PAGE, flags=re.MULTILINE), name
    for kind in SOURCES.values():
        for field in kind.model_fields:
            assert f"`{field}`" in PAGE or f"`{field}: " in PAGE, field


OF_THE_FIELD = ("ruler-4k", "reasoning-4x", "reasoning-8x", "reasoning-16x")
"""Studies of models that are too large to be run here: nothing is published of them."""


@pytest.mark.parametrize(
    "name", [entry.name for entry in kvpolicy.catalog().studies() if entry.name not in OF_THE_FIELD]
)
def test_the_published_results_are_of_the_runs_that_their_study_asks_for(name):
    """A variant has as many runs as the study asks for: with runs of other settings blended in it would have more."""
    study = find_study(name)
    page = (PAGES / "results" / f"{name}.md").read_text(encoding="utf-8")
    expected = {}
    for source in study.datasets:
        count = source.samples or study.samples
        if source.fresh_by_seed:
            expected[source.label] = {count * len(study.seeds)}
        else:
            paths = [source.path] if isinstance(source.path, str) else source.path
            texts = min(count, sum(len(Path(path).read_text(encoding="utf-8").splitlines()) for path in paths))
            # The same texts for each seed, which only a policy that draws is run with.
            draws = len(study.seeds) > 1 and any(each.policy.importance.use == "random" for each in study.variants())
            expected[source.label] = {texts, texts * len(study.seeds)} if draws else {texts}
    found: dict[str, list[int]] = {}
    place = ""
    inside = False
    for line in page.splitlines():
        if line.startswith("## "):
            place = line.removeprefix("## ").partition(" · ")[0]
        if line.startswith("| variant | runs |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("| ---"):
            found.setdefault(place, []).append(int(line.split("|")[2]))
    assert {dataset: set(counts) for dataset, counts in found.items()} == expected
    variants = len(study.variants())
    assert all(len(counts) >= variants for counts in found.values())
