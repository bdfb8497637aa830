from __future__ import annotations

import pytest
import torch

import kvpolicy
from kvpolicy import KVPolicyError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.study import forcing
from kvpolicy.study.forcing import ForcedText, force_batch
from kvpolicy.testing.tiny import tiny_model

POLICIES = {
    "rkv": {"budget": 48, "trigger__every": 16},
    "h2o": {"budget": 80, "trigger__every": 8},
    "random": {"budget": 24, "trigger__every": 24},
    "snapkv-prefill": {"budget": 50},
    "adakv-snapkv": {"budget": 40, "phase": "both", "trigger__every": 16},
    "streaming-llm": {"budget": 70, "trigger__every": 16, "protect__recent": 64},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3").double()


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    sizes = ((110, 20), (130, 33), (110, 90), (110, 20))
    return [ForcedText(torch.randint(4, 256, (n,), generator=generator).tolist(), prompt) for n, prompt in sizes]


@pytest.mark.parametrize("name", POLICIES)
def test_blocks_give_what_token_by_token_gives(model, texts, name, monkeypatch):
    policy = kvpolicy.load(name, **POLICIES[name]).build()
    together = force_batch(model, policy, texts, attention=True)
    monkeypatch.setattr(forcing, "_LOGITS", 1)  # one token at a time
    for text, found in zip(texts, together, strict=True):
        (alone,) = force_batch(model, policy, [text], attention=True)
        assert alone.metrics(attention=True) | {"seconds": 0} == pytest.approx(
            found.metrics(attention=True) | {"seconds": 0}, abs=1e-7
        )
        assert alone.count == found.count == len(text.tokens) - text.prompt - 1
    assert together[2].kl > 0.01


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_it_is_the_divergence_of_plain_decoding(family, texts):
    """Against two loops without any of the code in question; the texts pass the windows (12) of gemma3."""
    model = tiny_model(family).double()
    policy = kvpolicy.load("rkv", **POLICIES["rkv"]).build()
    text = texts[0]
    ids = torch.tensor([text.tokens])
    with torch.inference_mode():
        full = model(ids[:, :-1]).logits[0, text.prompt :].log_softmax(-1)
        ours, kept = [], []
        with PolicyCache(policy, model) as cache:
            model(ids[:, : text.prompt], past_key_values=cache, use_cache=True)
            for i in range(text.prompt, len(text.tokens) - 1):
                ours.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1])
                kept.append(cache.engine.rows[0].resident)
    ours = torch.stack(ours).log_softmax(-1)
    (found,) = force_batch(model, policy, [text])
    metrics = found.metrics(attention=False)
    assert metrics["kl"] == pytest.approx((full.exp() * (full - ours)).sum(-1).mean().item(), abs=1e-9)
    assert metrics["top1"] == pytest.approx((full.argmax(-1) == ours.argmax(-1)).double().mean().item())
    assert metrics["resident_mean"] == pytest.approx(sum(kept) / len(kept))
    assert "attention_mass" not in metrics


def test_attention_mass_is_the_weight_of_what_is_held(texts):
    """Against eager attention weights of the whole text and the kept positions, step by step."""
    model = tiny_model("qwen3", attention="eager").double()
    policy = kvpolicy.load("random", 24, trigger__every=16).build()
    text = ForcedText(texts[0].tokens[:90], 20)
    ids = torch.tensor([text.tokens])
    with torch.inference_mode():
        weights = model(ids[:, :-1], output_attentions=True).attentions
        mass = []
        with PolicyCache(policy, model) as cache:
            model(ids[:, : text.prompt], past_key_values=cache, use_cache=True)
            for i in range(text.prompt, len(text.tokens) - 1):
                model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
                store = cache.engine.stores[0]
                held = cache.engine.rows[0].resident
                shares = [
                    weights[layer][0, h, i, store.positions[store.index[layer], 0, h // 2, :held].long()].sum().item()
                    for layer in range(3)
                    for h in range(4)
                ]
                mass.append(sum(shares) / len(shares))
    (found,) = force_batch(model, policy, [text], attention=True)
    assert found.metrics(attention=True)["attention_mass"] == pytest.approx(sum(mass) / len(mass), abs=1e-6)
    assert 0.2 < sum(mass) / len(mass) < 0.95


def test_the_full_cache_is_no_different_from_itself(model, texts):
    for found in force_batch(model, forcing.full_policy(), texts, attention=True):
        metrics = found.metrics(attention=True)
        assert metrics["kl"] < 1e-12
        assert metrics["top1"] == 1
        assert metrics["attention_mass"] == pytest.approx(1)
        assert metrics["retained_fraction"] == 1


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("name", ["rkv", "full"])
def test_layers_that_keep_a_window_or_a_state_take_part(family, name, texts):
    """Nothing is taken back from them; `full` is the full cache however far a text passes the window."""
    policy = forcing.full_policy() if name == "full" else kvpolicy.load(name, **POLICIES["rkv"]).build()
    for found in force_batch(tiny_model(family), policy, texts[:2]):
        metrics = found.metrics(attention=False)
        assert metrics["retained_fraction"] < 1 if name == "rkv" else metrics["retained_fraction"] == 1
        assert metrics["kl"] < 1e-9 if name == "full" else 1e-9 < metrics["kl"] < 5


@pytest.mark.parametrize("name", ["rkv", "streaming-llm"])
def test_texts_that_the_full_cache_has_no_positions_for_are_refused(texts, name):
    model = tiny_model("llama", max_position_embeddings=109).double()
    policy = kvpolicy.load(name, **POLICIES[name]).build()
    (found,) = force_batch(model, policy, texts[:1])  # its last token is only compared with
    assert found.count == 89
    with pytest.raises(KVPolicyError, match="text: makes a text of 129 tokens, and the model has 109 positions"):
        force_batch(model, policy, texts[:2])
