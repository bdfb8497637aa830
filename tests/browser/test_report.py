"""The page of a study's report, as a reader's browser shows it."""

from __future__ import annotations

import itertools
import random

import pytest

from kvpolicy.study.report.content import Commands, build
from kvpolicy.study.results import Results
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Outcome
from kvsupport.scripted import scripted_study

pytestmark = pytest.mark.browser

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>"
POLICIES = ("rkv", "snapkv", "h2o", "tova", "random", "keydiff", "recent-pinned", "knorm")


def script(task, item):
    """Numbers that depend on policy, budget and problem, as in a study; one policy fails, one does so at times."""
    policy, budget = task.policy["policy"], task.policy["budget"].get("tokens", 900)
    draw = random.Random(f"{policy} {budget} {item.problem.index}")
    if policy == "knorm" or (policy == "tova" and item.problem.index == 3):
        return Outcome(error=f"out of memory {NASTY}")
    good = min(0.95, 0.3 + budget / 1000 - 0.05 * POLICIES.index(policy) if policy != "full" else 0.95)
    metrics = {"bytes_peak": 2048.0 * budget, "resident_mean": float(budget), "seconds": draw.random()}
    if task.kind == "generate":
        metrics |= {"exact": float(draw.random() < good), "tokens": 900.0}
    else:
        metrics["kl"] = (1 - good) * draw.random()
    return Outcome(None, metrics, "", (1, 2, 3), 100)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with eight variants, three budgets, two conditions, two datasets, failures, and texts that are code."""
    from kvpolicy.study.report.page import html

    folder = tmp_path_factory.mktemp("report")
    needle = {"use": "needle", "words": 40, "chat": False}
    spec = StudySpec(
        study="browser",
        description=f"What is it worth? {NASTY}",
        models=[f"a-model-with-quite-a-long-name-{NASTY}"],
        datasets=[{**needle, "forced": True}, {**needle, "name": "another-needle"}],
        axes={"policy": list(POLICIES)},
        conditions={"budget": [{"trace": share} for share in (0.5, 0.25, 0.1)], "protect.prompt": [False, True]},
        samples=40,
        metrics=["exact", "kl", "tokens", "resident_mean", "bytes_peak", "seconds"],
    )
    scripted_study(spec, folder / "browser.sqlite", script)
    with Results(folder / "browser.sqlite") as results:
        made = build(results, Commands("kvpolicy study run browser.yaml", "kvpolicy study report browser.yaml"))
    path = folder / "browser.html"
    path.write_text(html(made), encoding="utf-8")
    return path


def open_all(page):
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")


@pytest.mark.parametrize("width", [1280, 768, 390, 360])
def test_it_fits_every_window(page_at, report, width):
    opened = page_at(report, width)
    opened.assert_fits()
    open_all(opened.page)
    opened.assert_fits()
    narrow = opened.page.evaluate(
        "[...document.querySelectorAll('p, summary, h2, h3, pre, figure')].filter(e => !e.closest('.scroll') && "
        "e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length"
    )
    assert narrow == 0


def test_tables_that_are_too_wide_scroll_by_themselves(page_at, report):
    page = page_at(report, 360).page
    open_all(page)
    wide = page.locator(".scroll").evaluate_all("all => all.filter(e => e.scrollWidth > e.clientWidth + 1).length")
    assert wide > 0
    first = page.locator(".scroll").first
    first.evaluate("e => { e.scrollLeft = 200 }")
    shown = first.locator("th[scope=row]").first.bounding_box()
    assert shown["x"] >= 0  # the names of the variants stay in sight


def test_plots_are_drawn(page_at, report):
    page = page_at(report).page
    open_all(page)
    plots = page.locator("figure svg").evaluate_all(
        """all => all.map(svg => {
            const box = svg.getBoundingClientRect(), lines = [...svg.querySelectorAll('path, use')];
            const seen = lines.filter(line => {
                const inner = line.getBoundingClientRect(), style = getComputedStyle(line);
                return inner.width + inner.height > 2 && style.visibility === 'visible'
                    && inner.right > box.left && inner.left < box.right;
            });
            const outside = [...svg.querySelectorAll('text')].filter(text => {
                const inner = text.getBoundingClientRect();
                return inner.left < box.left - 2 || inner.right > box.right + 2 || inner.bottom > box.bottom + 2;
            });
            return {width: box.width, height: box.height, lines: seen.length,
                    title: svg.querySelector('title').textContent,
                    texts: svg.querySelectorAll('text').length, outside: outside.map(text => text.textContent)};
        })"""
    )
    # Of each dataset's metrics: budgets in two facets and a front, wide and narrow, a forest in each of six conditions.
    assert len(plots) == 3 * (2 * 2 + 2 + 6)
    seen = [plot for plot in plots if plot["width"]]
    assert len(seen) == 3 * (2 + 1 + 6)
    for plot in seen:
        assert plot["width"] > 300
        assert plot["height"] > 100
        assert plot["lines"] > 10
        assert plot["texts"] > 5
        assert plot["title"]
        assert plot["outside"] == []


def test_lines_can_be_told_apart_without_colour(page_at, report):
    page = page_at(report).page
    patterns = page.locator("figure svg").first.evaluate(
        "svg => [...new Set([...svg.querySelectorAll('path')].map(p => getComputedStyle(p).strokeDasharray))]"
    )
    assert len(patterns) >= 5


def test_all_variants_stand_on_the_same_axes_with_their_names(page_at, report):
    for width, shown, hidden in ((1280, ".wide", ".narrow"), (390, ".narrow", ".wide")):
        panel = page_at(report, width).page.locator("figure.panel").first
        assert panel.locator(shown).is_visible()
        assert not panel.locator(hidden).is_visible()
        names = panel.locator(f"{shown} text").all_text_contents()
        assert {"snapkv", "recent-pinned", "h2o", "rkv (baseline)"} <= set(names)
    wide = page_at(report).page.locator("figure.panel .wide").first
    names = ["rkv (baseline)", "snapkv", "h2o", "tova", "random", "keydiff", "recent-pinned"]
    boxes = [wide.locator("text", has_text=name).first.bounding_box() for name in names]
    boxes.sort(key=lambda box: box["y"])
    assert all(a["y"] + a["height"] <= b["y"] + 3 for a, b in itertools.pairwise(boxes)), "no name covers another one"
    assert len({round(box["x"]) for box in boxes}) == 1
    assert all(box["height"] >= 13 for box in boxes)


def test_a_point_leads_to_its_problems_and_they_to_what_was_asked(page_at, report):
    page = page_at(report).page
    point = page.locator("figure.panel .wide a", has=page.locator("title", has_text="snapkv (budget=25")).first
    assert "snapkv (budget=25% of the trace" in point.locator("title").text_content()
    point.dispatch_event("click")  # at its place there may be another one
    row = page.locator(page.evaluate("location.hash"))
    assert row.is_visible()
    assert row.locator("th").inner_text().strip() == "snapkv"
    row.locator("summary").click()
    number = row.locator("td.long a").first
    text = number.inner_text()
    number.click()
    asked = page.locator(page.evaluate("location.hash"))
    assert asked.is_visible()
    assert asked.locator("td").first.inner_text() == text


def test_text_in_plots_can_be_selected_and_found(page_at, report):
    page = page_at(report).page
    text = page.locator("figure svg text", has_text="rkv (baseline)").first
    assert text.is_visible()
    found = text.evaluate("e => { getSelection().selectAllChildren(e); return getSelection().toString() }")
    assert found == "rkv (baseline)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_paper(page_at, report, scheme):
    page = page_at(report, color_scheme=scheme).page

    def brightness(colour):
        values = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    paper = brightness(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    chosen = ("p", ".note", "a", ".interval", "figcaption", ".worse")
    colours = {name: page.locator(name).first.evaluate("e => getComputedStyle(e).color") for name in chosen}
    colours["plot"] = page.locator("figure svg text").first.evaluate("e => getComputedStyle(e).fill")
    for name, colour in colours.items():
        ends = sorted((brightness(colour), paper))
        assert (ends[1] + 0.05) / (ends[0] + 0.05) >= 4.5, name


def test_paper_shows_what_is_folded(page_at, report):
    page = page_at(report).page
    folded = page.locator("details:not([open]) pre").first
    assert not folded.evaluate("e => e.checkVisibility()")
    page.emulate_media(media="print", color_scheme="dark")
    assert folded.evaluate("e => e.checkVisibility({contentVisibilityAuto: true})")
    assert folded.bounding_box()["height"] > 20
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("figure").first.evaluate("e => getComputedStyle(e).breakInside") == "avoid"
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_nothing_in_the_results_becomes_code(page_at, report):
    page = page_at(report).page
    assert page.locator("script, img").count() == 0
    assert NASTY in page.locator("header").inner_text()
    assert page.locator(".warning li").count() == 1


def test_links_lead_somewhere(page_at, report):
    page = page_at(report).page
    for link in page.locator("nav a").all():
        link.evaluate("e => e.click()")
        assert page.locator(page.evaluate("location.hash")).is_visible()
