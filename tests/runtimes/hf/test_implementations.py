"""Attention implementations other than sdpa and eager: the same tokens and entries, or refused by what they leave out.

Flash attention is not run with the real kernels, which need a GPU: a reference in float64 with their signatures stands
in for them (`kvsupport.flash`). flex attention is the real one, which torch runs without compiling it.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import tiny_model
from kvsupport.flash import KERNELS, stand_in_kernels

pytestmark = [  # of torch, by what transformers and torch do with flex attention
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
]

NAMES = [*KERNELS, "flex_attention"]
POLICIES = ("rkv", "h2o", "adakv-snapkv", "streaming-llm", "full")


@pytest.fixture(autouse=True)
def _kernels():
    with stand_in_kernels(), torch.compiler.set_stance("force_eager"):
        yield


def under(model, name):
    """Give a model an attention implementation, as loading it with that name would."""
    model.config.get_text_config(decoder=True)._attn_implementation_internal = name
    return model


@pytest.fixture
def model():
    return tiny_model("llama")


def generated(cache, model, inputs, new=20, **more):
    more = {"eos_token_id": None, "do_sample": False, **more}
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, **more)
    rows = len(inputs["input_ids"])
    return out.tolist(), [cache.kept(layer, head, row) for layer in (0, 2) for head in (0, 1) for row in range(rows)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("lengths", [(30,), (30, 12, 21)])
def test_tokens_and_entries_are_those_of_sdpa(name, policy, lengths, model, small, random_prompts, padded):
    inputs, results = padded(random_prompts(*lengths)), []
    for each in ("sdpa", name):
        with PolicyCache(small(policy), under(model, each)) as cache:
            results.append(generated(cache, model, inputs))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", NAMES)
def test_several_tokens_with_a_past_of_their_own(name, model, small, random_prompts, padded):
    """A prompt in chunks, a second turn of rows that end at different times, candidates, a row that sits a step out."""
    inputs, results = padded(random_prompts(26, 9)), []
    for each in ("sdpa", name):
        found = []
        with torch.no_grad(), PolicyCache(small("rkv"), under(model, each)) as cache:
            cache.prefill(**inputs, chunk=7)
            found.append(generated(cache, model, inputs, 6))
            seen = cache.get_seq_length()
            shown = torch.cat([inputs["attention_mask"], torch.ones(2, seen - 26, dtype=torch.int64)], 1)
            for new in ([[1, 1, 1, 1], [0, 0, 1, 1]], [[1], [0]], [[0, 1], [1, 1]], [[1], [1]]):
                shown = torch.cat([shown, torch.tensor(new)], 1)
                count = len(new[0])
                logits = model(
                    torch.arange(5, 5 + 2 * count).view(2, count), attention_mask=shown,
                    position_ids=(shown.cumsum(1) - 1).clamp(min=0)[:, -count:], past_key_values=cache,
                ).logits  # fmt: skip
                found += [logits.argmax(-1)[torch.tensor(new, dtype=torch.bool)].tolist(), cache.kept(1, 1, 1)]
        with PolicyCache(small("rkv"), under(model, each)) as cache:
            alone = {"input_ids": inputs["input_ids"][:1]}
            found.append(generated(cache, model, alone, 20, prompt_lookup_num_tokens=3, eos_token_id=999))
        results.append(found)
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_a_soft_cap_is_kept(name, small, random_prompts, padded):
    model = tiny_model("gemma2", layer_types=["full_attention"] * 4, attn_logit_softcapping=1.5, num_hidden_layers=4)
    inputs, results = padded(random_prompts(30, 12)), []
    for each in ("eager", name):
        with PolicyCache(small("rkv"), under(model, each)) as cache:
            results.append(generated(cache, model, inputs))
    assert results[0] == results[1]


def test_a_configuration_that_takes_certain_names_only_is_refused(small, monkeypatch):
    model = tiny_model("llama")
    kind = type(model.config)

    def setter(self, name, value):
        if name == "_attn_implementation_internal" and str(value).startswith("kvpolicy"):
            raise ValueError("names")
        object.__setattr__(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__setattr__", setter)
        with pytest.raises(UnsupportedError, match=r"^LlamaForCausalLM: this version of transformers lets no other"):
            PolicyCache(small("rkv"), model)
    assert model.config._attn_implementation == "sdpa"
    PolicyCache(small("rkv"), model).close()
    assert model.config._attn_implementation == "sdpa"


def takes(model, name, known):
    """Put an implementation under a model; whether transformers takes it, which it must if it is `known`."""
    try:
        under(model, name)
    except ValueError:
        assert name not in known
        return False
    return True


def test_attention_sinks_are_kept_or_refused(small, random_prompts, padded):
    model = tiny_model("gpt_oss", layer_types=["full_attention"] * 3)
    inputs, results = padded(random_prompts(30, 12)), []
    known = {"eager", "kernels-community/vllm-flash-attn3"}  # all that transformers 5.2 takes for this model
    for each in (*sorted(known), "flash_attention_3"):
        if takes(model, each, known):
            try:
                with PolicyCache(small("rkv"), model) as cache:
                    results.append(generated(cache, model, inputs))
            except UnsupportedError as error:
                assert "this version of transformers lets no other function stand in" in str(error)  # noqa: PT017
    assert results
    assert all(each == results[0] for each in results)
    for each in ("flash_attention_2", "flex_attention"):
        if not takes(model, each, known):
            continue
        with pytest.raises(UnsupportedError, match=f"has attention sinks, which .*{each}.* leaves out"):
            PolicyCache(small("rkv"), model)


@pytest.mark.parametrize(("family", "words"), [("gemma2", "caps its logits"), ("gpt_oss", "has attention sinks")])
def test_sdpa_leaves_out_caps_and_sinks_and_is_refused(family, words, small):
    """Some versions of transformers leave them out without a word, and a policy would score what nobody computes."""
    model = tiny_model(family, attention="eager")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(UnsupportedError, match=f"this model {words}, which attention implementation 'sdpa' leaves out"):
        PolicyCache(small("rkv"), model)


def test_what_cannot_be_right_is_refused_by_its_reason(model, small, random_prompts, padded, monkeypatch):
    for name, words in {
        "paged|sdpa": "continuous batching.*docs/serving.md",
        "paged|flash_attention_2": "continuous batching.*docs/serving.md",
        "paged|eager": "continuous batching.*docs/serving.md",
        "kernels-community/unheard-of": "nothing is known of how it masks",
    }.items():
        with pytest.raises(UnsupportedError, match=words):
            PolicyCache(small("rkv"), under(model, name))
    under(model, "flash_attention_2")
    with pytest.raises(UnsupportedError, match="graph: attention implementation 'flash_attention_2'"):
        PolicyCache(small("rkv"), model, graph=True)
    monkeypatch.setattr("kvpolicy.runtimes.hf.implementations.flash_attn_supports_top_left_mask", lambda: True)
    with torch.no_grad(), PolicyCache(small("rkv"), model) as cache:
        tokens = torch.tensor(random_prompts(12))
        model(tokens[:, :7], past_key_values=cache)
        model(tokens[:, 7:8], past_key_values=cache)
        with pytest.raises(UnsupportedError, match=r"flash-attn 2\.1 or newer"):
            model(tokens[:, 8:], past_key_values=cache)
        cache.reset()


def test_a_window_over_slots_is_refused(model, small):
    under(model, "flash_attention_2")
    call = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: call(*args, **kwargs, sliding_window=8)
    with pytest.raises(UnsupportedError, match="count a window in slots"):
        PolicyCache(small("rkv"), model)


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2", "flex_attention"])
def test_other_caches_on_the_same_model_notice_nothing(name, model, small, random_prompts, padded):
    inputs = padded(random_prompts(14, 9))
    under(model, name)
    plain = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **plain, past_key_values=DynamicCache(config=model.config))
    with PolicyCache(small("rkv"), model) as cache:
        assert torch.equal(
            model.generate(**inputs, **plain, past_key_values=DynamicCache(config=model.config)), expected
        )
        assert torch.equal(model.generate(**inputs, **plain, past_key_values=cache), expected)
    assert model.config._attn_implementation == name
