from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


def test_shares_are_measured_and_gpus_are_estimates(measured):
    report = measured("roofline", "--keys", 200, "--probe", 1, 32)
    shares = report["visited_shares"]["200"]
    assert 0 < shares["torch"]["median"] <= 1
    assert 0 < shares["tiles"]["median"] <= 1
    kinds = {device["name"]: device["estimated"] for device in report["devices"]}
    assert [name for name, estimated in kinds.items() if not estimated] == ["this CPU, 1 thread"]
    assert len(kinds) == 4
    for row in report["results"]:
        parts = ("importance", "redundancy: closed form", "redundancy: search", "selection", "compaction")
        assert row["compression_seconds"] == pytest.approx(sum(row["seconds"][part] for part in parts))


def test_work_is_bound_by_memory_or_by_arithmetic(script):
    roofline = script("roofline")
    device = roofline.Device("some", bandwidth=100.0, arithmetic=10.0, element=2, estimated=True)
    assert roofline.Work("copy", bytes=200.0, flops=1.0).seconds(device) == 2.0
    assert roofline.Work("product", bytes=200.0, flops=50.0).seconds(device) == 5.0


def test_counts_follow_the_shapes(script):
    roofline = script("roofline")
    works = {w.operation: w for w in roofline.operations(roofline.Shape(2, 3, 4, 5, 8), 100, 60, 0.25, element=2)}
    rows = 2 * 3 * 4
    assert works["redundancy: search"].flops == rows * 2 * 0.25 * 100 * 100 * 8
    assert works["decode attention, one step"].bytes == rows * 2 * 80 * 8 * 2
    assert works["decode attention, one step"].flops == rows * 4 * 80 * 8 * 5


def view(keys):
    return SimpleNamespace(keys=keys, valid=torch.ones(keys.shape[:3], dtype=torch.bool))


def test_the_search_visits_little_of_alike_keys_and_all_of_unlike_ones(script):
    roofline = script("roofline")
    alike = torch.ones(1, 1, 256, 4) + 0.01 * torch.randn(1, 1, 256, 4)
    # The newest tile holds a similar key for every row: one of four column tiles.
    assert roofline.visited_by_tiles(view(alike)) == 0.25
    assert roofline.visited_by_torch(view(alike)) < 0.15
    unlike = torch.eye(256)[None, None]
    assert roofline.visited_by_tiles(view(unlike)) == 1.0
    assert roofline.visited_by_torch(view(unlike)) == pytest.approx(1.0)
