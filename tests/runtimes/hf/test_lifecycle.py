"""A model behaves as before, whatever happens to the caches that were attached to it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from kvpolicy.errors import CacheStateError, KVPolicyError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache, generate
from kvpolicy.testing.tiny import tiny_model


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return tiny_model("llama", attention=request.param)


@pytest.fixture
def ids(random_prompts):
    return torch.tensor(random_prompts(20))


def _full(model, ids):
    with torch.no_grad():
        return model(ids, past_key_values=DynamicCache(config=model.config)).logits


def _names(model):
    return {id(m): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}


def test_leaving_the_context_restores_the_model(model, ids, compose):
    before, logits = _names(model), _full(model, ids)
    with PolicyCache(compose(), model) as cache:
        assert _names(model) != before
        model.generate(ids, do_sample=False, max_new_tokens=30, past_key_values=cache)
        assert torch.equal(_full(model, ids), logits), "another cache on the model noticed something"
    assert _names(model) == before
    assert torch.equal(_full(model, ids), logits)
    assert cache.kept(0, 0)[:2] == [0, 1]  # what was kept can still be read
    assert cache.stats().resident == 24 + (cache.stats().seen - 32) % 8


def test_an_exception_in_the_middle_restores_the_model(model, ids, compose):
    before, logits = _names(model), _full(model, ids)
    for error in (RuntimeError("broken"), KeyboardInterrupt()):
        steps = iter(range(10))

        def hook(module, args, steps=steps, error=error):
            if next(steps, None) is None:
                raise error

        handle = model.model.layers[1].mlp.register_forward_pre_hook(hook)
        with pytest.raises(type(error)), PolicyCache(compose(), model) as cache:
            model.generate(ids, do_sample=False, max_new_tokens=30, past_key_values=cache)
        handle.remove()
        assert _names(model) == before
        assert torch.equal(_full(model, ids), logits)


@torch.no_grad()
def test_a_cache_whose_forward_pass_broke_is_refused_until_reset(model, ids, compose):
    def hook(module, args):
        raise RuntimeError("broken")

    with PolicyCache(compose(), model) as cache:
        fresh = model.generate(ids, do_sample=False, max_new_tokens=30, past_key_values=cache)
        for module in (model.model.layers[1].mlp, model.model.layers[1].self_attn.o_proj, model.model.layers[0].mlp):
            cache.reset()
            handle = module.register_forward_pre_hook(hook)
            with pytest.raises(RuntimeError, match="broken"):
                model.generate(ids, do_sample=False, max_new_tokens=30, past_key_values=cache)
            handle.remove()
            with pytest.raises(
                CacheStateError, match=r"stopped before layer \d, so the cache is incomplete; call reset"
            ):
                model(ids, past_key_values=cache)
        cache.reset()
        again = model.generate(ids, do_sample=False, max_new_tokens=30, past_key_values=cache)
    assert torch.equal(again, fresh)


def test_an_error_inside_the_attention_itself_is_not_blamed_on_the_registry(model, ids, compose, monkeypatch):
    from kvpolicy.runtimes.hf.layer import EvictingLayer

    with PolicyCache(compose(), model) as cache, torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(EvictingLayer, "attend", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids, past_key_values=cache)
        with pytest.raises(KVPolicyError):
            model(ids, past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)


def test_collecting_a_cache_restores_the_model_without_gc(model, ids, compose):
    before = _names(model)
    cache = PolicyCache(compose(), model)
    model.generate(ids, do_sample=False, max_new_tokens=30, past_key_values=cache)
    store = next(iter(cache.engine.stores.values()))
    gc.collect()
    gc.disable()
    try:
        del cache
        assert _names(model) == before
    finally:
        gc.enable()
    assert store.capacity > 0


def test_a_deleted_model_takes_nothing_down(compose):
    model = tiny_model("llama")
    cache = PolicyCache(compose(), model)
    cache.close()
    cache.close()
    left = [weakref.ref(model), weakref.ref(cache)]
    del model, cache
    gc.collect()
    assert [each() for each in left] == [None, None]


def test_the_last_of_several_caches_restores_the_model(model, ids, compose):
    before = _names(model)
    first, second = PolicyCache(compose(), model), PolicyCache(compose(), model)
    first.close()
    assert _names(model) != before
    model.generate(ids, do_sample=False, max_new_tokens=10, past_key_values=second)
    second.close()
    assert _names(model) == before


def test_a_closed_cache_says_so(model, ids, compose):
    with PolicyCache(compose(), model) as cache:
        model.generate(ids, do_sample=False, max_new_tokens=10, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="not attached to the model"), torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(CacheStateError, match="closed"):
        cache.fork()
    with pytest.raises(CacheStateError, match="closed"), cache:
        pass


def test_the_implementation_may_be_changed_meanwhile(ids, compose):
    """What somebody chose inside the block stays."""
    model = tiny_model("llama", attention="sdpa")
    with PolicyCache(compose(), model):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_changing_the_implementation_under_a_cache_is_noticed(ids, compose):
    model = tiny_model("llama", attention="sdpa")
    with PolicyCache(compose(), model) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        model.set_attn_implementation("eager")
        with pytest.raises(KVPolicyError):
            model(ids, past_key_values=cache)


def test_a_cache_is_for_its_own_model(ids, compose):
    one, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with PolicyCache(compose(), one) as cache, torch.no_grad(), pytest.raises(UnsupportedError, match="not attached"):
        other(ids, past_key_values=cache)


def test_a_nested_model_is_restored_in_all_its_configurations(compose, random_prompts):
    model = tiny_model("qwen2_vl")
    before = _names(model)
    with PolicyCache(compose(), model) as cache:
        model.generate(torch.tensor(random_prompts(20)), do_sample=False, max_new_tokens=20, past_key_values=cache)
    assert _names(model) == before


def test_generate_closes_the_cache_that_it_made(model, ids, compose):
    before = _names(model)
    _, cache = generate(model, {"input_ids": ids}, compose(), do_sample=False, max_new_tokens=20)
    assert _names(model) == before
    assert cache.stats().evicted > 0
    with pytest.raises(RuntimeError, match="max_new"):
        generate(model, {"input_ids": ids}, compose(), do_sample=False, max_new_tokens=20, stopping_criteria=[_fail])
    assert _names(model) == before


def _fail(*args, **kwargs):
    raise RuntimeError("max_new")


def test_a_model_that_is_pickled_or_saved_inside_the_block_does_not_remember(tmp_path, compose):
    """The name of the wrapper must not get into config.json."""
    model = tiny_model("llama")
    with PolicyCache(compose(), model):
        model.config.save_pretrained(tmp_path)
    assert "kvpolicy" not in (tmp_path / "config.json").read_text()


def test_stats_count_entries_and_bytes(compose, random_prompts, padded):
    model = tiny_model("llama")
    with PolicyCache(compose(), model) as cache:
        assert cache.stats().seen == cache.stats().bytes_allocated == 0
        model.generate(**padded(random_prompts(20, 31)), do_sample=False, max_new_tokens=31, past_key_values=cache)
        stats = cache.stats()
    entry = 2 * 2 * 16 * 4  # keys and values of two heads
    assert [layer.layer_idx for layer in stats.layers] == [0, 1, 2]
    assert stats.seen == 61
    rows = cache.engine.rows
    assert stats.resident == max(row.resident for row in rows) <= 32
    assert stats.layers[1].bytes_resident == entry * sum(row.resident for row in rows)
    assert stats.layers[1].bytes_allocated == entry * 2 * cache.engine.stores[1].capacity
    assert stats.bytes_resident == 3 * stats.layers[0].bytes_resident <= stats.bytes_allocated
    assert stats.evicted == max(row.seen - row.resident for row in rows)
    assert stats.compactions == max(row.compactions for row in rows) > 0
    assert stats.peak_resident == 32
    assert stats.bytes_metadata > 0
