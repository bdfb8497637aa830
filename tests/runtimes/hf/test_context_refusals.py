"""What a context cache refuses, or says, in one sentence."""

from __future__ import annotations

import warnings

import pytest
import torch

import kvpolicy
from kvpolicy.cache.ledger import Incoming
from kvpolicy.errors import CacheStateError, KVPolicyError, UnsupportedError
from kvpolicy.runtimes.hf import ContextCache, PolicyCache
from kvpolicy.testing.tiny import tiny_model
from kvsupport.contexts import CONTEXT, QUESTIONS


@pytest.fixture
def model(tiny):
    return tiny("qwen3")


@pytest.mark.parametrize("empty", ["", "  \n", [], ["a text", ""]])
def test_an_empty_context_is_refused(empty, model, tokenizer):
    with pytest.raises(CacheStateError, match=r"context( 2 of 2)?: is empty; give the text"):
        ContextCache("full", model, tokenizer, empty)


@pytest.mark.parametrize(("name", "budget"), [("snapkv-prefill", 400), ("snapkv-prefill", 0.5), ("rkv", 300)])
def test_a_context_that_is_not_compressed_says_so(name, budget, model, tokenizer):
    text = CONTEXT[:30] if budget == 0.5 else CONTEXT  # shorter than the window of 32 queries, which is protected
    with pytest.warns(UserWarning, match=r"the context was not compressed: \d+ tokens do not exceed the \d+ entries"):
        context = ContextCache(kvpolicy.load(name, budget=budget), model, tokenizer, text)
    assert context.untouched
    assert context.stats().evicted == 0
    context.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ContextCache("full", model, tokenizer, text).close()
    with pytest.warns(UserWarning, match="1 of 2 contexts was not compressed"):
        ContextCache(kvpolicy.load("snapkv-prefill", budget=100), model, tokenizer, [CONTEXT, CONTEXT[:50]]).close()


def test_what_does_not_fit_the_positions_is_refused(tokenizer, small):
    model = tiny_model("llama", max_position_embeddings=310)
    assert len(CONTEXT) == 276
    with ContextCache(small("snapkv-prefill", 48), model, tokenizer, CONTEXT) as context:
        with pytest.raises(
            CacheStateError, match=r"question 2 of 2: makes a text of 318 tokens, and the model has 310"
        ):
            context.ask(["why?", "x" * 40])
        with pytest.raises(CacheStateError, match=r"there is room for 28 of the 29 that are asked for"):
            context.ask("why?", max_new_tokens=29)
        assert len(context.reply("why?").tokens) == 28
        with pytest.raises(CacheStateError, match="max_new_tokens: 0 tokens make no answer"):
            context.ask("why?", max_new_tokens=0)
    with pytest.raises(CacheStateError, match="context: makes a text of 554 tokens, and the model has 310 positions"):
        ContextCache(small("snapkv-prefill", 48), model, tokenizer, CONTEXT * 2)
    turning = kvpolicy.load("snapkv-prefill", 48, post=["rerotate"])
    with ContextCache(turning, model, tokenizer, CONTEXT * 3, chunk=64) as context:
        assert context.ask("why?", max_new_tokens=4)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"name": "recent-pinned"}, {}, "pins the prompt, which the context would be"),
        ({"name": "compactor"}, {"chunk": 32}, "needs the context in one piece; leave chunks out"),
        ({"name": "snapkv-prefill"}, {"chunk": 0}, "chunk: 0 is not a chunk size"),
        ({"name": "keydiff"}, {"chunk": 32}, "compresses in chunks of 8 tokens and not of 32; write at most 8"),
    ],
)
def test_policies_that_cannot_compress_a_context_are_refused(changes, options, message, model, tokenizer, small):
    implementation = model.config._attn_implementation
    with pytest.raises(KVPolicyError, match=message):
        ContextCache(small(budget=300, **changes), model, tokenizer, CONTEXT, **options)
    assert model.config._attn_implementation == implementation


def test_arguments_in_another_order_are_told_the_order(model, tokenizer):
    with pytest.raises(
        UnsupportedError, match=r"model: \w+ is no model of transformers; the order is ContextCache\(policy, model, tok"
    ):
        ContextCache(model, tokenizer, CONTEXT, "snapkv-prefill")
    with pytest.raises(UnsupportedError, match="tokenizer: str is no tokenizer; the order is ContextCache"):
        ContextCache("snapkv-prefill", model, CONTEXT, tokenizer)


def test_questions_and_arguments_that_make_no_sense(model, tokenizer, small):
    with ContextCache(small("snapkv-prefill", 48), model, tokenizer, CONTEXT, between="") as context:
        for question, message in (
            ("", "question: is empty"),
            ([], "at least one"),
            (["a", 3], "at least one"),
            (["a", ""], "question 2 of 2: is empty"),
        ):
            with pytest.raises(CacheStateError, match=message):
                context.ask(question)
        for name in ("past_key_values", "cache", "use_cache", "input_ids", "max_length"):
            with pytest.raises(UnsupportedError, match=f"{name}: comes from the context cache"):
                context.ask("a", **{name: 1})
    with pytest.raises(CacheStateError, match="this context cache is closed"):
        context.ask("a")
    with pytest.raises(CacheStateError, match="this context cache is closed"):
        context.conversation()
    assert context.stats().resident == 48
    with ContextCache(small("snapkv-prefill", 48), model, tokenizer, [CONTEXT, CONTEXT[:90]]) as several:
        with pytest.raises(CacheStateError, match="3 questions do not go with 2 contexts"):
            several.ask(QUESTIONS)
        with pytest.raises(UnsupportedError, match="conversation: there are several contexts"):
            several.conversation()


def test_a_cache_reads_one_context_from_its_beginning(model, compose, random_prompts):
    ids = torch.tensor(random_prompts(40))
    with PolicyCache(compose(), model) as cache:
        logits = cache.read(ids)
        assert logits.shape == (1, 256)
        assert cache.stats().resident == 24
        assert cache.engine.ledger.due({0: Incoming(1)}) == []
        with pytest.raises(CacheStateError, match="read: the cache has seen 40 tokens and the context has 40"):
            cache.read(ids)
    with PolicyCache(compose(), model) as cache, pytest.raises(CacheStateError, match="the context has 0"):
        cache.read(ids[:, :0])
