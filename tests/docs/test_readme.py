"""The README: its links lead somewhere, its pictures are what is drawn, and it promises no release."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from kvpolicy.study.analysis import Estimate, VariantSummary
from kvpolicy.study.records import CellRecord
from kvsupport.pages import ROOT, blocks

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def slugs(page: Path) -> set[str]:
    """Return the names of the headings of a page, as forges make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head)) for head in heads)
    return {head.strip().lower().replace(" ", "-") for head in plain}


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("pictures_of_docs", ROOT / "scripts" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_links_lead_to_files_and_places():
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", TEXT)
    inside = [link for link in links if not link.startswith("http")]
    assert len(inside) > 25
    for link in inside:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).is_file(), link
        if anchor:
            assert anchor in slugs(ROOT / path), link


@pytest.mark.parametrize(
    "task", ["declare a policy", "plug a scorer in", "run an ablation", "serve in vLLM", "check a policy", "move over"]
)
def test_each_task_is_one_click_away(task):
    (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| {task} |")]
    assert re.search(r"\(docs/[\w/-]+\.md\)", row)


def test_the_citation_is_that_of_the_file():
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    said = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8").replace("{KV}", "KV")
    assert re.search(r'^title: "(.*)"$', cited, re.MULTILINE)[1] in said
    assert f"version = {{{re.search(r'^version: (.*)$', cited, re.MULTILINE)[1]}}}" in said


def test_examples_are_short():
    found = {block.language: [line for line in block.text.splitlines() if line.strip()] for block in blocks(README)}
    assert len(found["python"]) <= 12
    assert len([line for line in found["yaml"] if not line.startswith("#")]) <= 10


def test_no_release_is_promised():
    assert not re.search(r"pip install[^\n]*[\"' ]kvpolicy", TEXT)
    assert "no release on PyPI" in TEXT


@pytest.mark.parametrize("name", ["pipeline", "accuracy"])
def test_pictures_are_what_is_drawn(name, pictures):
    draw = getattr(pictures, name)
    for suffix, colours in (("", pictures.LIGHT), ("-dark", pictures.DARK)):
        drawn = (pictures.PICTURES / f"{name}{suffix}.svg").read_text(encoding="utf-8")
        assert drawn == draw(colours), f"run python -P scripts/pictures.py {name}"


def test_the_strip_of_the_pipeline_is_a_compaction(pictures):
    stay = pictures.kept()
    assert len(stay) == pictures.BUDGET
    assert stay == sorted(stay)
    lowest = min(pictures.SCORES[slot] for slot in stay[pictures.SINKS : -pictures.RECENT])
    gone = [score for slot, score in enumerate(pictures.SCORES) if slot not in stay]
    assert max(gone) <= lowest


def summary(name, mean, dataset="one", **settings):
    cell = CellRecord(
        name=name, condition="", settings=settings, model="m", dataset=dataset, policy=None, digest="", error=None,
        keys=(), data={"budget": {"fraction": 1.0}},
    )  # fmt: skip
    numbers = {} if mean is None else {"exact": Estimate(mean, mean / 2, mean * 2, 100)}
    return VariantSummary(cell, 100, 0, None, numbers, {})


def test_a_picture_shows_what_was_published_with_the_prompt_not_pinned(pictures):
    def at(percent, pinned="false"):
        return {"budget": f"{percent}% of the trace", "protect.prompt": pinned}

    rows = [
        summary("full", 0.9),
        summary("rkv", 0.8, **at(50)),
        summary("rkv", 0.7, **at(50, "true")),
        summary("rkv", 0.2, **at(5)),
        summary("full", None, "two"),  # nothing was graded
        summary("rkv", None, "two", **at(5)),
    ]
    assert list(pictures.measured(rows)) == ["one"]
    lines = pictures.measured(rows)["one"]
    assert lines["rkv"] == [("5%", 0.2, 0.1, 0.4), ("50%", 0.8, 0.4, 1.6)]
    assert [(budget, mean) for budget, mean, *_ in lines["full cache"]] == [("5%", 0.9), ("50%", 0.9)]
