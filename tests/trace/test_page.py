from __future__ import annotations

import base64
import gzip
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.trace.page import KINDS, Shown, trace_page
from kvpolicy.trace.quantised import quantise
from kvsupport.recordings import random_recording


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    return data, gzip.decompress(base64.b64decode(data["blob"]))


def array(blob, ref):
    kind, place, length = ref
    assert place % 4 == 0
    return np.frombuffer(blob, np.dtype(kind).newbyteorder("<"), length, place)


def dequantised(codes, scales, counts):
    """Return the scores that levels stand for, as the page computes them."""
    low, high, bend = np.repeat(scales.astype(np.float64), counts, axis=0).T
    return (low + (high - low) * (codes / 255) ** (1 / bend)).astype(np.float32)


def shown(recording, **changes):
    texts = [f" t{i}" for i in range(recording.seen + 1)]
    return Shown(
        **{"policy": "p", "about": "budget 8", "texts": texts, "special": [0], "recording": recording, **changes}
    )


def test_the_page_holds_the_recording():
    recording = random_recording(tokens=60, prompt=20, layers=(1, 3), heads=2, budget=12, every=4)
    data, blob = data_of(trace_page([shown(recording)], "m"))
    (one,) = data["traces"]
    assert (one["prompt"], one["seen"], one["layers"], one["heads"]) == (20, 60, [1, 3], [2, 2])
    np.testing.assert_array_equal(array(blob, one["compactions"]), recording.compactions)
    evicted = array(blob, one["evicted"]).reshape(4, 60)
    np.testing.assert_array_equal(np.where(evicted == one["never"], 0, evicted), recording.evicted)
    assert [each["compaction"] for each in one["snapshots"]] == [each.compaction for each in recording.snapshots]
    for snapshot, expected in zip(one["snapshots"], recording.snapshots, strict=True):
        counts = recording.candidates(expected.compaction).sum(1)
        bits = np.unpackbits(array(blob, snapshot["protected"]), bitorder="little")[: len(expected.protected)]
        np.testing.assert_array_equal(bits.astype(bool), expected.protected)
        for kind in KINDS:
            codes, scales = (array(blob, ref) for ref in snapshot["scores"][kind])
            got, want = dequantised(codes, scales.reshape(-1, 3), counts), getattr(expected, kind)
            assert np.abs(got - want).max() <= 0.02 * np.ptp(want)


def test_scores_that_a_policy_does_not_use_are_left_out():
    recording = random_recording(tokens=40, prompt=10, kinds=("retention",))
    data, _ = data_of(trace_page([shown(recording)], "m"))
    assert {kind for each in data["traces"][0]["snapshots"] for kind in each["scores"]} == {"retention"}


def test_nothing_that_is_written_can_end_the_data_or_ask_for_anything():
    recording = random_recording(tokens=20, prompt=5)
    evil = ["</script><script>window.hit = 1</script>", "<!--<script>", "{{script}}", "\ud83d", "  ", "\x00"]
    page = trace_page([shown(recording, texts=[*evil, *["x"] * 15])], "<b>m</b>")
    data, _ = data_of(page)
    assert data["traces"][0]["texts"][:6] == evil
    assert page.count("</script>") == 2
    assert "<title>p on &lt;b&gt;m&lt;/b&gt;: kvpolicy trace</title>" in page
    assert "default-src 'none'" in page
    assert "innerHTML" not in page
    assert not re.search(r"https?://|\b(src|href)=", page.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    page.encode("utf-8")


def test_a_page_stays_small():
    # 4,000 tokens on a model of 30 layers and 3 KV heads, about 25 compactions of 1,152 entries: scores of chance,
    # which are the hardest to compress.
    recording = random_recording(tokens=4000, prompt=100, layers=range(30), heads=3, budget=1024, every=128)
    one = shown(recording)
    page = trace_page([one], "m")
    assert len(page) < 15e6
    two = trace_page([one, one], "m", same_text=True)
    assert len(two) < 15e6
    data, _ = data_of(two)
    assert len(data["traces"][0]["snapshots"]) < len(recording.snapshots)
    assert data["same"]


def test_equal_recordings_make_equal_files():
    recording = random_recording(tokens=30, prompt=5)
    assert trace_page([shown(recording)], "m") == trace_page([shown(recording)], "m")


def test_more_compactions_than_two_bytes_count():
    recording = random_recording(tokens=30, prompt=5, budget=8, every=1)
    late = np.where(recording.evicted > 0, recording.evicted + 70_000, 0)
    many = np.concatenate([np.zeros(70_000, np.int32), recording.compactions])
    data, blob = data_of(
        trace_page(
            [shown(type(recording)(**{**vars(recording), "evicted": late, "compactions": many, "snapshots": ()}))], "m"
        )
    )
    one = data["traces"][0]
    assert one["evicted"][0] == "uint32"
    assert array(blob, one["evicted"]).min() > 70_000


numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@given(st.lists(st.lists(numbers, max_size=40), min_size=1, max_size=4))
def test_quantised_scores_keep_their_order_and_their_ends(heads):
    counts = np.array([len(head) for head in heads])
    scores = np.array([x for head in heads for x in head], dtype=np.float32)
    codes, scales = quantise(scores, counts)
    back, start = dequantised(codes, scales, counts), 0
    for count in counts:
        mine, got = scores[start : start + count], back[start : start + count]
        order = np.argsort(mine, kind="stable")
        assert (np.diff(codes[start : start + count][order].astype(int)) >= 0).all()
        if count:
            tolerance = 1e-6 * max(1.0, float(np.abs(mine).max()))
            assert abs(got.min() - mine.min()) <= tolerance
            assert abs(got.max() - mine.max()) <= tolerance
        start += count


def test_small_scores_keep_their_digits_beside_a_large_one():
    scores = np.append(np.geomspace(1e-5, 1e-3, 200), 0.5).astype(np.float32)
    codes, scales = quantise(scores, np.array([201]))
    back = dequantised(codes, scales, np.array([201]))
    assert len(np.unique(codes)) > 60  # evenly spaced levels would be two
    assert np.median(np.abs(back - scores) / scores) < 0.1


@pytest.mark.parametrize("scores", [[np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0], [-np.inf] * 3, [3.0] * 3, []])
def test_any_scores_can_be_written(scores):
    codes, scales = quantise(np.array(scores, dtype=np.float32), np.array([len(scores)]))
    assert np.isfinite(scales).all()
    assert np.isfinite(dequantised(codes, scales, np.array([len(scores)]))).all()
