"""A study's folder in a browser: from a mark to its problem, and the text under both policies."""

from __future__ import annotations

import pytest

from kvpolicy.study.asked import Asked
from kvpolicy.study.report.bundle import write_bundle
from kvpolicy.study.report.content import Commands, build
from kvpolicy.study.results import Results
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Outcome
from kvsupport.scripted import scripted_study

pytestmark = pytest.mark.browser


def script(task, item):
    policy, number = task.policy["policy"], item.problem.index
    right = float(policy != "random" or number % 3 == 0)
    metrics = {"exact": right, "tokens": 9.0, "bytes_peak": 10.0 * len(policy)}
    text = f"It begins alike for {number}.\nThen <b>comes</b> {'the end' if right else policy}."
    return Outcome(None, metrics, text, (1, 2, 3), 28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    spec = StudySpec(
        study="small",
        models=["nowhere"],
        datasets=[{"use": "needle", "words": 20, "chat": False}],
        axes={"policy": ["rkv", "random", "snapkv"]},
        conditions={"budget": [64, 128]},
        samples=9,
        metrics=["exact", "tokens", "bytes_peak"],
    )
    scripted_study(spec, folder / "small.sqlite", script)
    with Results(folder / "small.sqlite") as results:
        asked = Asked.last(results)
        report = build(results, Commands("kvpolicy study run small.yaml", "kvpolicy study report small.yaml"), asked)
        write_bundle(results, asked, report, folder / "site", {})
    return folder / "site"


def only_the_folder_was_asked_for(opened, folder):
    assert all(address.startswith(folder.resolve().as_uri()) for address in opened.requests)
    opened.requests.clear()


def test_a_mark_leads_to_its_problem_with_both_texts(page_at, folder):
    opened = page_at(folder / "index.html")
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    row = page.locator("tr", has=page.locator(".strip a")).filter(has_text="random").first
    mark = row.locator(".strip a", has=page.locator("title", has_text="problem 4: worse"))
    mark.hover()
    mark.click()
    page.wait_for_url("**/problems/0-4.html#*")
    assert page.locator("h1").inner_text() == "Problem 4 of needle-20 · nowhere"
    chosen = [page.locator(f"#{side}").evaluate("e => e.selectedOptions[0].textContent") for side in "ab"]
    assert chosen == ["random (budget=64): wrong", "rkv (budget=64): right"]
    assert page.locator("#text-a").inner_text() == "It begins alike for 4.\nThen <b>comes</b> random."
    assert page.locator("#text-a .same").inner_text() == "It begins alike for 4.\nThen <b>comes</b> "
    assert page.locator("#text-b mark").inner_text() == "the end."
    opened.assert_fits()
    page.get_by_role("link", name="the next one").click()
    page.wait_for_url("**/problems/0-5.html")
    page.get_by_role("link", name="small").click()
    page.wait_for_url("**/index.html")
    only_the_folder_was_asked_for(opened, folder)


def test_two_others_can_be_chosen_and_equal_texts_are_said_to_be(page_at, folder):
    page = page_at(folder / "problems/0-3.html").page
    page.locator("#a").focus()
    page.keyboard.press("End")
    assert page.locator("#a").evaluate("e => e.selectedOptions[0].textContent") == "snapkv (budget=128): right"
    assert page.locator("#verdict").inner_text() == "Both are the same text."
    assert page.locator("mark").count() == 0


@pytest.mark.parametrize("width", [1280, 390])
def test_a_problem_fits_the_window(page_at, folder, width):
    opened = page_at(folder / "problems/0-4.html", width)
    opened.assert_fits()
    boxes = [opened.page.locator(f"#text-{side}").bounding_box() for side in "ab"]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width == 1280)
    assert opened.page.locator("section script, img").count() == 0
