"""Questions that follow each other, each after the answers before it."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf.answering import (
    Reply,
    answers_each,
    check_generation,
    end_tokens,
    generate_behind,
    new_tokens,
)
from kvpolicy.runtimes.hf.cache import PolicyCache
from kvpolicy.runtimes.hf.stats import CacheStats
from kvpolicy.runtimes.splitting import Beginning, Splitter


class Conversation:
    """Questions that follow each other, behind a context that was compressed once; made by `ContextCache.conversation`.

    What was generated stays in the cache as it was generated, thoughts included, also where a chat template would write
    an earlier answer without them.

    Attributes:
        cache: its cache.
    """

    def __init__(self, cache: PolicyCache, tokenizer: Any, splitter: Splitter, beginning: Beginning) -> None:
        self.cache, self.tokenizer = cache, tokenizer
        self._splitter, self._beginning = splitter, beginning
        self._tokens = list(beginning.ids)
        self._unread: list[int] = []  # the last token that was generated, which no forward pass has read
        self._ends: frozenset[int] = frozenset()
        self._turns, self._open = 0, True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach from the model; `stats` can still be read."""
        self._open = False
        self.cache.close()

    def stats(self) -> CacheStats:
        """Return what its cache holds, context and turns together."""
        return self.cache.stats()

    def ask(self, question: str, **options: Any) -> str:
        """Return the text of the answer; arguments and exceptions are those of `reply`."""
        return self.reply(question, **options).text

    def reply(
        self, question: str, *, max_new_tokens: int | None = None, answer_prefix: str = "", **generation: Any
    ) -> Reply:
        """Ask the next question; arguments as for `ContextCache.reply`.

        Raises:
            CacheStateError: the conversation is closed or was interrupted, or there is no room for the question.
            KVPolicyError: the chat template cannot go on behind an answer, or an argument is the cache's own.
        """
        if not self._open:
            raise CacheStateError("this conversation is closed; begin another one while its context is open.")
        wanted = check_generation(generation, max_new_tokens)
        if answers_each(self.cache.model, generation) > 1:
            raise UnsupportedError(
                "num_return_sequences and num_beams: a conversation goes on from one answer; leave them out."
            )
        if self.cache.get_seq_length() != len(self._tokens):
            raise CacheStateError("this conversation was interrupted in an answer; begin another one.")
        following = self._following(question, answer_prefix)
        if not following:
            raise CacheStateError("question: is empty, and nothing follows the context; write a question.")
        seen = len(self._tokens) + len(following)
        most = new_tokens(self.cache.model, self.cache.policy, seen, wanted, "question")
        past = torch.tensor([self._tokens], device=self.cache.model.device)
        (answer,) = generate_behind(self.cache, self.tokenizer, past, [following], most, generation)
        self._tokens += [*following, *answer[:-1]]
        self._unread, self._ends = answer[-1:], end_tokens(self.cache.model, generation)
        self._turns += 1
        return Reply.of(self.tokenizer, answer, seen, self.cache.stats())

    def _following(self, question: str, answer_prefix: str) -> list[int]:
        if not self._turns:
            return self._beginning.following(question, answer_prefix)
        turn = self._splitter.tokens(self._splitter.next_turn(question) + answer_prefix, first=False)
        # The template closes an answer itself; where it did not end, its last token still has to be read.
        return turn if self._unread[0] in self._ends and self._splitter.chat else [*self._unread, *turn]
