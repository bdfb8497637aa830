"""The trace page in a browser: the difference of two policies, the legend, the card, the picture."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from kvpolicy.trace.page import Shown, trace_page
from kvsupport.recordings import random_recording

pytestmark = pytest.mark.browser


@pytest.fixture
def open_trace(page_at, tmp_path):
    """Write a page of one or two recordings, open it, and wait until it is drawn."""

    def show(*recordings, same_text=True, texts=None, width=1280, **context):
        texts = texts or [words(each.seen + 1) for each in recordings]
        shown = [
            Shown(name, "budget 24", text, [0], each, "every 8 tokens · protects sinks 2")
            for name, text, each in zip(("rkv", "snapkv"), texts, recordings, strict=False)
        ]
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.html"
        page = trace_page(shown, "tiny", same_text=same_text, made="float64 · kvpolicy 0.1 · 2026-11-30")
        path.write_text(page, encoding="utf-8")
        opened = page_at(path, width=width, **context)
        opened.page.locator("main[aria-busy=false]").wait_for()
        return opened

    return show


def words(count):
    return [f" w{i}" + ("\n" if i % 50 == 49 else "") for i in range(count)]


def pair(**changes):
    sizes = {"tokens": 120, "prompt": 20, "layers": (0, 1), "heads": 3, "budget": 24, "every": 8, **changes}
    return random_recording(**sizes), random_recording(**{**sizes, "seed": 1})


def settle(page):
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def see_difference(page):
    page.get_by_role("combobox", name="Show").select_option("the difference")
    settle(page)


def classes(page):
    return page.evaluate(
        "() => Array.from(kvpolicyTrace.traces[0].panel.querySelectorAll('[data-i]'), (span) => [...span.classList])"
    )


def check_difference(page, first, second, tokens, rows=slice(None), same=None):
    """Each token has the side that most heads are on, and the shade of their share."""
    a, b = first.held(tokens)[rows], second.held(tokens)[rows]
    same = min(first.seen, second.seen) if same is None else same
    counts = np.stack(
        [(a[:, :same] & ~b[:, :same]).sum(0), (b[:, :same] & ~a[:, :same]).sum(0), (a[:, :same] & b[:, :same]).sum(0)]
    )
    for p, names in enumerate(classes(page)):
        if p >= same:
            assert "elsewhere" in names, p
        elif p >= tokens:
            assert "future" in names, p
        elif not counts[:, p].any():
            assert "gone" in names, p
        else:
            side = int(counts[:, p].argmax())
            share = counts[side, p] / len(a)
            shade = 5 if share == 1 else 1 + np.searchsorted([0.1, 0.25, 0.5, 0.75], share)
            assert {f"d-{('a', 'b', 'both')[side]}", f"d{shade}"} <= set(names), p
    return counts


def test_the_difference_is_that_of_the_recordings(open_trace):
    first, second = pair()
    opened = open_trace(first, second)
    page = opened.page
    see_difference(page)
    counts = check_difference(page, first, second, 120)
    a, b, both = counts.sum(1)
    facts = page.locator(".facts").first.inner_text()
    each = [round(float(n) / 6) for n in (a, b, both)]
    assert facts == (
        f"entries per head: {each[0]} only rkv · {each[1]} only snapkv · {each[2]} both · "
        f"overlap {round(100 * both / (a + b + both))}%"
    )
    step = len(first.compactions) // 2
    page.locator("#slider").evaluate(
        "(slider, step) => { slider.value = step; slider.dispatchEvent(new Event('input')); }", step
    )
    settle(page)
    check_difference(page, first, second, int(first.compactions[step]))
    assert page.locator(".panel:visible").count() == 1
    assert page.locator(".panel h2").first.inner_text() == "rkv against snapkv"
    assert not page.locator(".details").first.is_visible()
    opened.assert_fits()
    page.get_by_role("combobox", name="Show").select_option("what is held")
    settle(page)
    assert page.locator(".panel:visible").count() == 2
    assert page.locator(".panel h2").first.inner_text() == "rkv, budget 24"
    assert not any(name.startswith("d-") for names in classes(page) for name in names)


def test_of_one_head_an_entry_is_held_under_one_policy_or_both(open_trace):
    first, second = pair()
    page = open_trace(first, second).page
    see_difference(page)
    page.get_by_role("combobox", name="Layer").select_option("layer 1")
    page.get_by_role("combobox", name="Head").select_option("head 2")
    settle(page)
    check_difference(page, first, second, 120, rows=[5])
    assert not page.locator("#legend-shares").is_visible()
    page.locator("[data-i='100']").first.click()
    settle(page)
    assert [each.inner_text() for each in page.locator("#card h3").all() if "kv" in each.inner_text()] == [
        "rkv",
        "snapkv",
    ]


def test_of_two_texts_the_beginning_that_they_share_is_compared(open_trace):
    first, second = pair()
    texts = [words(121), [*words(70), *(" other" for _ in range(51))]]
    page = open_trace(first, second, same_text=False, texts=texts).page
    see_difference(page)
    check_difference(page, first, second, 120, same=70)
    assert "of the first 70 tokens, which both texts have" in page.locator(".facts").first.inner_text()


def test_texts_that_begin_apart_have_no_difference_to_show(open_trace):
    first, second = pair()
    page = open_trace(first, second, same_text=False, texts=[words(121), [" x", *words(120)]]).page
    assert not page.get_by_role("combobox", name="Show").is_visible()
    assert not open_trace(first).page.get_by_role("combobox", name="Show").is_visible()


def test_sides_are_told_apart_without_colour(open_trace):
    page = open_trace(*pair()).page
    see_difference(page)
    lines = page.locator("#legend-sides .k").evaluate_all("all => all.map(e => getComputedStyle(e).borderBottomStyle)")
    assert len(set(lines)) == 3
    assert page.locator("#legend-sides .k").all_inner_texts() == ["only rkv", "only snapkv", "both"]


def test_the_legend_fits_what_is_chosen(open_trace):
    page = open_trace(pair()[0]).page
    assert page.locator("#legend-heads .k").all_inner_texts() == ["≤10%", "≤25%", "≤50%", "≤75%", "more"]
    assert "evicted by all" in page.locator("#legend").inner_text()
    page.get_by_role("combobox", name="Layer").select_option("layer 0")
    page.get_by_role("combobox", name="Head").select_option("head 1")
    assert page.locator("#legend-heads .k").all_inner_texts() == ["holds it"]
    assert "evicted by all" not in page.locator("#legend").inner_text()
    names = classes(page)
    assert {name for token in names for name in token if re.fullmatch(r"h\d", name)} == {"h5"}


@pytest.mark.parametrize("two", [False, True])
def test_the_card_is_small_until_a_token_is_chosen(open_trace, two):
    page = open_trace(*pair()[: 1 + two]).page
    small = page.locator("#card").bounding_box()["height"]
    assert small < 70
    page.locator("[data-i='60']").first.click()
    settle(page)
    assert page.locator("#card").bounding_box()["height"] > 2 * small


def test_the_header_says_how_it_was_made(open_trace):
    page = open_trace(pair()[0]).page
    assert page.locator("#made").inner_text() == "float64 · kvpolicy 0.1 · 2026-11-30"
    assert page.locator(".details").inner_text() == "every 8 tokens · protects sinks 2"


def test_an_example_explains_a_token_of_the_page(open_trace):
    recording = pair()[0]
    page = open_trace(recording).page
    page.locator("#example summary").click()
    settle(page)
    text = page.locator("#example-text").inner_text()
    p, held, shade, kept, line = map(
        int,
        re.search(
            r"at position (\d+), after 120 tokens: (\d) of 6 heads hold it now.* is shade (\d) of the background.*"
            r"kept for (\d+) tokens on average, which is shade (\d) of the line",
            text,
        ).groups(),
    )
    assert held == recording.held(120)[:, p].sum()
    assert kept == round(float(recording.kept_for()[:, p].mean()))
    assert {f"h{shade}", f"t{line}"} <= set(classes(page)[p])


def saved(page, tmp_path):
    with page.expect_download() as download:
        page.get_by_role("button", name="Save SVG").click()
    path = tmp_path / "picture.svg"
    download.value.save_as(path)
    return download.value.suggested_filename, ET.parse(path).getroot(), path.read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_shows_what_is_in_view_on_white_paper(open_trace, tmp_path, scheme):
    first, second = pair()
    opened = open_trace(first, second, color_scheme=scheme)
    page = opened.page
    name, root, text = saved(page, tmp_path)
    assert name == "rkv-snapkv.svg"
    texts = [each.text for each in root.iter() if each.tag.endswith("}text")]
    assert {
        "rkv and snapkv on tiny",
        "rkv, budget 24",
        "snapkv, budget 24",
        " w30",
        "every 8 tokens · protects sinks 2",
    } <= set(texts)
    assert texts.count(" w30") == 2
    rects = [each for each in root.iter() if each.tag.endswith("}rect")]
    assert rects[0].attrib["fill"] == "#ffffff"
    assert {"rgb(0,114,178)", "#f7b26f"} <= {each.attrib["fill"] for each in rects}, "the colours of light paper"
    width = float(root.attrib["width"])
    assert all(0 <= float(each.attrib.get("x", 0)) <= width for each in rects)
    assert "var(" not in text
    see_difference(page)
    _, root, _ = saved(page, tmp_path)
    texts = [each.text for each in root.iter() if each.tag.endswith("}text")]
    assert {"rkv against snapkv", "only rkv", "only snapkv", "both"} <= set(texts)
    assert texts.count(" w30") == 1


def test_what_is_written_is_only_text_in_a_picture(open_trace, tmp_path):
    texts = ["<script>alert(1)</script>", "&amp;", "\"'", "\x01", *words(117)]
    page = open_trace(pair()[0], texts=[texts]).page
    _, root, text = saved(page, tmp_path)
    assert "<script" not in text
    assert "<script>alert(1)</script>" in [each.text for each in root.iter()]
