"""The task ``kv-context-generation`` of transformers' pipelines."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import AutoTokenizer, pipeline

import kvpolicy
from kvpolicy.errors import CacheStateError, SpecError, UnsupportedError
from kvpolicy.runtimes.hf import ContextCache
from kvpolicy.runtimes.hf.pipeline import TASK, ContextPipeline
from kvpolicy.testing.tiny import tiny_folder
from kvsupport.contexts import CHATML, CONTEXT, QUESTIONS

SAID = {"policy": "snapkv-prefill", "budget": 48, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "tiny", "qwen3")
    made = pipeline(TASK, model=str(folder), device="cpu")
    assert isinstance(made, ContextPipeline)
    made.model.generation_config.eos_token_id = None
    return made


def asked(answers, question, context=CONTEXT, **options):
    policy = kvpolicy.load("snapkv-prefill", 48)
    with ContextCache(policy, answers.model, answers.tokenizer, context, **options) as cache:
        return cache.ask(question, max_new_tokens=8)


def test_one_question_several_questions_several_contexts(answers):
    assert answers(CONTEXT, question=QUESTIONS[0], **SAID) == {"answer": asked(answers, QUESTIONS[0])}
    assert answers(CONTEXT, questions=QUESTIONS, **SAID) == {"answers": asked(answers, QUESTIONS)}
    contexts = [CONTEXT, CONTEXT[30:]]
    wanted = [{"answers": asked(answers, QUESTIONS[:2], context)} for context in contexts]
    assert answers(contexts, questions=QUESTIONS[:2], **SAID) == wanted
    assert list(answers((c for c in contexts), questions=QUESTIONS[:2], **SAID)) == wanted
    alone = [{"answer": each["answers"][0]} for each in wanted]
    assert answers(contexts, question=QUESTIONS[0], **SAID) == alone
    answers.model.double()
    try:
        wanted = [{"answers": asked(answers, QUESTIONS[:2], context)} for context in contexts]
        assert answers(contexts, questions=QUESTIONS[:2], batch_size=2, **SAID) == wanted
        alone = [{"answer": each["answers"][0]} for each in wanted]
        assert answers(contexts, question=QUESTIONS[0], batch_size=2, **SAID) == alone
    finally:
        answers.model.float()


def test_arguments_of_the_pipeline_hold_for_every_call_that_gives_none(answers):
    made = ContextPipeline(answers.model, answers.tokenizer, task=TASK, device="cpu", question=QUESTIONS[0], **SAID)
    assert made(CONTEXT) == answers(CONTEXT, question=QUESTIONS[0], **SAID)
    assert made(CONTEXT, questions=QUESTIONS[1:]) == answers(CONTEXT, questions=QUESTIONS[1:], **SAID)
    full = made(CONTEXT, policy="full", budget=None, answer_prefix=" It", chunk=50)
    assert full != made(CONTEXT)


def test_messages_and_options_reach_the_context(answers):
    answers.tokenizer.chat_template = CHATML
    try:
        messages = [{"role": "system", "content": CONTEXT}]
        said = {**SAID, "policy": kvpolicy.load("snapkv-prefill"), "question": QUESTIONS[0]}
        assert answers(messages, **said) == {"answer": asked(answers, QUESTIONS[0], messages)}
        told = answers(CONTEXT, chat=False, between=" ", **said)
        assert told == {"answer": asked(answers, QUESTIONS[0], chat=False, between=" ")}
    finally:
        answers.tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, CacheStateError, "question: is missing"),
        ({"question": "a", "questions": ["b"]}, CacheStateError, "both are given; give one of them"),
        ({"question": ["a"]}, CacheStateError, "question: should be a text"),
        ({"questions": "a"}, CacheStateError, "questions: should be a list of texts"),
        ({"question": "a", "press": 1}, UnsupportedError, "press: a press is a policy here"),
        ({"question": "a", "compression_ratio": 0.5}, UnsupportedError, "the share that stays"),
        ({"question": "a", "max_context_length": 5}, UnsupportedError, "refused rather than cut"),
        ({"question": "a", "policy": "full", "budget": 0.5}, SpecError, "write policy=... beside it"),
        ({"question": "a", "policy": kvpolicy.load("full").build(), "budget": 5}, SpecError, "has one already"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(options, error, message, answers):
    with pytest.raises(error, match=message):
        answers(CONTEXT, **options)


def test_the_task_is_there_when_the_module_is_imported_and_not_before():
    code = (
        "import kvpolicy.runtimes.hf\n"
        "from transformers.pipelines import PIPELINE_REGISTRY as r\n"
        f"assert {TASK!r} not in r.get_supported_tasks()\n"
        "import kvpolicy.runtimes.hf.pipeline\n"
        f"assert {TASK!r} in r.get_supported_tasks()\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=300)


def test_a_pipeline_can_be_made_of_a_model_and_its_tokenizer(answers, tmp_path):
    answers.model.save_pretrained(tmp_path)
    answers.tokenizer.save_pretrained(tmp_path)
    made = pipeline(TASK, model=answers.model, tokenizer=AutoTokenizer.from_pretrained(tmp_path), device="cpu")
    assert made(CONTEXT, question="who?", max_new_tokens=3)["answer"]
