from __future__ import annotations

import pytest

ENTRY = 2 * 2 * 8 * 4 * 2  # key and value, heads, dim, bytes, layers
CAP = 100_000


def test_batches_are_the_largest_that_fit(measured):
    report = measured("memory_cap", "--tokens", 160, "--share", 0.25, "--interval", 8, "--cap", CAP / (1 << 30))
    found = report["results"]
    full, ours = found["full cache"], found["rkv"]
    assert full["batch"] * 192 * ENTRY <= CAP < (full["batch"] + 1) * 192 * ENTRY
    mine = 48 * (ENTRY + 2 * 2 * 4)
    assert ours["batch"] * mine <= CAP < (ours["batch"] + 1) * mine
    assert ours["peak_bytes"] == ours["batch"] * mine
    assert found["starts"][0] == 32
    assert found["starts"][-1] == 192 - 8
    for each in (full, ours):
        assert each["wall_tokens_per_second"] == pytest.approx(each["batch"] * 160 / each["wall_seconds"])


def test_time_is_integrated_over_the_run(script):
    script("memory_cap")
    from kvbench.lanes import integrated

    # Seconds per token grow as the position: constant 2 before 2, the line, constant 6 behind 6.
    assert integrated([(2.0, 2.0), (6.0, 6.0)], 0, 10) == pytest.approx(2 * 2 + 16 + 4 * 6)


def test_blocks_begin_at_the_start_where_it_is_full_and_at_the_end(script):
    lengths = script("memory_cap").sampled_lengths(tokens=1000, block=100, steady=300, count=3)
    assert lengths == [32, 300, 616, 932]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cap", "1e-5", "--tokens", "160"], "full cache: one row does not fit"),
        (["--policy", "snapkv-prefill", "--tokens", "640"], "has no bound"),
    ],
)
def test_what_cannot_be_compared_is_refused(script, options, message):
    with pytest.raises(SystemExit, match=message):
        script("memory_cap").main(options)
