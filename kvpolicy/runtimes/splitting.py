"""Where a context ends and its question begins: in a chat template, and in tokens.

The context is read before the question is known, so its text and its tokens must not depend on what follows. A chat
template is asked, not parsed: a mark stands in for the question, and what the template writes before the mark is the
context. The whole prompt is then written by the template as well, and has to begin with that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvpolicy.errors import KVPolicyError, UnsupportedError

Context = str | Sequence[Mapping[str, Any]]
"""A text, which stands in one message with its question, or messages, which the question follows as one of its own."""

_PROBES: Final = ("What", "1", "(")  # beginnings of questions
_JOINED: Final = 16  # tokens at the end of a context that may be others when something follows


def uses_template(tokenizer: Any, chat: bool | None, option: str) -> bool:
    """Return whether a tokenizer's chat template is applied.

    Args:
        tokenizer: which may have one.
        chat: whether it is asked for; None means if there is one.
        option: what errors begin with.

    Raises:
        KVPolicyError: it is asked for and there is none.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise KVPolicyError(f"{option}: this model's tokenizer has no chat template; leave {option} out.")
    return has_template and chat is not False


class Splitter:
    """Writes prompts of which the beginning is always the same.

    Args:
        tokenizer: turns text into tokens and may have a chat template.
        chat: whether the chat template is applied; None means if there is one.
        between: what stands between a context that is a text and its question.
        options: further arguments of the chat template, such as ``enable_thinking``.
        option: what errors about `chat` begin with.

    Raises:
        KVPolicyError: a chat template is asked for and there is none.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool | None = None,
        between: str = "",
        options: Mapping[str, Any] | None = None,
        option: str = "chat",
    ) -> None:
        self.tokenizer, self.between, self.options = tokenizer, between, dict(options or {})
        self.chat = uses_template(tokenizer, chat, option)

    # -- text ---------------------------------------------------------------------------------------------------------

    def beginning(self, context: Context) -> str:
        """Return the text up to where the question begins; raises KVPolicyError where that cannot be said."""
        if not self.chat:
            return self._plain(context) + self.between
        mark = _mark(context)
        text = self._written(self._messages(context, mark))
        if text.count(mark) != 1:
            raise UnsupportedError(
                f"the chat template writes a message {text.count(mark)} times, so that context and question cannot be "
                "told apart; write chat=False, or give the tokenizer another chat_template."
            )
        return text.partition(mark)[0]

    def prompt(self, context: Context, question: str, beginning: str | None = None) -> str:
        """Return the whole text up to where the answer begins.

        Args:
            context: the context.
            question: what follows it.
            beginning: of `beginning`, if it is known.

        Raises:
            UnsupportedError: the chat template writes the context differently when the question is there.
        """
        if not self.chat:
            return self._plain(context) + self.between + question
        text = self._written(self._messages(context, question))
        if not text.startswith(self.beginning(context) if beginning is None else beginning):
            raise UnsupportedError(
                "the chat template writes the context differently when a question follows, so that it cannot be read "
                "before the question is known; write chat=False, or give the tokenizer another chat_template."
            )
        return text

    def next_turn(self, question: str) -> str:
        """Return what follows an answer in a conversation, up to where the next answer begins."""
        if not self.chat:
            return self.between + question
        mark = _mark(question)
        turns = (("user", "question"), ("assistant", mark), ("user", question))
        text = self._written([{"role": role, "content": content} for role, content in turns])
        if text.count(mark) != 1:
            raise UnsupportedError(
                f"the chat template writes an answer {text.count(mark)} times, so that a conversation cannot go on "
                "from its cache; ask each question from the context, or give the tokenizer another chat_template."
            )
        return text.partition(mark)[2]

    def _messages(self, context: Context, question: str) -> list[dict[str, Any]]:
        if isinstance(context, str):
            return [{"role": "user", "content": context + self.between + question}]
        return [*map(dict, context), {"role": "user", "content": question}]

    def _plain(self, context: Context) -> str:
        if isinstance(context, str):
            return context
        raise UnsupportedError("context: messages need a chat template, and none is applied; give a text.")

    def _written(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.options
            )
        except Exception as error:  # a template may raise whatever it likes
            lines = str(error).splitlines()
            reason = lines[0][:200].rstrip(".") if lines else type(error).__name__
            raise UnsupportedError(
                f"the chat template refuses these messages ({reason}); write chat=False, or other messages."
            ) from error
        return text

    # -- tokens -------------------------------------------------------------------------------------------------------

    def tokens(self, text: str, *, first: bool = True) -> list[int]:
        """Return the tokens of a text; `first` for one that begins a prompt."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=first and not self.chat)["input_ids"]
        return ids

    def begin(self, context: Context) -> Beginning:
        """Return the tokens of a context that stay the same whatever question follows.

        The last ones of the text may merge with what follows; they are left to the question.

        Raises:
            KVPolicyError: the template or the tokenizer cannot be split.
        """
        text = self.beginning(context)
        ids = self.tokens(text)
        stay = min(_common(ids, self.tokens(text + probe)) for probe in _PROBES)
        return Beginning(self, context, text, ids[: _checked(stay, len(ids))], ids[stay:])

    def length_in(self, ids: Sequence[int], context: str, prompt: str) -> int:
        """Return how many of a prompt's tokens belong to its context.

        Args:
            ids: tokens of the prompt, as the chat template writes it if it is applied.
            context: what the prompt begins with.
            prompt: the prompt as a user writes it.
        """
        if not context or not prompt.startswith(context):
            raise KVPolicyError("the prompt does not begin with the context; a context stands before its question.")
        beginning = self.beginning(context)
        self.prompt(context, prompt[len(context) :], beginning)
        own = self.tokens(beginning)
        return min(_checked(_common(own, ids), len(own)), len(ids) - 1)  # something has to follow


class Beginning:
    """A context in text and tokens; made by `Splitter.begin`.

    Attributes:
        ids: its tokens.
    """

    def __init__(self, splitter: Splitter, context: Context, text: str, ids: list[int], tail: list[int]) -> None:
        self.ids = ids
        self._splitter, self._context, self._text, self._tail = splitter, context, text, tail

    def prompt(self, question: str, answer_prefix: str = "") -> str:
        """Return the whole text that a question makes, with the beginning of the answer."""
        return self._splitter.prompt(self._context, question, self._text) + answer_prefix

    def following(self, question: str, answer_prefix: str = "") -> list[int]:
        """Return the tokens behind `ids`: together they are those of the whole text, where tokens can be cut."""
        whole = self.prompt(question, answer_prefix)
        ids = self._splitter.tokens(whole)
        if ids[: len(self.ids)] == self.ids:
            return ids[len(self.ids) :]
        return [*self._tail, *self._splitter.tokens(whole[len(self._text) :], first=False)]


def _mark(context: Context) -> str:
    """Return a word that a text does not contain."""
    text, number = str(context), 0
    while (mark := f"Qmark{number}Q") in text:
        number += 1
    return mark


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _checked(stay: int, own: int) -> int:
    if stay < max(1, own - _JOINED):
        raise UnsupportedError(
            f"the tokenizer writes only {stay} of the context's {own} tokens as it does when a question follows, so "
            "that it cannot be read before the question is known; use another tokenizer."
        )
    return stay
