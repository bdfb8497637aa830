"""What happens to a model while a cache is attached to it: copies, files, shared configurations, finalizers."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from kvpolicy.runtimes.hf import PolicyCache, attach
from kvpolicy.testing.tiny import tiny_model


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return tiny_model("llama", attention=request.param)


def _names(model):
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


def _reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _reloaded], ids=["deepcopy", "pickle", "torch.save"]
)
def test_a_copy_of_an_attached_model_was_never_attached(model, compose, way):
    before = _names(model)
    with PolicyCache(compose(), model):
        copied = way(model)
        assert _names(copied) == before
        assert type(copied.config._attn_implementation) is str
        with PolicyCache(compose(), copied) as cache:
            copied.generate(torch.arange(3, 23)[None], past_key_values=cache, max_new_tokens=3)
        assert _names(copied) == before
    assert _names(model) == before


def test_a_configuration_without_an_implementation_is_copied_without_one(model, compose):
    model.config._attn_implementation_internal = None
    for module in model.modules():
        assert not hasattr(module, "config") or module.config is model.config
    with PolicyCache(compose(), model):
        assert copy.deepcopy(model.config)._attn_implementation is None
        assert pickle.loads(pickle.dumps(model.config))._attn_implementation is None
    assert model.config._attn_implementation is None


def test_a_model_saved_while_attached_loads_without_kvpolicy(model, compose, tmp_path):
    with PolicyCache(compose(), model):
        torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); "
        "m.generate(torch.arange(3, 23)[None], max_new_tokens=2); "
        "assert not any(n.startswith('kvpolicy') for n in sys.modules); print(m.config._attn_implementation)"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == model.config._attn_implementation


def test_a_saved_configuration_does_not_name_kvpolicy(model, compose, tmp_path):
    with PolicyCache(compose(), model):
        model.save_pretrained(tmp_path)
        assert "kvpolicy" not in json.dumps(model.config.to_dict())
        assert "kvpolicy" not in model.config.to_json_string()
    assert not [path for path in tmp_path.glob("*.json") if "kvpolicy" in path.read_text()]


def test_models_that_share_a_configuration_can_both_be_attached(model, compose):
    before, ids = _names(model), torch.arange(3, 43)[None]
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    with PolicyCache(compose(), model) as one:
        expected = model.generate(ids, past_key_values=one, max_new_tokens=9, do_sample=False)
    one, two = PolicyCache(compose(), model), PolicyCache(compose(), twin)
    one.close()
    assert torch.equal(expected, twin.generate(ids, past_key_values=two, max_new_tokens=9, do_sample=False))
    two.close()
    assert _names(model) == _names(twin) == before


def test_a_shallow_copy_of_a_configuration_can_be_attached_by_itself(model, compose):
    before = _names(model)
    with PolicyCache(compose(), model):
        other = type(model)(copy.copy(model.config))
        with PolicyCache(compose(), other):
            pass
        assert other.config._attn_implementation == before[0]
        assert model.config._attn_implementation != before[0]
    assert _names(model) == before


def test_an_implementation_chosen_meanwhile_stays(compose):
    model = tiny_model("llama", attention="sdpa")
    with PolicyCache(compose(), model):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def _abandon(spec, model):
    """Leave a cache that only the garbage collector can find, still attached."""
    cache = PolicyCache(spec, model)
    cache.loop = cache


def test_a_garbage_collection_inside_attach_does_not_wait_for_itself(model, compose, monkeypatch):
    other, before = tiny_model("qwen2"), _names(model)
    original = attach.register

    def register(base):
        gc.collect()  # what the collector may do at any allocation
        return original(base)

    monkeypatch.setattr(attach, "register", register)
    gc.disable()
    try:
        _abandon(compose(), model)
        thread = threading.Thread(target=lambda: PolicyCache(compose(), other).close(), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    finally:
        gc.enable()
    assert _names(model) == before


def test_collections_at_every_allocation_leave_the_model_as_it_was(model, compose):
    spec, before = compose(), _names(model)
    threshold = gc.get_threshold()
    done = threading.Event()

    def make():
        for _ in range(5):
            _abandon(spec, model)
            PolicyCache(spec, model).close()
        done.set()

    gc.set_threshold(20, 1, 1)
    try:
        threads = [threading.Thread(target=make, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert done.is_set()
    assert _names(model) == before
