"""What is refused at start-up, each in one sentence, and settings as they are written."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvpolicy
from kvpolicy.errors import SpecError, UnsupportedError
from kvpolicy.runtimes.vllm.books import Books, prompt_room
from kvpolicy.runtimes.vllm.refusals import (
    block_refusal,
    engine_refusal,
    policy_refusal,
    start_refusal,
    version_refusal,
)
from kvpolicy.runtimes.vllm.settings import VARIABLE, asked, settings
from kvpolicy.testing.tables import stand_in_tables


def policy(name="rkv", budget=256, **changes):
    return kvpolicy.load(name, budget, **changes).build()


def config(**changes):
    """What vLLM's configuration says by default, as far as it is read."""
    made = SimpleNamespace(
        speculative_config=None, kv_transfer_config=None, compilation_config=SimpleNamespace(cudagraph_mode=None),
        cache_config=SimpleNamespace(enable_prefix_caching=False, cache_dtype="auto", kv_sharing_fast_prefill=False),
        model_config=SimpleNamespace(use_mla=False, is_encoder_decoder=False, runner_type="generate"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
    )  # fmt: skip
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(getattr(made, part), field, value)
        else:
            setattr(made, part, value)
    return made


def one_sentence(said):
    assert said is not None
    assert said.endswith(".")
    assert said.count(". ") == 0
    return said


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"speculative_config": object()}, "speculative decoding"),
     ({"cache_config__enable_prefix_caching": True}, "--no-enable-prefix-caching"),
     ({"model_config__use_mla": True}, "MLA"), ({"cache_config__cache_dtype": "fp8_e4m3"}, "quantised"),
     ({"parallel_config__decode_context_parallel_size": 2}, "DCP"),
     ({"parallel_config__prefill_context_parallel_size": 2}, "PCP"), ({"kv_transfer_config": object()}, "connector"),
     ({"model_config__is_encoder_decoder": True}, "decoders"), ({"model_config__runner_type": "pooling"}, "decoders"),
     ({"parallel_config__enable_dbo": True}, "--enable-dbo"),
     ({"compilation_config__cudagraph_mode": SimpleNamespace(has_full_cudagraphs=lambda: True)}, "PIECEWISE")],
)  # fmt: skip
def test_engines_are_refused_by_their_options(changes, word):
    assert engine_refusal(policy(), config()) is None
    assert word in one_sentence(engine_refusal(policy(), config(**changes)))


def test_a_set_for_the_model_and_pieces_of_prompts_ask_for_options():
    pipeline = config(parallel_config__pipeline_parallel_size=2)
    assert "scope 'model'" in one_sentence(engine_refusal(policy(selector__scope="model"), pipeline))
    assert engine_refusal(policy(), pipeline) is None
    said = one_sentence(engine_refusal(policy("keydiff"), config()))
    assert "--max-num-batched-tokens 128" in said
    assert engine_refusal(policy("keydiff"), config(scheduler_config__max_num_batched_tokens=128)) is None


@pytest.mark.parametrize(
    ("name", "word"),
    [("adakv-snapkv", "equal_counts"), ("threshold", "equal_counts"), ("finch", "re_rotates"),
     ("compactor", "whole_prompt"), ("criticalkv", "needs weights")],
)  # fmt: skip
def test_policies_are_refused_by_their_traits(name, word):
    with stand_in_tables():
        assert word in one_sentence(policy_refusal(kvpolicy.load(name).build()))


@pytest.mark.parametrize(
    "name",
    ["rkv", "rkv-code", "rkv-paper", "rkv-density", "snapkv", "tova", "keydiff", "knorm", "lagkv", "g-kv", "h2o",
     "lazy-eviction", "sinks-recent", "recent-pinned", "random-pinned", "random", "snapkv-prefill", "mixkv", "full"],
)  # fmt: skip
def test_policies_that_must_be_served_are(name):
    assert policy_refusal(kvpolicy.load(name).build()) is None


def test_numbers_that_do_not_fill_blocks_are_refused_with_the_nearest():
    assert block_refusal(policy(), 32) is None
    assert "budget 250 is no multiple of the block size 32, and blocks come free whole; write 256" in one_sentence(
        block_refusal(policy(budget=250), 32)
    )
    assert "write 32," in one_sentence(block_refusal(policy(budget=40, protect__sinks=0), 32))
    assert "trigger interval 100 is no multiple of the block size 32" in one_sentence(
        block_refusal(policy(trigger__interval=100), 32)
    )
    assert block_refusal(policy("snapkv-prefill"), 32) is None
    assert block_refusal(policy("tova"), 32) is None


def test_versions():
    assert version_refusal("0.32.0+cpu") is None
    assert version_refusal("0.32.1") is None
    for version in ("0.31.9", "0.33.0", "1.0", "0.33.0rc1.dev3+gabc"):
        assert version in one_sentence(version_refusal(version))


def test_a_pool_that_cannot_hold_one_step_is_refused():
    numbers = {"block": 32, "longest": 4096, "widest": 512}
    with pytest.raises(UnsupportedError, match=r"736 entries cannot hold its budget of 256 and the 512 tokens"):
        Books(policy(), blocks=24, **numbers)
    assert prompt_room(policy(), blocks=25, **numbers) == 768
    assert prompt_room(policy(), blocks=200, **numbers) == 4096
    assert prompt_room(policy(), blocks=200, prompt=1000, **numbers) == 1000
    with pytest.raises(UnsupportedError, match=r"a prompt of 700 tokens \(`prompt`\) cannot hold"):
        prompt_room(policy(), blocks=200, prompt=700, **numbers)
    assert prompt_room(policy("keydiff"), blocks=25, **numbers) is None
    assert prompt_room(policy("snapkv-prefill"), blocks=25, **numbers) == 4096


def test_settings_are_read_from_the_engine_or_the_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert asked({}) is None
    assert asked({"other": {}}) is None
    assert asked({"kvpolicy": "rkv"}) == {"policy": "rkv"}
    monkeypatch.setenv(VARIABLE, "snapkv")
    assert asked({}) == {"policy": "snapkv"}
    assert asked({"kvpolicy": "rkv"}) == {"policy": "rkv"}
    monkeypatch.setenv(VARIABLE, '{"policy": "rkv", "budget": 512}')
    assert asked({}) == {"policy": "rkv", "budget": 512}
    made = settings({"policy": "rkv", "budget": 512, "set": {"mixer.weight": 0.3}, "prompt": 900})
    assert made.spec.budget.tokens == 512
    assert made.spec.mixer.component.weight == 0.3
    assert (made.prompt, made.any_version) == (900, False)
    # Budget and changes count together: either alone would protect more than is kept.
    assert settings({"policy": "lagkv", "budget": 64, "set": {"protect.recent": 16}}).spec.budget.tokens == 64


@pytest.mark.parametrize(
    ("said", "word"),
    [({"policy": "rkw"}, "Did you mean 'rkv'"), ({"polcy": "rkv"}, "Did you mean 'policy'"), ({}, "no policy is named"),
     ({"policy": "rkv", "budget": "512"}, "is not a number"), ({"policy": "rkv", "prompt": True}, "not a whole number"),
     ({"policy": "rkv", "prompt": 0}, "no prompt"), ({"policy": "rkv", "set": ["a"]}, "dotted paths"),
     ({"policy": "rkv", "set": {"mixer.wieght": 1}}, "weight"), ({"policy": 3}, "name or file")],
)  # fmt: skip
def test_settings_that_are_wrong_are_named(said, word):
    with pytest.raises(SpecError, match=word):
        settings(said)


@pytest.mark.parametrize("said", [["rkv"], 3, True])
def test_settings_of_another_kind_are_refused(said):
    with pytest.raises(SpecError, match="a policy's name or a mapping was expected"):
        asked({"kvpolicy": said})


def test_a_variable_that_is_no_json_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, '{"policy": rkv}')
    with pytest.raises(SpecError, match="this is no JSON"):
        asked(None)


def test_the_table_of_policies_is_up_to_date():
    root = Path(__file__).resolve().parents[3]
    spec = importlib.util.spec_from_file_location("vllm_policies", root / "scripts" / "vllm_policies.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python scripts/vllm_policies.py"


def test_an_engine_that_is_not_started_says_where_served_policies_are_listed():
    assert start_refusal(policy()) is None
    said = one_sentence(start_refusal(policy("adakv-snapkv")))
    assert said.endswith("a block table is for all; docs/vllm-policies.md lists the policies that are served.")
