"""Models that cannot be served are refused when a cache is made, by the true cause; others are served."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import tiny_model

SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def _model(family, **options):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **options})).eval()


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_is_refused_at_once_by_its_cause(compose, family):
    # transformers 5.2 expands keys before they are cached, and newer ones afterwards.
    model = _model(family, **LATENT)
    try:
        cache = PolicyCache(compose(), model)
    except UnsupportedError as refusal:
        assert "multi-head latent attention" in str(refusal)  # noqa: PT017
    else:
        with cache:
            model.generate(torch.arange(3, 43)[None], past_key_values=cache, max_new_tokens=12, do_sample=False)
            assert cache.stats().seen == 51


def test_repeated_keys_are_refused_at_once_by_their_cause(compose):
    model = _model("jetmoe", num_key_value_heads=2, kv_channels=16, num_local_experts=2, num_experts_per_tok=2)
    with pytest.raises(UnsupportedError, match="makes others out of them first"):
        PolicyCache(compose(), model)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_encoders_are_refused_at_once_and_decoders_of_their_kind_served(compose, family):
    with pytest.raises(UnsupportedError, match=r"each token sees all others.*is_decoder=True"):
        PolicyCache(compose(), _model(family, is_decoder=False))
    model = _model(family, is_decoder=True)
    with PolicyCache(compose(), model) as cache:
        model.generate(torch.arange(3, 43)[None], past_key_values=cache, max_new_tokens=12, do_sample=False)
        assert cache.stats().compactions


def _kept(policy, model, run):
    with torch.no_grad(), PolicyCache(policy, model) as cache:
        run(cache)
        return [cache.kept(layer, head) for layer in (0, 2) for head in (0, 1)]


def test_headless_models_and_classifiers_are_served_as_the_model_with_a_head(compose):
    model, ids = tiny_model("llama"), torch.arange(3, 83)[None]
    classifier = AutoModelForSequenceClassification.from_config(model.config).eval()
    classifier.model.load_state_dict(model.model.state_dict())

    def run(model):
        def steps(cache):
            for part in (ids, ids[:, :1], ids[:, 4:5]):
                model(part, past_key_values=cache)

        return steps

    expected = _kept(compose(), model, run(model))
    assert _kept(compose(), model.model, run(model.model)) == expected
    assert _kept(compose(), classifier, run(classifier)) == expected


def test_a_headless_model_reads_a_prompt_in_chunks(compose):
    model, ids = tiny_model("llama").model, torch.arange(3, 83)[None]
    with PolicyCache(compose(), model) as cache:
        cache.prefill(ids, chunk=32)
        assert cache.get_seq_length() == 48


def test_attention_modules_without_parameters_are_served(compose):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(tiny_model("llama"), {torch.nn.Linear})
    assert not list(model.model.layers[0].self_attn.parameters())
    ids = torch.arange(3, 83)[None]
    with PolicyCache(compose(), model) as cache:
        assert cache.engine.groups == [(0, 1, 2)]
        model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False)
        assert cache.stats().compactions


def test_trying_a_model_out_leaves_it_as_it_was(compose):
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state, name = torch.get_rng_state(), model.config._attn_implementation
    PolicyCache(compose(), model).close()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == name


def test_a_model_is_tried_out_once(compose):
    model, calls = tiny_model("llama"), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        PolicyCache(compose(), model).close()
    assert len(calls) == 1
