"""The trace page in a browser: what it shows is what was recorded."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import kvpolicy
from kvpolicy.testing.tiny import tiny_model
from kvpolicy.trace.page import Shown, trace_page
from kvpolicy.trace.running import record_generation
from kvsupport.recordings import random_recording

pytestmark = pytest.mark.browser

SCRIPT = "<script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\">"


@pytest.fixture
def open_trace(page_at, tmp_path):
    """Write a page of recordings, open it, and wait until it is drawn."""

    def show(*recordings, same_text=False, texts=None, names=("rkv", "snapkv"), width=1280, **context):
        shown = [
            Shown(name, "budget 16", texts or words(each.seen + 1), [0], each, "every 4 tokens · protects recent 2")
            for name, each in zip(names, recordings, strict=False)
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


def set_slider(page, step):
    page.locator("#slider").evaluate(
        "(slider, step) => { slider.value = step; slider.dispatchEvent(new Event('input')); }", step
    )
    settle(page)


def settle(page):
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def classes(page, panel=0):
    return page.evaluate(
        "(n) => Array.from(kvpolicyTrace.traces[n].panel.querySelectorAll('[data-i]'), (span) => [...span.classList])",
        panel,
    )


def level(share):
    return "gone" if share == 0 else f"h{1 + np.searchsorted([0.1, 0.25, 0.5, 0.75], share)}"


def check_colours(page, recording, tokens, rows=None, panel=0):
    """Every token has the background of the share of heads that hold it."""
    held = recording.held(tokens)[rows if rows is not None else slice(None)]
    got = classes(page, panel)
    assert len(got) == recording.seen + 1
    for p, names in enumerate(got):
        assert (level(held[:, p].mean()) if p < tokens and p < recording.seen else "future") in names, p


def test_the_slider_shows_what_is_held(open_trace):
    recording = random_recording(tokens=125, prompt=20)
    page = open_trace(recording).page
    steps = [*recording.compactions.tolist(), 125]
    assert page.locator("#slider").get_attribute("max") == str(len(steps) - 1)
    check_colours(page, recording, 125)
    for step in (0, 5, len(steps) - 2):
        set_slider(page, step)
        check_colours(page, recording, steps[step])
        assert page.locator("#slider").get_attribute("aria-valuetext") == f"after {steps[step]} tokens seen"
        assert f"compaction {step + 1} of {len(steps) - 1}" in page.locator(".facts").inner_text()
    page.locator("#slider").focus()
    page.keyboard.press("ArrowLeft")
    settle(page)
    check_colours(page, recording, steps[-3])
    page.get_by_role("button", name="Next compaction").click()
    settle(page)
    check_colours(page, recording, steps[-2])


def test_layers_and_heads_can_be_chosen(open_trace):
    recording = random_recording(tokens=90, prompt=20, layers=(1, 4), heads=3)
    page = open_trace(recording).page
    page.get_by_role("combobox", name="Layer").select_option("layer 4")
    check_colours(page, recording, 90, rows=[3, 4, 5])
    page.get_by_role("combobox", name="Head").select_option("head 1")
    check_colours(page, recording, 90, rows=[4])
    page.get_by_role("combobox", name="Layer").select_option("all layers")
    check_colours(page, recording, 90, rows=[1, 4])


def test_lines_show_how_long_tokens_were_kept(open_trace):
    recording = random_recording(tokens=150, prompt=20)
    page = open_trace(recording).page
    lines = [next(int(name[1]) for name in names if re.fullmatch(r"t\d", name)) for names in classes(page)]
    means, ended = recording.kept_for().mean(0), (recording.evicted == 0).all(0)
    assert [line == 6 for line in lines[:150]] == ended.tolist()
    order = np.argsort(means[~ended], kind="stable")
    assert (np.diff(np.array(lines[:150])[~ended][order]) >= 0).all()
    assert set(lines[:150]) == {1, 2, 3, 4, 5, 6}


def number(page, kind, nth=0):
    row = page.locator(f"#card tr[data-kind={kind}]").nth(nth)
    return float(row.get_attribute("data-value")), row.inner_text()


def test_the_card_shows_the_numbers_of_the_recording(open_trace):
    model, policy = tiny_model("llama"), kvpolicy.load("rkv", budget=24).replace({"trigger.interval": 8}).build()
    prompt = torch.randint(3, 240, (1, 40), generator=torch.Generator().manual_seed(1))
    _, recording = record_generation(model, {"input_ids": prompt}, policy, max_new_tokens=60)
    page = open_trace(recording).page
    step = len(recording.compactions) - 2
    set_slider(page, step)
    page.get_by_role("combobox", name="Layer").select_option("layer 2")
    page.get_by_role("combobox", name="Head").select_option("head 0")
    snapshot = recording.snapshots[step]
    row = 4  # layer 2, head 0
    there = np.flatnonzero(recording.candidates(snapshot.compaction)[row])
    for p in there[:: len(there) // 6]:
        page.locator(f"[data-i='{p}']").hover()
        settle(page)
        assert f"position {p}" in page.locator("#card").inner_text()
        for kind in ("importance", "redundancy", "retention"):
            scores = recording.scores(snapshot, kind)[row]
            value, text = number(page, kind)
            assert value == pytest.approx(float(scores[p]), abs=0.02 * float(np.nanmax(scores) - np.nanmin(scores)))
            rank = (scores[there] < scores[p]).mean()
            assert float(re.search(r"(\d+)%", text)[1]) == pytest.approx(100 * rank, abs=4)
        stays = recording.held(int(recording.compactions[step]))[row, p]
        assert ("Held." if stays else "Evicted.") in page.locator("#card").inner_text()
        gone = recording.evicted[row, p]
        said = (
            f"Evicted at compaction {gone} ({recording.compactions[gone - 1]} tokens)" if gone else "Kept to the end."
        )
        assert said in page.locator("#card").inner_text()


def test_a_token_can_be_pinned_and_walked_from(open_trace):
    page = open_trace(random_recording(tokens=60, prompt=10)).page
    page.locator("[data-i='30']").click()
    page.locator("[data-i='33']").hover()
    settle(page)
    assert "position 30" in page.locator("#card").inner_text()
    page.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    settle(page)
    assert "position 31" in page.locator("#card").inner_text()
    page.keyboard.press("Escape")
    page.locator("[data-i='35']").hover()
    settle(page)
    assert "position 35" in page.locator("#card").inner_text()
    page.locator("[data-i='60']").hover()
    settle(page)
    assert "has not gone into the cache" in page.locator("#card").inner_text()


def test_two_policies_of_one_text_share_everything(open_trace):
    first, second = random_recording(tokens=100, prompt=20), random_recording(tokens=100, prompt=20, every=5, seed=1)
    opened = open_trace(first, second, same_text=True)
    page = opened.page
    steps = sorted({*first.compactions.tolist(), *second.compactions.tolist(), 100})
    set_slider(page, 4)
    check_colours(page, first, steps[4])
    check_colours(page, second, steps[4], panel=1)
    page.locator(".panel").nth(1).locator("[data-i='40']").click()
    settle(page)
    assert page.locator(".picked").count() == 2
    assert [each.inner_text() for each in page.locator("#card h3").all() if "kv" in each.inner_text()] == [
        "rkv",
        "snapkv",
    ]
    boxes = [each.bounding_box() for each in page.locator(".panel").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    opened.assert_fits()


def test_two_texts_are_pointed_at_one_by_one(open_trace):
    page = open_trace(random_recording(tokens=100, prompt=20), random_recording(tokens=70, prompt=20, seed=1)).page
    page.locator(".panel").nth(0).locator("[data-i='90']").click()
    page.locator(".panel").nth(1).locator("[data-i='60']").click()
    settle(page)
    assert page.locator(".picked").count() == 1
    assert page.locator("#card h3").first.inner_text() == "snapkv"


@pytest.mark.parametrize("two", [False, True])
def test_a_phone_does_not_scroll_sideways(open_trace, two):
    recordings = [random_recording(tokens=200, prompt=30, layers=range(30), heads=3, seed=i) for i in range(1 + two)]
    opened = open_trace(*recordings, width=390, texts=[*words(190), "long" * 60, "\n", *words(9)], has_touch=True)
    opened.page.locator("[data-i='40']").first.tap()
    settle(opened.page)
    assert "position 40" in opened.page.locator("#card").inner_text()
    opened.assert_fits()
    if two:
        boxes = [each.bounding_box() for each in opened.page.locator(".panel").all()]
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]


def test_text_stays_text(open_trace):
    texts = [SCRIPT, "</script>", "&lt;b&gt;", "<!--", *words(16), "\n\n", "\t"]
    opened = open_trace(random_recording(tokens=21, prompt=6, budget=8, every=4), texts=texts)
    page = opened.page
    assert page.title() == "rkv on tiny: kvpolicy trace"
    assert page.locator("[data-i='0']").inner_text() == SCRIPT
    assert page.locator("script").count() == 2
    assert page.locator("img, main script, [onerror]").count() == 0
    page.locator("[data-i='0']").click()
    settle(page)
    assert "onerror" in page.locator("#card code").inner_text()
    assert page.locator("img, main script").count() == 0


def test_four_thousand_tokens(open_trace):
    recording = random_recording(tokens=4000, prompt=200, layers=range(12), heads=3, budget=512, every=128)
    opened = open_trace(recording)
    page = opened.page
    assert page.locator("[data-i]").count() == 4001
    assert page.locator("*").count() < 4001 + 300
    step = len(recording.compactions) // 2
    set_slider(page, step)
    check_colours(page, recording, int(recording.compactions[step]))
    # Nodes stay, and only those that change are painted.
    before = page.evaluate("window.span = document.querySelector('[data-i=\"5\"]'), window.painted = 0")
    assert before == 0
    page.evaluate(
        """() => {
            const trace = kvpolicyTrace.traces[0], paint = trace.paint;
            trace.paint = (p) => { painted++; paint.call(trace, p); };
        }"""
    )
    set_slider(page, step + 1)
    assert page.evaluate("span === document.querySelector('[data-i=\"5\"]')")
    # At a compaction an entry changes its shade or does not; most have gone long before.
    assert 0 < page.evaluate("painted") < 2500
    check_colours(page, recording, int(recording.compactions[step + 1]))


def test_it_plays_to_the_end(open_trace):
    recording = random_recording(tokens=40, prompt=10, budget=12, every=6)
    page = open_trace(recording).page
    assert len(recording.compactions) > 2
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").wait_for()
    page.get_by_role("button", name="Play").wait_for(timeout=20_000)
    check_colours(page, recording, 40)
    assert "the end" in page.locator("#moment").inner_text()


def test_a_text_without_compactions(open_trace):
    recording = random_recording(tokens=10, prompt=4)
    assert not len(recording.compactions)
    page = open_trace(recording).page
    check_colours(page, recording, 10)
    assert page.locator("#slider").is_disabled()
    page.locator("[data-i='3']").hover()
    settle(page)
    assert "No scores yet" in page.locator("#card").inner_text()


def test_dark_and_print(open_trace):
    recording = random_recording(tokens=60, prompt=10)
    colours = {}
    for scheme in ("light", "dark"):
        page = open_trace(recording, color_scheme=scheme).page
        colours[scheme] = page.evaluate(
            "[getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.body).color]"
        )
    assert colours["light"][0] != colours["dark"][0]
    assert colours["light"][1] != colours["dark"][1]
    page.emulate_media(media="print")
    assert not page.locator("#slider").is_visible()
    assert page.locator(".text").evaluate("(text) => text.scrollHeight <= text.clientHeight + 1")
    check_colours(page, recording, 60)
