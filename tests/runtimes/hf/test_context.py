"""A context is compressed once, and every question starts from a copy of it."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, TextStreamer

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf import ContextCache, PolicyCache
from kvpolicy.testing.tiny import tiny_model
from kvsupport.contexts import CONTEXT, QUESTIONS, held, plain, same


@pytest.fixture
def model(tiny):
    return tiny("qwen3")


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt_oss", "qwen3_next", "smollm3"])
def test_with_the_full_cache_it_is_plain_generation(family, tiny, tokenizer):
    model = tiny(family, attention="eager" if family == "gpt_oss" else None)
    with ContextCache("full", model, tokenizer, CONTEXT) as context:
        for reply, question in zip(context.reply(QUESTIONS, max_new_tokens=12), QUESTIONS, strict=True):
            assert context.prompt(question) == CONTEXT + "\n\n" + question
            assert reply.tokens == plain(model, tokenizer, context.prompt(question))
            assert reply.text == tokenizer.decode(reply.tokens, skip_special_tokens=True)
            assert reply.prompt_tokens == len(context.prompt(question))


@pytest.mark.parametrize("name", ["snapkv-prefill", "rkv", "h2o", "adakv-snapkv", "compactor", "finch", "keydiff"])
@pytest.mark.parametrize("chunk", [None, 64])
def test_a_question_is_answered_as_behind_a_context_compressed_alone(name, chunk, model, tokenizer, small):
    policy = small(name, 48)
    chunk = policy.prefill_chunk or (None if policy.traits.whole_prompt else chunk)
    with ContextCache(policy, model, tokenizer, CONTEXT, chunk=chunk) as context:
        before = held(context.cache)
        got = context.reply(QUESTIONS, max_new_tokens=20)
        assert same(held(context.cache), before), "a question changed what others start from"
        assert context.stats().compactions >= 1
    for question, reply in zip(QUESTIONS, got, strict=True):
        ids = torch.tensor([tokenizer(CONTEXT + "\n\n" + question)["input_ids"]])
        cut = context.tokens[0]
        with PolicyCache(policy, model) as cache, torch.no_grad():
            ends = range(cut - (cut - 1) // (chunk or cut) * (chunk or cut), cut + 1, chunk or cut)
            start = 0
            for end in ends:
                cache._passes.prompt_end = cut
                model(ids[:, start:end], past_key_values=cache, use_cache=True)
                cache.compact()
                start = end
            cache.expect("decode")
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, max_new_tokens=20
            )
            assert tuple(out[0, ids.shape[1] :].tolist()) == reply.tokens
            assert cache.stats().resident == reply.stats.resident
            assert cache.stats().peak_resident == reply.stats.peak_resident


def test_neither_order_nor_number_of_questions_matters(model, tokenizer, small):
    with ContextCache(small("rkv", 48), model, tokenizer, CONTEXT) as context:
        together = context.ask(QUESTIONS, max_new_tokens=30)
        alone = [context.ask(question, max_new_tokens=30) for question in reversed(QUESTIONS)]
        assert together == alone[::-1]
        assert isinstance(alone[0], str)
        assert len(set(together)) == 3


def test_a_batch_of_questions(tokenizer, small):
    for family in ("qwen3", "gemma3"):  # the second has layers with a window, where a gap would be one in time
        model = tiny_model(family).double()
        with ContextCache(small("snapkv-prefill", 48), model, tokenizer, CONTEXT) as context:
            alone = context.ask(QUESTIONS, max_new_tokens=10)
            for batch in (2, 3, 9):
                assert context.ask(QUESTIONS, max_new_tokens=10, batch=batch) == alone, family
    with pytest.raises(CacheStateError, match="batch: 0 questions cannot run together"):
        ContextCache(small("full"), model, tokenizer, CONTEXT).ask(QUESTIONS, batch=0)


@pytest.mark.parametrize("name", ["snapkv-prefill", "adakv-snapkv", "rkv"])
def test_contexts_of_unequal_lengths_are_read_as_one_batch(name, tokenizer, small):
    texts = [CONTEXT, CONTEXT[:110], CONTEXT[5:200]]
    for family in ("qwen3", "gemma3"):
        model, policy = tiny_model(family).double(), small(name, 64)
        with ContextCache(policy, model, tokenizer, texts, chunk=50) as context:
            got = context.ask(QUESTIONS, max_new_tokens=10)
            same_question = context.ask(QUESTIONS[0], max_new_tokens=10)
            assert context.tokens == [len(text) + 2 for text in texts]
        for text, question, answer, other in zip(texts, QUESTIONS, got, same_question, strict=True):
            with ContextCache(policy, model, tokenizer, text, chunk=50) as single:
                assert single.ask(question, max_new_tokens=10) == answer
                assert single.ask(QUESTIONS[0], max_new_tokens=10) == other


def test_sampling_several_samples_beams_and_streaming(model, tokenizer, small, capsys):
    with ContextCache(small("snapkv-prefill", 48), model, tokenizer, CONTEXT) as context:
        torch.manual_seed(1)
        samples = context.ask(QUESTIONS[:2], max_new_tokens=8, do_sample=True, num_return_sequences=3)
        assert [len(each) for each in samples] == [3, 3]
        assert len({*samples[0], *samples[1]}) == 6
        greedy, beam = (context.reply(QUESTIONS[0], max_new_tokens=8, num_beams=n) for n in (1, 2))
        assert len(beam.tokens) == 8
        capsys.readouterr()
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        assert context.ask(QUESTIONS[0], max_new_tokens=8, streamer=streamer) == greedy.text
        assert capsys.readouterr().out.strip("\n") == greedy.text


def test_an_answer_ends_at_its_end_token_and_may_be_begun(model, tokenizer, small):
    with ContextCache(small("snapkv-prefill", 48), model, tokenizer, CONTEXT) as context:
        whole = context.reply(QUESTIONS[0], max_new_tokens=12)
        ends = whole.tokens[5]
        first = whole.tokens.index(ends)
        ended = context.reply(QUESTIONS, max_new_tokens=12, eos_token_id=ends, batch=3)[0]
        assert ended.tokens == whole.tokens[: first + 1]
        config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert context.reply(QUESTIONS[0], generation_config=config).tokens == whole.tokens[:3]
        assert config.pad_token_id is None  # the caller's stays as it is
        begun = context.reply(QUESTIONS[0], max_new_tokens=4, answer_prefix=" It was")
        assert begun.prompt_tokens == whole.prompt_tokens + 7
        with PolicyCache(small("full"), model):
            assert context.ask(QUESTIONS[0] + " It was", max_new_tokens=4) == begun.text


# -- memory -----------------------------------------------------------------------------------------------------------


def test_chunks_bound_what_is_held_and_memory_is_given_back(model, tokenizer, small):
    text = CONTEXT * 4
    policy = small("snapkv-prefill", 48)
    with (
        ContextCache(policy, model, tokenizer, text) as whole,
        ContextCache(policy, model, tokenizer, text, chunk=32) as pieces,
    ):
        assert whole.stats().peak_resident == whole.stats().seen == len(text) + 2
        stats = pieces.stats()
        assert stats.peak_resident == 48 + 32
        assert stats.resident == 48
        assert stats.bytes_peak * 48 == stats.bytes_resident * 80
        for each in (whole, pieces):  # of a policy without a bound, too
            assert each.stats().bytes_allocated == each.stats().bytes_resident
        with pieces.cache.fork() as own:
            assert own.stats().bytes_allocated == stats.bytes_resident
        reply = pieces.reply(QUESTIONS[1], max_new_tokens=40)
        assert reply.stats.peak_resident == reply.stats.resident == 48 + len(QUESTIONS[1]) + 39


def test_a_policy_that_decodes_goes_on_in_the_answer(model, tokenizer, small):
    policy = small("rkv", 48, 8)
    with ContextCache(policy, model, tokenizer, CONTEXT, chunk=32) as context:
        reply = context.reply(QUESTIONS[0], max_new_tokens=100)
    assert reply.stats.compactions > context.stats().compactions
    assert reply.stats.peak_resident == 48 + 32
    assert reply.stats.resident <= 48 + 8


# -- chat -------------------------------------------------------------------------------------------------------------


def test_context_and_question_share_a_message(model, chat):
    with ContextCache("full", model, chat, CONTEXT) as context:
        wanted = chat.apply_chat_template(
            [{"role": "user", "content": CONTEXT + "\n\n" + QUESTIONS[0]}], add_generation_prompt=True, tokenize=False
        )
        assert context.prompt(QUESTIONS[0]) == wanted
        assert context.tokens == [len(chat("<user>" + CONTEXT + "\n\n")["input_ids"])]
        assert context.reply(QUESTIONS[0], max_new_tokens=12).tokens == plain(model, chat, wanted)
    with ContextCache("full", model, chat, CONTEXT, chat=False) as context:
        assert context.prompt("x") == CONTEXT + "\n\nx"


def test_messages_are_a_context_too(model, chat):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": CONTEXT},
                {"role": "assistant", "content": "i have read it."}]  # fmt: skip
    with ContextCache("full", model, chat, messages) as context:
        assert context.prompt("who?").endswith("i have read it.</s><user>who?</s><assistant>")
        assert context.reply("who?", max_new_tokens=9).tokens == plain(model, chat, context.prompt("who?"), 9)
    chat.chat_template = None
    with pytest.raises(UnsupportedError, match="context: messages need a chat template"):
        ContextCache("full", model, chat, messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}{{ messages[0].content }}", "writes a message 2 times"),
        ("nothing", "writes a message 0 times"),
        ("{{ messages[0].content | length }}:{{ messages[0].content }}", "writes the context differently"),
        ("{{ raise_exception('only systems') }}", r"refuses these messages \(only systems\)"),
    ],
)
def test_templates_that_cannot_be_split_are_refused(template, message, model, chat):
    chat.chat_template = template
    with pytest.raises(UnsupportedError, match=message), ContextCache("full", model, chat, CONTEXT) as context:
        context.ask("a question", max_new_tokens=2)
