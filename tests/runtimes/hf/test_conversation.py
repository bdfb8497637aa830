"""Questions that follow each other behind a compressed context."""

from __future__ import annotations

import pytest

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf import ContextCache
from kvsupport.contexts import CONTEXT, QUESTIONS, held, plain, same


@pytest.fixture
def model(tiny):
    return tiny("qwen3")


@pytest.mark.parametrize("templated", [False, True])
def test_a_conversation_goes_on_from_its_own_answers(templated, model, tokenizer, request):
    if templated:
        request.getfixturevalue("chat")
    with ContextCache("full", model, tokenizer, CONTEXT) as context:
        before = held(context.cache)
        text, talk = "", context.conversation()
        for number, question in enumerate(QUESTIONS):
            reply = talk.reply(question, max_new_tokens=9)
            if templated:
                text += f"<user>{CONTEXT}\n\n{question}" if not number else f"</s><user>{question}"
                text += "</s><assistant>"
            else:
                text += (CONTEXT if not number else "") + "\n\n" + question
            ids = tokenizer(text)["input_ids"]
            assert reply.prompt_tokens == len(ids)
            assert reply.tokens == plain(model, tokenizer, text, 9)
            text += tokenizer.decode(reply.tokens)
        assert talk.stats().seen == reply.prompt_tokens + 8
        assert same(held(context.cache), before)
        other = context.conversation()
        assert other.ask(QUESTIONS[0], max_new_tokens=9) == context.ask(QUESTIONS[0], max_new_tokens=9)


def test_an_answer_that_ended_is_closed_by_the_template(model, chat):
    with ContextCache("full", model, chat, CONTEXT) as context, context.conversation() as talk:
        first = context.reply(QUESTIONS[0], max_new_tokens=9)
        end = first.tokens[4]
        reply = talk.reply(QUESTIONS[0], max_new_tokens=9, eos_token_id=end)
        cut = first.tokens[: first.tokens.index(end)]
        text = context.prompt(QUESTIONS[0]) + chat.decode(cut) + f"</s><user>{QUESTIONS[1]}</s><assistant>"
        assert reply.tokens == (*cut, end)
        assert talk.reply(QUESTIONS[1], max_new_tokens=9).tokens == plain(model, chat, text, 9)


def test_a_conversation_that_was_interrupted_or_cannot_go_on_is_refused(model, chat, small):
    with ContextCache(small("snapkv-prefill", 48), model, chat, CONTEXT) as context:
        talk = context.conversation()
        steps = iter(range(5))

        def hook(module, args):
            if next(steps, None) is None:
                raise KeyboardInterrupt

        handle = model.lm_head.register_forward_pre_hook(hook)
        with pytest.raises(KeyboardInterrupt):
            talk.ask("who?", max_new_tokens=20)
        handle.remove()
        with pytest.raises(CacheStateError, match="this conversation was interrupted in an answer"):
            talk.ask("who?")
        other = context.conversation()
        with pytest.raises(UnsupportedError, match="a conversation goes on from one answer"):
            other.ask("who?", num_beams=2)
        other.ask("who?", max_new_tokens=3)
        chat.chat_template = "{{ messages[-1].role }} {{ messages[-1].content }}"
        with pytest.raises(UnsupportedError, match="writes an answer 0 times"):
            other.ask("and then?")
    with pytest.raises(CacheStateError, match="this conversation is closed"):
        other.ask("who?")
