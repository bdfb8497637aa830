"""Token ids as pieces of text that can be shown one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PART = "◌"
"""What stands for a token that holds only a part of a character; the last of its tokens has the character."""

_MOST = 8  # tokens that can make one character: a byte-level emoji has four bytes
_BROKEN = "�"


def pieces(tokenizer: Any, tokens: Sequence[int]) -> tuple[list[str], list[int]]:
    """Return the text of each token, and which tokens are special.

    A tokenizer may write a token differently at the start of a text, and spread a character over several tokens; so
    each one is what it adds to the text of the few before it.

    Args:
        tokenizer: of transformers.
        tokens: token ids.

    Returns:
        One text per token, never empty, and the indices of special tokens.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special_ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    texts: list[str] = []
    special: list[int] = []
    before = start = 0  # the text of tokens[before:start] is known; those from `start` on have not been written yet

    for i, token in enumerate(tokens):
        if token in special_ids:
            if start < i:
                texts[-1] = _decoded(tokenizer, tokens[start:i])
            special.append(i)
            texts.append(_decoded(tokenizer, [token]) or f"[{token}]")
            before = start = i + 1
            continue
        known, text = _decoded(tokenizer, tokens[before:start]), _decoded(tokenizer, tokens[before : i + 1])
        new = text[len(known) :] if text.startswith(known) else _decoded(tokenizer, tokens[start : i + 1])
        if new.endswith(_BROKEN) and i + 1 - start < _MOST and i + 1 < len(tokens):
            texts.append(PART)
            continue
        texts.append(new or PART)
        before, start = start, i + 1
    return texts, special


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    if not tokens:
        return ""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
