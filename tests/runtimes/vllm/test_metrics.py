"""Numbers go from workers to the server through files that only they know."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from kvpolicy.runtimes.vllm import metrics
from kvpolicy.runtimes.vllm.session import Counts


@pytest.fixture
def families(monkeypatch, tmp_path):
    """What prometheus_client has, where it is not installed."""
    core = ModuleType("prometheus_client.core")
    core.CounterMetricFamily = core.GaugeMetricFamily = lambda name, said, value: (name, value)
    monkeypatch.setitem(sys.modules, "prometheus_client", ModuleType("prometheus_client"))
    monkeypatch.setitem(sys.modules, "prometheus_client.core", core)
    monkeypatch.setenv(metrics.VARIABLE, str(tmp_path / "numbers"))
    return tmp_path / "numbers"


def told(evicted, compactions, seconds, held):
    store = SimpleNamespace(tables=SimpleNamespace(held=held))
    return SimpleNamespace(counts=Counts(evicted, compactions, seconds), cache=SimpleNamespace(store=store))


def test_workers_are_summed_and_nothing_is_made_before_there_is_one(families):
    assert list(metrics.Collector().collect()) == []
    assert not families.exists()
    first, second = metrics.MetricsWriter("worker-0"), metrics.MetricsWriter("worker-1")
    assert list(metrics.Collector().collect()) == []
    first.write(told(1, 1, 0.1, 9))
    first.write(told(640, 10, 0.5, 7))
    second.write(told(64, 1, 0.25, 3))
    assert dict(metrics.Collector().collect()) == {
        "kvpolicy_evicted_entries": 704, "kvpolicy_compactions": 11, "kvpolicy_compaction_seconds": 0.75,
        "kvpolicy_resident_blocks": 10,
    }  # fmt: skip
    assert families.stat().st_mode & 0o077 == 0


def test_only_the_process_that_made_the_folder_removes_it(tmp_path: Path):
    folder = tmp_path / "numbers"
    folder.mkdir()
    metrics._end(folder, -1)
    assert folder.exists()
    metrics._end(folder, os.getpid())
    assert not folder.exists()
