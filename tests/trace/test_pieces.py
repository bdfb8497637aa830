from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvpolicy.trace.pieces import PART, pieces


def joined(texts):
    return "".join(text for text in texts if text != PART)


@pytest.mark.parametrize(
    "text",
    [
        "plain words, and  two blanks",
        "<script>alert(1)</script>\n\n\tindented",
        "naïve 日本語 — 👩‍👩‍👧 and 🏳️‍🌈!",
        "  leading",
    ],
)
def test_the_pieces_are_the_text(smollm2, text):
    tokenizer = smollm2[1]
    tokens = tokenizer(text)["input_ids"]
    texts, special = pieces(tokenizer, tokens)
    assert len(texts) == len(tokens)
    assert joined(texts) == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert all(texts)
    assert not special
    assert "�" not in joined(texts)


def test_special_tokens_are_marked(smollm2):
    tokenizer = smollm2[1]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hé 🙂"}], add_generation_prompt=True)
    tokens = prompt if isinstance(prompt, list) else prompt["input_ids"]
    texts, special = pieces(tokenizer, tokens)
    assert joined(texts) == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert {texts[i] for i in special} == {"<|im_start|>", "<|im_end|>"}


class Bytes:
    """A tokenizer whose tokens are bytes, and whose texts begin without a blank, as those of sentencepiece do."""

    all_special_ids = (256,)

    def decode(self, tokens, **_):
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace").removeprefix(" ")


def test_characters_of_several_tokens_stand_at_the_last_one():
    texts, special = pieces(Bytes(), [*"a é".encode(), 256, *"🙂b".encode()])
    assert texts == ["a", " ", PART, "é", "[256]", PART, PART, PART, "🙂", "b"]
    assert special == [4]


def test_what_never_becomes_a_character_is_shown_as_it_is():
    assert pieces(Bytes(), [97, 0xF0, 256, 98])[0] == ["a", "�", "[256]", "b"]
    assert pieces(Bytes(), [97, 0xF0])[0] == ["a", "�"]
    broken = [0x80] * 20
    texts, _ = pieces(Bytes(), broken)
    assert len(texts) == 20
    assert any("�" in text for text in texts)


def test_a_token_without_text_can_be_pointed_at():
    silent = SimpleNamespace(all_special_ids=(), decode=lambda tokens, **_: "x" * (len(tokens) - tokens.count(0)))
    assert pieces(silent, [1, 0, 1])[0] == ["x", PART, "x"]
