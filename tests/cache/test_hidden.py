"""Tokens that a later turn's mask hides: they have no position, and keys keep the rotation that the model gave them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy import ops
from kvpolicy.cache.engine import Engine
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import tiny_model
from kvpolicy_plugins._rope import next_position

IDS = torch.randint(3, 250, (2, 60), generator=torch.Generator().manual_seed(0))
MORE = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def small(name):
    """A registered policy that evicts from texts of forty tokens."""
    spec = kvpolicy.load(name)
    if name == "h2o":
        spec = spec.replace("protect.recent", 8)
    spec = spec.replace("budget", 20)
    return spec if spec.phase == "prefill" else spec.replace("trigger", {"every": 4})


def masked(hidden, width):
    """A mask of two rows whose first hides some columns, and the position ids that generate() makes of it."""
    mask = torch.ones(2, width, dtype=torch.long)
    mask[0, hidden] = 0
    return mask, (mask.cumsum(-1) - 1).clamp(min=0)


def two_turns(model, cache, hidden, first, second, steps):
    """A turn of `first` tokens, one of `second` with a mask that hides some of the first, and single tokens."""
    logits = []
    with torch.no_grad():
        model(IDS[:, :first], attention_mask=torch.ones(2, first, dtype=torch.long), past_key_values=cache)
        end = first + second
        mask, positions = masked(hidden, end)
        out = model(IDS[:, first:end], attention_mask=mask, position_ids=positions[:, first:], past_key_values=cache)
        logits.append(out.logits[:, -1])
        for i in range(steps):
            mask, positions = masked(hidden, end + i + 1)
            out = model(MORE[:, i : i + 1], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache)
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("hidden", [slice(12, 16), slice(5, 9), [2, 3, 9, 15]], ids=["end", "middle", "scattered"])
def test_below_the_budget_they_are_hidden_as_in_a_dynamic_cache(model, hidden):
    expected = two_turns(model, DynamicCache(config=model.config), hidden, 16, 6, 8)
    for name in ("rkv", "rkv-density", "streaming-llm", "h2o", "adakv-snapkv"):
        with PolicyCache(kvpolicy.load(name, budget=128), model) as cache:
            assert torch.allclose(two_turns(model, cache, hidden, 16, 6, 8), expected, atol=2e-5)
            assert [row.seen for row in cache.engine.rows] == [26, 30]
            assert cache.kept(1, 0, row=0) == list(range(26))


@pytest.mark.parametrize("name", ["rkv-density", "rkv", "streaming-llm", "compactor", "knorm", "tova", "random", "h2o"])
def test_a_row_that_loses_its_end_is_as_if_it_never_had_it(model, name):
    """The row alone never saw the hidden tokens; keys, positions, rotations and what is kept agree."""
    spec = small(name)
    with PolicyCache(spec, model) as batch, PolicyCache(spec, model) as alone, torch.no_grad():
        together = two_turns(model, batch, slice(12, 16), 16, 14, 12)[:, 0]
        model(IDS[:1, :12], past_key_values=alone)
        logits = [model(IDS[:1, 16:30], past_key_values=alone).logits[0, -1]]
        logits += [model(MORE[:1, i : i + 1], past_key_values=alone).logits[0, -1] for i in range(12)]
        assert torch.allclose(together, torch.stack(logits), atol=3e-5)
        for layer in range(3):
            for head in range(2):
                assert batch.kept(layer, head, row=0) == alone.kept(layer, head)
        assert batch.engine.rows[0].seen == alone.engine.rows[0].seen == 38
        assert batch.engine.rows[0].compactions == alone.engine.rows[0].compactions > 0


@pytest.mark.parametrize("name", ["rkv-density", "streaming-llm"])
def test_keys_are_unrotated_from_where_the_model_turned_them(model, name):
    """The first layer's un-rotated keys depend on the token alone, wherever it stood."""
    hidden = slice(3, 8)
    spec = kvpolicy.load(name, budget=24).replace("trigger", {"every": 4})
    with PolicyCache(spec, model) as cache:
        two_turns(model, cache, hidden, 16, 8, 15)
        assert cache.stats().compactions
        view = cache.engine.view(0, slice(0, 1))
    text = torch.cat([IDS[0, :3], IDS[0, 8:24], MORE[0, :15]])
    layer = model.model.layers[0]
    with torch.no_grad():
        made = layer.self_attn.k_proj(layer.input_layernorm(model.model.embed_tokens(text))).unflatten(-1, (2, -1))
    assert view.rope is not None
    assert view.rope_positions is not None
    for head in range(2):
        real = view.valid[0, head]
        back = ops.rotate(view.keys[:, head : head + 1], view.rope, -view.rope_positions[:, head : head + 1])
        wanted = made[view.positions[0, head][real].long(), head]
        assert torch.allclose(back[0, 0][real], wanted, atol=1e-4)


def test_queries_of_hidden_tokens_are_forgotten_and_the_others_move_down():
    engine = Engine(kvpolicy.load("rkv", budget=64).replace("importance.observe", 6).build(), [(0,)], 1)
    generator = torch.Generator().manual_seed(0)

    def feed(columns, kind):
        keys = torch.randn(1, 2, columns, 8, generator=generator)
        engine.open(1, columns, None, torch.device("cpu"), kind=kind)
        engine.append(0, keys, keys)
        queries = torch.randn(1, 4, columns, 8, generator=generator)
        engine.record(0, queries, LayerFacts(2, 8**-0.5))
        return queries

    first = feed(10, "prompt")
    engine.hide(torch.tensor([[True] * 4 + [False] * 3 + [True] * 3]))
    second = feed(2, "prompt")
    window = engine.log.window()
    assert window is not None
    assert window.positions[window.valid].tolist() == [3, 4, 5, 6, 7, 8]
    held = engine.log.gather(0, window)
    assert torch.equal(held[:, :, window.valid[0]], torch.cat([first[:, :, [3, 7, 8, 9]], second], 2))


def hide_later(model, cache, first, steps, hidden):
    with torch.no_grad():
        model(torch.cat([IDS, IDS], 1)[:, :first], past_key_values=cache)
        for i in range(steps):
            model(MORE[:, i : i + 1], past_key_values=cache)
        mask, positions = masked(hidden, first + steps + 2)
        model(MORE[:, :2], attention_mask=mask, position_ids=positions[:, -2:], past_key_values=cache)


def test_a_row_that_has_been_compacted_cannot_hide_tokens(model):
    with PolicyCache(small("knorm"), model) as cache:  # noqa: SIM117
        with pytest.raises(kvpolicy.CacheStateError, match="hides tokens of row 0 that were real before"):
            hide_later(model, cache, 30, 3, slice(10, 12))


def test_what_an_accumulating_scorer_has_observed_cannot_be_hidden(model):
    with PolicyCache(kvpolicy.load("h2o", budget=500), model) as cache:
        hide_later(model, cache, 100, 3, slice(90, 95))
    with PolicyCache(kvpolicy.load("h2o", budget=500), model) as cache:  # noqa: SIM117
        with pytest.raises(
            kvpolicy.CacheStateError, match="what policy 'h2o' has observed of their queries cannot be forgotten"
        ):
            hide_later(model, cache, 100, 3, slice(10, 15))


@pytest.mark.parametrize("name", ["streaming-llm", "expected-attention"])
def test_the_next_token_is_turned_as_the_model_turns_it(model, name):
    """Right after a mask hid tokens in the middle, the newest entry's own rotation says nothing of the next one's."""
    spec = small(name) if name == "streaming-llm" else kvpolicy.load(name, budget=64)
    with PolicyCache(spec, model) as cache, torch.no_grad():
        model(IDS[:, :12], past_key_values=cache)
        past = torch.ones(2, 12, dtype=torch.bool)
        past[0, 3:8] = False
        cache.engine.hide(past)
        assert next_position(cache.engine.view(0, slice(0, 2))).tolist() == [[7, 7], [12, 12]]
        if name == "streaming-llm":  # and once keys have been re-rotated, they lag behind by what has gone
            model(IDS[:, 12:40], past_key_values=cache)
            model(MORE[:, :1], past_key_values=cache)
            row = cache.engine.rows[1]
            assert row.compactions
            assert next_position(cache.engine.view(0, slice(1, 2))).tolist() == [[row.seen - row.shift] * 2]
            assert row.shift > 0
