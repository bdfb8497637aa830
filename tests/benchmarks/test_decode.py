from __future__ import annotations

import pytest
import torch

SIZES = ("--batch", 2, "--tokens", 64, "--budget", 48, "--interval", 8)


@pytest.mark.parametrize("every", [0, 16])
def test_lanes_hold_what_they_should_and_time_every_token(measured, every):
    (result,) = measured("decode", *SIZES, "--every", every)["results"]
    entry = 2 * 2 * 8 * 4 * 2  # key and value, heads, dim, bytes, layers
    peak = result["peak_bytes"]
    assert peak["DynamicCache"] == 2 * (32 + 64) * entry
    assert peak["preallocated"] == 2 * (48 + 4) * entry
    assert peak["rkv"] == 2 * 56 * (entry + 2 * 2 * 4)  # the bound, and a position per KV head
    assert result["peak_resident"] == 56
    starts = range(32, 96, 8) if every == 0 else [32, 40, 56, 72, 88]
    assert result["blocks"] == [[start, start + 8] for start in starts]
    for name in ("DynamicCache", "rkv", "preallocated"):
        assert all(spread["count"] == 8 for spread in result["median_seconds_per_token"][name])
    assert result["flat"]["wall"]["at"][0] >= 56
    assert result["share_of_preallocated"]["wall"]["count"] == sum(start >= 56 for start, _ in result["blocks"])


def test_the_full_cache_may_be_timed_on_fewer_tokens(measured):
    (result,) = measured("decode", *SIZES, "--every", 16, "--full-tokens", 3)["results"]
    assert {s["count"] for s in result["median_seconds_per_token"]["DynamicCache"]} == {3}
    assert {s["count"] for s in result["median_seconds_per_token"]["rkv"]} == {8}


def test_below_the_budget_nothing_is_evicted_and_nothing_bounds_the_speed(measured):
    (result,) = measured("decode", "--tokens", 16, "--share", 2, "--interval", 8)["results"]
    assert result["peak_resident"] == 48
    assert set(result["tokens_per_second"]) == {"DynamicCache", "rkv"}
    assert "share_of_preallocated" not in result


def test_what_needs_too_much_memory_is_skipped_with_a_sentence(measured, capsys):
    report = measured("decode", "--tokens", 16, "--budget", 16, "--memory", 1e-6)
    assert report["results"] == []
    assert report["skipped"] == [line for line in capsys.readouterr().out.splitlines() if line]
    assert "--memory" in report["skipped"][0]


def test_the_speed_of_a_run_does_not_favour_late_tokens(script):
    decode = script("decode")
    from kvbench.lanes import Lane, Token
    from kvbench.measuring import Sample

    lane, blocks = Lane("full", None, None), decode.sampled_blocks(8224, 128, 2048, 950)
    assert blocks == [(32, 160), (950, 1078), (1952, 2080), (4000, 4128), (6048, 6176), (8096, 8224)]
    assert decode.sampled_blocks(48, 8, 16, 56) == [(32, 40), (40, 48)]
    lane.tokens = [Token(at, Sample(2.0 * at, at)) for start, _ in blocks for at in range(start, start + 16)]
    true = sum(range(32, 8224))
    assert decode.whole_run(lane, blocks, "cpu", 8224) == pytest.approx(true, rel=2e-3)
    assert decode.whole_run(lane, blocks, "wall", 8224) == pytest.approx(2 * true, rel=2e-3)


def test_flatness_compares_medians_with_the_spread(script):
    decode = script("decode")
    from kvbench.lanes import Lane, Token
    from kvbench.measuring import Sample

    def lane(first, last):
        found = Lane("rkv", None, None)
        found.tokens = [
            Token(start + i, Sample(level + i, level + i))
            for start, level in ((1024, first), (2048, last))
            for i in range(5)
        ]
        return found

    blocks = [(1024, 1029), (2048, 2053)]
    assert decode.flatness(lane(10.0, 11.0), blocks, "wall")["flat"] is True
    assert decode.flatness(lane(10.0, 100.0), blocks[:1], "wall")["flat"] is None
    slower = decode.flatness(lane(10.0, 11.0), blocks, "cpu")
    assert slower["medians"] == [12.0, 13.0]
    assert slower["spread"] == 2.0
    # A step between two blocks widens the spread of all tokens too, and must not pass for flat by that.
    assert decode.flatness(lane(10.0, 13.0), blocks, "wall")["flat"] is False
    # A machine that becomes slower slows both lanes; beside the other one that is left out.
    beside = decode.flatness(lane(10.0, 11.0), blocks, "cpu", lane(10.0, 10.0))
    assert beside["medians"] == pytest.approx([1.0, 13 / 12])
    assert beside["spread"] == pytest.approx(2 / 12)
    assert decode.flatness(lane(10.0, 13.0), blocks, "wall", lane(10.0, 10.0))["flat"] is False
    assert decode.flatness(lane(10.0, 13.0), blocks, "wall", lane(10.0, 13.0))["flat"] is True


def test_copies_of_a_row_decode_like_the_row(script, tiny_folder):
    script("decode")
    from transformers import DynamicCache

    from kvbench import lanes, real
    from kvpolicy.runtimes.hf import PolicyCache

    model, text = real.load_model(), real.real_tokens(80)
    with torch.no_grad(), PolicyCache(lanes.policy_with("rkv", 40, 8), model) as cache:
        ours = lanes.Lane("rkv", model, cache, copies=3)
        full = lanes.Lane("full", model, DynamicCache(config=model.config), copies=3)
        for lane in (ours, full):
            lane.prefill(text[:, :32])
            lane.feed(text[:, 32:56])
        lanes.decode_block([ours, full], text, 56, 72, {"full": 2})
        assert cache.engine.rows[0].seen == full.cache.get_seq_length() == 72
        assert len(cache.engine.rows) == 1
        assert [len(lane.tokens) for lane in (ours, full)] == [16, 2]
