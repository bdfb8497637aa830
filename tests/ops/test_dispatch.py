"""Which backend runs an operation, what refuses, and what `auto` says."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kvpolicy
from kvpolicy import ops
from kvpolicy.errors import PluginError, UnsupportedError
from kvpolicy.loading import installed
from kvpolicy.loading.entries import Catalog
from kvpolicy.ops import dispatch
from kvpolicy_kernels import backend as kernels
from kvpolicy_kernels import launching

KEYS = torch.randn(1, 1, 6, 16, dtype=torch.float16)
MASK = torch.ones(1, 1, 6, dtype=torch.bool)


class Mine(ops.Backend):
    """Serves `redundancy` with a constant, and only up to `most` keys."""

    def __init__(self, most=10):
        self.most = most
        self.calls = 0

    def load(self, op):
        return self.redundancy if op == "redundancy" else None

    def refuses_cache(self, keys):
        return "its head dim is odd; use torch" if keys.shape[-1] % 2 else None

    def refuses(self, op, /, keys, valid, **options):
        return f"{keys.shape[2]} keys are too many; use torch" if keys.shape[2] > self.most else None

    def redundancy(self, keys, valid, **options):
        self.calls += 1
        return torch.full(keys.shape[:3], 0.25)


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    catalog = Catalog()
    catalog.register_backend("mine", Mine())
    with installed.using(catalog):
        yield catalog.backends()["mine"]


def test_a_registered_backend_runs_what_it_brings_and_torch_the_rest(mine):
    with ops.using_backend("mine"):
        assert (ops.redundancy(KEYS, MASK) == 0.25).all()
        assert (ops.redundancy(keys=KEYS, valid=MASK) == 0.25).all()
        assert torch.equal(ops.mean_similarity(KEYS, MASK), ops.mean_similarity.__wrapped__(KEYS, MASK))
    assert mine.calls == 2
    assert torch.equal(ops.redundancy(KEYS, MASK), ops.redundancy.__wrapped__(KEYS, MASK))
    assert mine.calls == 2, "outside the block, and `auto` on the CPU is torch"


def test_scopes_nest_and_the_environment_decides_only_for_auto(mine, monkeypatch):
    monkeypatch.setenv("KVPOLICY_BACKEND", "mine")
    assert (ops.redundancy(KEYS, MASK) == 0.25).all()
    with ops.using_backend("auto"):
        assert (ops.redundancy(KEYS, MASK) == 0.25).all()
        with ops.using_backend("torch"):
            assert dispatch.requested() == "torch"
            assert not (ops.redundancy(KEYS, MASK) == 0.25).all()
        assert dispatch.requested() == "mine"
    assert dispatch.requested("torch") == "torch"
    monkeypatch.setenv("KVPOLICY_BACKEND", "")
    assert dispatch.requested() == "auto"


def test_a_named_backend_refuses_openly(mine):
    with ops.using_backend("mine"), pytest.raises(UnsupportedError) as caught:
        ops.redundancy(KEYS.repeat(1, 1, 2, 1), MASK.repeat(1, 1, 2))
    assert str(caught.value) == ("backend: mine cannot run redundancy, because 12 keys are too many; use torch.")
    with pytest.raises(UnsupportedError, match=r"backend: mine cannot be used, because its head dim is odd"):
        ops.choose_backend("mine", KEYS[..., :15])
    assert ops.choose_backend("mine", KEYS) == "mine"
    with pytest.raises(UnsupportedError, match=r"'mien' is not a registered backend.*auto, torch, mine.*'mine'"):
        ops.choose_backend("mien", KEYS)


def test_auto_takes_what_serves_on_an_accelerator_and_says_so_once(mine, caplog):
    """The meta device stands for an accelerator."""
    dispatch._say.cache_clear()
    keys, mask = KEYS.to("meta"), MASK.to("meta")
    with caplog.at_level(logging.INFO, logger="kvpolicy"):
        for _ in range(2):
            assert ops.choose_backend("auto", KEYS) == "torch"
            assert ops.choose_backend("auto", keys) == "mine"
            assert ops.choose_backend("auto", keys[..., :15]) == "torch"
            with ops.using_backend("auto"):
                assert ops.redundancy(keys, mask).device.type == "cpu", "what Mine returns"
                ops.top_k(mask.float(), mask.sum(-1), mask, mask, width=2)
                mine.most = 3
                assert dispatch._implementation("auto", "redundancy", (keys, mask), {}) is None
                mine.most = 10
    assert [record.getMessage() for record in caplog.records] == [
        "backend: auto takes torch, because the cache is on the CPU.",
        "backend: auto takes mine, because the cache is torch.float16 on meta.",
        "backend: auto takes torch, because mine cannot be used, because its head dim is odd; use torch.",
        "backend: auto takes torch for redundancy, because mine cannot run it: 6 keys are too many; use torch.",
    ]


def test_names_and_objects_are_checked(mine):
    catalog = installed.catalog()
    for name in ("auto", "torch", "Mine", "", 3):
        with pytest.raises(PluginError, match=r"is not a backend's name"):
            catalog.register_backend(name, Mine())
    with pytest.raises(PluginError, match=r"is not an instance of kvpolicy\.ops\.Backend"):
        catalog.register_backend("other", Mine)
    with pytest.raises(PluginError, match=r"backend 'mine' is registered twice"):
        catalog.register_backend("mine", Mine())
    catalog.unregister("backend", "mine")
    assert catalog.backends() == {}


def test_the_kernels_enter_through_the_hook():
    assert isinstance(installed.load_catalog().backends()["triton"], kernels.TritonBackend)


def test_an_operation_of_a_plugin_is_dispatched_and_none_takes_the_name_of_another(mine, monkeypatch):
    @ops.dispatched
    def my_plugin_total(keys):
        return keys.sum()

    assert my_plugin_total(KEYS) == KEYS.sum()
    ops.dispatched(my_plugin_total.__wrapped__)  # its module is read again
    monkeypatch.setattr(mine, "load", {"my_plugin_total": lambda keys: "mine"}.get)
    monkeypatch.setattr(mine, "refuses", lambda op, *_: None)
    with ops.using_backend("mine"):
        assert my_plugin_total(KEYS) == "mine"

    def top_k(scores):
        return scores

    with pytest.raises(ValueError, match=r"top_k of .* has the name of one of kvpolicy\.ops\.selection; begin it"):
        ops.dispatched(top_k)


def test_scratch_lasts_for_one_shared_block():
    assert dispatch.scratch() is None
    with ops.using_backend("torch", shared=True):
        held = dispatch.scratch()
        assert held == {}
        with ops.using_backend("torch"):
            assert dispatch.scratch() is None
        assert dispatch.scratch() is held
    assert dispatch.scratch() is None


def keys_like(device, dtype=torch.float16, dim=64):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(2, 2, 9, dim))


def test_what_triton_refuses(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = kernels.TritonBackend()
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    assert backend.refuses_cache(keys_like("cuda")).startswith("triton is not installed; install kvpolicy[triton]")
    monkeypatch.setattr(launching, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backend.refuses_cache(keys_like("cuda")) is None
    assert backend.refuses_cache(keys_like("cuda", torch.bfloat16, 128)) is None
    assert "torch.float32 and the kernels are for float16 and bfloat16" in backend.refuses_cache(
        keys_like("cuda", torch.float32)
    )
    assert "head dim is 80" in backend.refuses_cache(keys_like("cuda", dim=80))
    assert "on mps" in backend.refuses_cache(keys_like("mps"))
    assert "set TRITON_INTERPRET=1 before Python starts" in backend.refuses_cache(keys_like("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in backend.refuses_cache(keys_like("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.refuses_cache(keys_like("cpu", torch.float32)) is None


def test_a_policy_asks_for_its_backend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    policy = kvpolicy.load("rkv", backend="triton")
    assert policy.build().backend == "triton"
    with pytest.raises(UnsupportedError, match=r"backend: triton cannot be used, because"):
        ops.choose_backend("triton", KEYS)


def test_kernels_need_triton_only_when_they_run(tmp_path):
    """With an import of triton that fails, everything but a launch works."""
    program = """
import sys
sys.modules["triton"] = None
import kvpolicy, kvpolicy_kernels, torch
from kvpolicy import ops
from kvpolicy_kernels import backend, compaction, ragged, selection, similarity, window
assert "triton" in kvpolicy.catalog().backends()
keys, mask = torch.randn(1, 1, 6, 16), torch.ones(1, 1, 6, dtype=torch.bool)
assert ops.redundancy(keys, mask).sum().round() == 1
try:
    ops.choose_backend("triton", keys)
except kvpolicy.UnsupportedError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("backend: triton cannot be used, because triton is not installed")
