from __future__ import annotations


def test_every_cache_is_measured_in_one_process(script):
    overhead = script("overhead")
    figures = overhead.measure(batch=1, tokens=70, rounds=1)
    assert set(figures) == {"DynamicCache", "rkv", "knorm", "compaction, ms"}
    assert all(value > 0 for name, value in figures.items() if name != "compaction, ms")
