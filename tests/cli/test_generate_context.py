"""`kvpolicy generate --context FILE`: a text is compressed once, then questions about it are answered."""

from __future__ import annotations

import re

import pytest

import kvpolicy
from kvpolicy.cli import main
from kvpolicy.testing.tiny import tiny_folder

TEXT = "the cat sat on a mat and then it ran away from the big dog who was not amused at all by it. " * 3
POLICY = ("--policy", "snapkv-prefill", "--budget", "48")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(
        tmp_path_factory.mktemp("models") / "tiny", "qwen3", eos_token_id=None, max_position_embeddings=400
    )


@pytest.fixture
def run(capsys, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)

    def call(*arguments):
        code = main(["generate", "--model", str(folder), "--device", "cpu", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def answers_of(folder, questions, tokens, **options):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvpolicy.runtimes.hf import ContextCache

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with ContextCache(kvpolicy.load("snapkv-prefill", 48), model, tokenizer, TEXT, **options) as context:
        return context.ask(questions, max_new_tokens=tokens), context.stats()


def test_every_question_is_answered_from_the_context_and_the_peak_is_shown(run, folder):
    questions = ["who sat?", "why?"]
    code, out, err = run("--context", "text.txt", "--chunk", 40, *POLICY, "--max-new-tokens", 12, *questions)
    assert (code, err) == (0, "")
    wanted, stats = answers_of(folder, questions, 12, chunk=40)
    for question, answer in zip(questions, wanted, strict=True):
        assert f"> {question}\n{answer}" in out
    cells = dict(re.findall(r"^│ (.*?) +│ +(\S.*?) │$", out, flags=re.MULTILINE))
    assert cells["new tokens"] == "24"
    assert cells["KV entries per head, peak"] == str(stats.peak_resident) == "88"
    assert cells["KV bytes peak"] == f"{stats.bytes_peak / 2**20:,.2f} MiB"


def test_policies_are_compared_and_one_that_did_nothing_says_so(run):
    code, out, err = run(
        "--context", "text.txt", "--policy", "snapkv-prefill", "--budget", 300, "--compare", "full", "who?",
        "--max-new-tokens", 4,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "snapkv-prefill / full" in out
    assert "The context was not compressed: 278 tokens do not exceed the 300 entries that policy" in " ".join(
        out.split()
    )


def test_an_answer_is_as_long_as_the_positions_allow_unless_one_says_how_long(run):
    code, out, _ = run("--context", "text.txt", *POLICY, "who?")
    assert code == 0
    assert re.search(r"new tokens +│ +118 ", out)
    code, _, err = run("--context", "text.txt", *POLICY, "--max-new-tokens", 119, "who?")
    assert code == 1
    assert "there is room for 118 of the 119 that are asked for" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "b"), "generate: 2 prompts without a context; give one PROMPT, or name a text with --context FILE."),
        (("--chunk", 5, "a"), "generate: --chunk without a context;"),
        (("--context", "no.txt", "a"), "--context: no.txt: there is no such file."),
        (("--context", "empty.txt", "a"), "--context: 'empty.txt' is empty;"),
        (("--context", "text.txt", "a", " "), "question 2 of 2 is empty;"),
        (("--context", "text.txt", "--chat", "a"), "--chat: this model's tokenizer has no chat template;"),
        (("--context", "text.txt", "--policy", "recent-pinned", "a"), "pins the prompt, which the context would be"),
        (("--context", "text.txt", "--policy", "compactor", "--chunk", 9, "a"), "needs the context in one piece"),
        (("--context", "long.txt", "a"), "context: makes a text of 554 tokens, and the model has 400 positions"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, run, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "long.txt").write_text(TEXT * 2)
    code, _, err = run(*arguments)
    assert code == 1
    assert message in " ".join(err.split())
    assert "Traceback" not in err
