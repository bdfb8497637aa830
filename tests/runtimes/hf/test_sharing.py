"""Layers that read the keys of another layer: one store, and the attention of every reader counts once."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache

OWNER, SHARER = 1, 3  # the layers of full attention; layers 0 and 2 keep a window
HEADS, GROUPS, RECENT, BUDGET = 2, 2, 4, 20

COMMON = {
    "vocab_size": 256, "vocab_size_per_layer_input": 256, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": HEADS * GROUPS, "num_key_value_heads": HEADS, "head_dim": 16,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "sliding_window": 12, "initializer_range": 0.12,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


def gemma3n():
    config = transformers.Gemma3nTextConfig(**COMMON, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4)
    return transformers.Gemma3nForCausalLM(config)


def gemma4():
    """With heads of another size in layers of full attention, and prompts that sharers skip but for their end."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("transformers without Gemma-4")
    config = transformers.Gemma4TextConfig(**COMMON, global_head_dim=32)
    return transformers.Gemma4ForCausalLM(config)


@pytest.fixture(scope="module", params=[gemma3n, gemma4])
def made(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = request.param()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@pytest.fixture(params=["sdpa", "eager"])
def model(made, request):
    made.set_attn_implementation(request.param)
    return made


@pytest.fixture
def ids(random_prompts):
    return torch.tensor(random_prompts(60))


def nothing_seen(model):
    """Return an empty cache: without one transformers 5.2 lets sharers make keys of their own."""
    return DynamicCache(config=model.config)


def attentions(model, ids):
    """Weights of the owner and of its sharer over everything, `[H, G, Q, N]` each."""
    model.set_attn_implementation("eager")
    found = model(ids, past_key_values=nothing_seen(model), output_attentions=True).attentions
    return [found[i][0].unflatten(0, (HEADS, GROUPS)) for i in (OWNER, SHARER)]


def best(scores):
    """Return the positions that a policy keeps by `[H, N]` scores, the newest ones always."""
    scores = scores.clone()
    scores[:, -RECENT:] = 1e9
    return [sorted(row.topk(BUDGET).indices.tolist()) for row in scores]


SCORES = {
    "accumulated_attention": lambda owner, sharer: (owner + sharer).sum((1, 2)),
    "tova": lambda owner, sharer: (owner + sharer)[:, :, -1].mean(1) / 2,
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("importance", SCORES)
@torch.no_grad()
def test_the_attention_of_every_reader_counts_once(importance, whole, model, ids, compose):
    """Also where the model is asked for its last logits only, as by `generate`."""
    policy = compose(
        budget=BUDGET,
        trigger={"every": 4},
        protect={"recent": RECENT},
        phase="both",
        importance=importance,
        mixer="importance_only",
    )
    with PolicyCache(policy, model) as cache:
        model(ids, past_key_values=cache, **({} if whole else {"logits_to_keep": 1}))
        kept = [cache.kept(OWNER, head) for head in range(HEADS)]
    owner, sharer = attentions(model, ids)
    assert kept == best(SCORES[importance](owner, sharer))
    assert kept != best(SCORES[importance](owner, owner))
    assert kept != best(SCORES[importance](sharer, sharer))


@pytest.mark.parametrize(
    "parts",
    [
        {"importance": "window_attention"},
        {"importance": "accumulated_attention", "mixer": "importance_only"},
        {"importance": "window_attention", "allocator": "adaptive_heads"},
    ],
)
@torch.no_grad()
def test_readers_see_what_is_kept(parts, model, ids, compose, random_prompts):
    """Against one pass over the whole text, under a mask of what each head held when a token came."""
    policy = compose(budget=BUDGET, trigger={"every": 4}, protect={"recent": RECENT}, **parts)
    text = torch.cat([ids, torch.tensor(random_prompts(16, seed=9))], 1)
    start, length = ids.shape[1], text.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool).tril().repeat(1, HEADS, 1, 1)
    logits = []
    with PolicyCache(policy, model) as cache:
        model(ids, past_key_values=cache, logits_to_keep=1)
        for at in range(start, length):
            for head in range(HEADS):
                sees[0, head, at] = False
                sees[0, head, at, [*cache.kept(OWNER, head), at]] = True
            logits.append(model(text[:, at : at + 1], past_key_values=cache).logits[0, -1])
        assert cache.stats().compactions > 1
    window = torch.ones(length, length, dtype=torch.bool).tril() & ~torch.ones(length, length, dtype=torch.bool).tril(
        -COMMON["sliding_window"]
    )
    bias = {
        name: torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        for name, mask in (
            ("full_attention", sees.repeat_interleave(GROUPS, 1)),
            ("sliding_attention", window[None, None]),
        )
    }
    model.set_attn_implementation("eager")
    wanted = model(text, attention_mask=bias, past_key_values=nothing_seen(model)).logits[0, start:]
    torch.testing.assert_close(torch.stack(logits), wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["rkv", "streaming-llm", "tova", "h2o", "snapkv-prefill", "criticalkv", "adakv-snapkv"]
)
@torch.no_grad()
def test_below_the_budget_it_is_what_a_dynamic_cache_gives(name, model, small, random_prompts, padded):
    inputs = padded(random_prompts(20, 13))
    wanted = model.generate(**inputs, past_key_values=nothing_seen(model), max_new_tokens=12, do_sample=False)
    with PolicyCache(small(name, 60), model) as cache:
        got = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
        assert cache.stats().evicted == 0
    assert torch.equal(got, wanted)


@torch.no_grad()
def test_a_padded_row_is_as_if_alone(model, compose, random_prompts, padded):
    policy = compose(budget=BUDGET, trigger={"every": 4}, protect={"recent": RECENT})
    prompts = random_prompts(50, 37)
    kept = []
    for rows in (prompts, prompts[1:]):
        with PolicyCache(policy, model) as cache:
            model.generate(**padded(rows), past_key_values=cache, max_new_tokens=9, do_sample=False)
            kept.append([cache.kept(OWNER, head, row=len(rows) - 1) for head in range(HEADS)])
    assert kept[0] == kept[1]


@torch.no_grad()
def test_several_last_tokens_see_what_precedes_them(model, compose, ids):
    """Layers without keys may skip all but the last tokens; no mask is made where causality alone would do."""
    wanted = model(ids[:, :10], past_key_values=nothing_seen(model)).logits[:, -3:]
    with PolicyCache(compose(importance="key_norm", mixer="importance_only"), model) as cache:
        for each in (cache, nothing_seen(model)):
            got = model(ids[:, :10], past_key_values=each, logits_to_keep=3).logits
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_model_is_left_as_it_was(model, compose):
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    with PolicyCache(compose(), model):
        pass
    assert hooks == {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}


@torch.no_grad()
def test_a_pass_that_stops_before_a_reader_is_noticed(model, compose, ids):
    with PolicyCache(compose(), model) as cache:
        handle = model.model.layers[SHARER].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, past_key_values=cache)
        handle.remove()
        with pytest.raises(CacheStateError, match=f"before other layers had read the keys of layer {OWNER}"):
            model(ids[:, :1], past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)
        assert cache.stats().seen == ids.shape[1]


@torch.no_grad()
def test_readers_that_scale_differently_are_refused(model, compose, ids):
    module = model.model.layers[SHARER].self_attn
    before, module.scaling = module.scaling, 0.5
    try:
        with PolicyCache(compose(), model) as cache, pytest.raises(UnsupportedError, match=r"scale or cap"):
            model(ids, past_key_values=cache)
    finally:
        module.scaling = before


@torch.no_grad()
def test_a_reader_that_nobody_announced_is_refused(model, compose, ids):
    module = model.model.layers[SHARER].self_attn
    module.is_kv_shared_layer = False
    try:
        cache = PolicyCache(compose(), model)
    finally:
        module.is_kv_shared_layer = True
    with (
        cache,
        pytest.raises(UnsupportedError, match=f"layer {SHARER} .* reads the keys of layer {OWNER} without saying"),
    ):
        model(ids, past_key_values=cache)
