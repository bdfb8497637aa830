"""A context that is read and compressed once, and questions about it, each from a copy of what was kept."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf.answering import Reply, check_generation, generate_behind, new_tokens
from kvpolicy.runtimes.hf.cache import PolicyCache
from kvpolicy.runtimes.hf.conversation import Conversation
from kvpolicy.runtimes.hf.given import Amount, check_model, check_whole
from kvpolicy.runtimes.hf.layer import has_other_layers
from kvpolicy.runtimes.hf.model_facts import image_tokens
from kvpolicy.runtimes.hf.positions import check_length, positions_left
from kvpolicy.runtimes.hf.prompts import check_reads_contexts
from kvpolicy.runtimes.hf.stats import CacheStats
from kvpolicy.runtimes.splitting import Context, Splitter

if TYPE_CHECKING:
    from kvpolicy.spec import PolicySpec

_ORDER: Final = "ContextCache(policy, model, tokenizer, context)"

Replies = Reply | list[Reply]
"""One reply, or several samples of it (``num_return_sequences``)."""


class _Question(NamedTuple):
    """A question: the row of its context, the tokens that follow it, and how many new ones there may be."""

    row: int
    following: list[int]
    most: int


class ContextCache:
    """Reads a context, compresses it once to the policy's budget, and answers questions about it.

    ::

        with ContextCache("snapkv-prefill", model, tokenizer, text) as context:
            context.ask("Who wrote the letter?")
            context.ask(["When?", "To whom?"])

    Every question starts from a copy of what was kept, so that neither their order nor their number matters. The
    context is compressed whatever the policy's trigger and phase say, before any question is seen; question and answer
    come behind it as decoding does: a policy with ``phase: prefill`` keeps them whole, others go on by their trigger.

    Args:
        policy: a policy, specification, name or path.
        model: a decoder of transformers.
        tokenizer: its tokenizer.
        context: a text, which shares its message with the question; messages of a chat, which the question follows; or
            a list of texts, which are read as one batch.
        budget: takes the place of the policy's own, as in `kvpolicy.load`.
        chunk: tokens per forward pass, after each of which the cache is compressed, so that never more than budget and
            chunk are held; the policy's `prefill_chunk` by default, otherwise the context is read in one pass.
        between: what stands between a text and its question.
        chat: whether the chat template is applied; by default if there is one.
        template: further arguments of the chat template, such as ``{"enable_thinking": False}``.

    Attributes:
        cache: the cache that has read the context; `fork` it for a decoding loop of your own.
        tokens: how many tokens each context has, with what the chat template and `between` add to it.

    Raises:
        KVPolicyError: the context is empty or does not fit the model's positions, the chat template or tokenizer cannot
            be split at the question, or the policy cannot compress a context or does not fit the model.
    """

    def __init__(
        self,
        policy: Policy | PolicySpec | str | Path,
        model: PreTrainedModel,
        tokenizer: Any,
        context: Context | Sequence[str],
        *,
        budget: Amount | None = None,
        chunk: int | None = None,
        between: str = "\n\n",
        chat: bool | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        check_model(model, _ORDER)
        if not callable(tokenizer):
            raise UnsupportedError(f"tokenizer: {type(tokenizer).__name__} is no tokenizer; the order is {_ORDER}.")
        self.tokenizer = tokenizer
        self._splitter = Splitter(tokenizer, chat=chat, between=between, options=template)
        contexts, self._several = _contexts(context)
        self._conversations: WeakSet[Conversation] = WeakSet()
        self._open = True
        self.cache = PolicyCache(policy, model, budget=budget)
        try:
            policy = self.cache.policy
            for each in contexts:
                check_length(model, [policy], tokenizer, self._splitter.beginning(each), "context")
            self._beginnings = [self._splitter.begin(each) for each in contexts]
            self.tokens = [len(each.ids) for each in self._beginnings]
            check_reads_contexts(policy, chunk or policy.prefill_chunk)
            positions_left(model, policy, max(self.tokens), "context")
            width = max(self.tokens)
            rows = [[-1] * (width - len(each.ids)) + each.ids for each in self._beginnings]
            self._past = torch.tensor(rows, device=model.device)
            mask = None if len(set(self.tokens)) == 1 else (self._past >= 0).long()
            if "modality" in self.cache.policy.needs:  # a text has no images, unless it names them
                images = torch.tensor(image_tokens(model), dtype=self._past.dtype, device=model.device)
                self.cache.set_modality(torch.isin(self._past, images))
            self.cache.read(self._past.clamp(min=0), mask, chunk)
        except BaseException:
            self.cache.close()
            raise
        if self.untouched:
            warnings.warn(self.untouched, stacklevel=2)

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach from the model, conversations included; `stats` can still be read."""
        self._open = False
        for conversation in list(self._conversations):
            conversation.close()
        self.cache.close()

    def _check_open(self) -> None:
        if not self._open:
            raise CacheStateError("this context cache is closed; ask inside its `with` block, or make a new one.")

    # -- what it holds ------------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Return what was read and is kept of the context: entries and bytes, now and at their peak."""
        return self.cache.stats()

    @property
    def untouched(self) -> str:
        """A sentence if some context was not compressed, because it fits the budget; empty otherwise."""
        policy, rows = self.cache.policy, self.cache.engine.rows
        left = [row for row in rows if not row.compactions]
        if policy.budget.fraction == 1 or not left:
            return ""
        seen = max(row.seen for row in left)
        entries = policy.entries(seen, seen)
        which = "the context" if len(rows) == 1 else f"{len(left)} of {len(rows)} contexts"
        verb = "was" if len(left) == 1 else "were"
        return (
            f"{which} {verb} not compressed: {seen:,} tokens do not exceed the {entries:,} entries that policy "
            f"{policy.name!r} keeps of them; give a longer context or a smaller budget."
        )

    def prompt(self, question: str, answer_prefix: str = "") -> str:
        """Return the whole text that a question makes, as the model is given it, behind the first context."""
        return self._beginnings[0].prompt(question, answer_prefix)

    # -- questions ----------------------------------------------------------------------------------------------------

    def ask(self, question: str | Sequence[str], **options: Any) -> Any:
        """Return the text of the answer, or of several: a list where several are asked.

        Args:
            question: one question or several; with several contexts one for all of them, or one for each.
            **options: as for `reply`.

        Returns:
            A text for one question of one context, otherwise a list; with ``num_return_sequences`` above 1 a list of
            texts stands for each.
        """
        return _texts(self.reply(question, **options))

    def reply(
        self,
        question: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        answer_prefix: str = "",
        batch: int | None = None,
        **generation: Any,
    ) -> Any:
        """Answer as `ask` does, with tokens and statistics: `Reply` where that returns a text.

        Args:
            question: as for `ask`.
            max_new_tokens: most tokens of an answer; 256, or what the model's positions leave.
            answer_prefix: words that the answer begins with; they are not returned.
            batch: questions that run together, one by default: rows of a batch may differ from rows alone in the last
                bit. Several contexts run together by default.
            **generation: arguments of ``model.generate``: ``do_sample``, ``temperature``, ``streamer``, ...

        Raises:
            CacheStateError: the cache is closed, or a question or an answer of that length does not fit the positions.
            KVPolicyError: a question is no text, or an argument is the cache's own.
        """
        self._check_open()
        wanted = check_generation(generation, max_new_tokens)
        questions = self._questions(question)
        rows = range(len(questions)) if self._several else [0] * len(questions)
        items = []
        for number, (row, each) in enumerate(zip(rows, questions, strict=True)):
            following = self._beginnings[row].following(each, answer_prefix)
            what = "question" if len(questions) == 1 else f"question {number + 1} of {len(questions)}"
            if not following:
                raise CacheStateError(f"{what}: is empty, and nothing follows the context; write a question.")
            most = new_tokens(self.cache.model, self.cache.policy, self.tokens[row] + len(following), wanted, what)
            items.append(_Question(row, following, most))
        check_whole("batch", batch)
        size = batch if batch is not None else len(items) if self._several else 1
        if size < 1:
            raise CacheStateError(f"batch: {size} questions cannot run together; write at least 1.")
        found: dict[int, Replies] = {}
        for members in self._jobs(items, size):
            found |= dict(zip(members, self._run([items[i] for i in members], generation), strict=True))
        ordered = [found[i] for i in range(len(items))]
        return ordered if self._several or not isinstance(question, str) else ordered[0]

    def conversation(self) -> Conversation:
        """Return a conversation about the context: its questions follow each other, each after the answers before it.

        Raises:
            UnsupportedError: there are several contexts.
        """
        self._check_open()
        if self._several:
            raise UnsupportedError("conversation: there are several contexts; make a ContextCache for each of them.")
        made = Conversation(self.cache.fork(), self.tokenizer, self._splitter, self._beginnings[0])
        self._conversations.add(made)
        return made

    def _questions(self, question: str | Sequence[str]) -> list[str]:
        several = len(self._beginnings) if self._several else 1
        questions = [question] * several if isinstance(question, str) else list(question)
        if not questions or not all(isinstance(each, str) for each in questions):
            raise CacheStateError("question: should be a text or a list of at least one; write what is asked.")
        if self._several and len(questions) != several:
            raise CacheStateError(
                f"question: {len(questions)} questions do not go with {several} contexts; give one for all of them, or "
                "one for each."
            )
        return questions

    def _jobs(self, items: Sequence[_Question], size: int) -> Iterator[list[int]]:
        """Yield which questions run together: those of equal length where a row with a gap is not what it is alone."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        alike = has_other_layers(self.cache)
        for i, item in enumerate(items):
            groups[item.most, len(item.following) if alike else 0].append(i)
        for members in groups.values():
            for start in range(0, len(members), size):
                yield members[start : start + size]

    def _run(self, items: Sequence[_Question], generation: Mapping[str, Any]) -> list[Replies]:
        """Answer questions together, each behind the row of its context."""
        rows, following = [item.row for item in items], [item.following for item in items]
        with self.cache.fork() as own:
            if rows != list(range(len(self._beginnings))):
                own.batch_select_indices(torch.tensor(rows))
            past = self._past[torch.tensor(rows, device=self._past.device)]
            answers = generate_behind(own, self.tokenizer, past, following, items[0].most, generation)
            stats = own.stats()
        samples = len(answers) // len(rows)
        replies = [
            Reply.of(self.tokenizer, answer, self.tokens[rows[i // samples]] + len(following[i // samples]), stats)
            for i, answer in enumerate(answers)
        ]
        if samples == 1:
            return list(replies)
        return [replies[i : i + samples] for i in range(0, len(replies), samples)]


def _contexts(context: Context | Sequence[str]) -> tuple[list[Context], bool]:
    """Return the contexts, and whether they were given as a list of texts."""
    several = not isinstance(context, str) and bool(context) and all(isinstance(each, str) for each in context)
    contexts: list[Any] = list(context) if several else [context]
    for number, each in enumerate(contexts):
        which = f"context {number + 1} of {len(contexts)}" if several else "context"
        if not (each.strip() if isinstance(each, str) else each):
            raise CacheStateError(f"{which}: is empty; give the text that questions are asked about.")
    return contexts, several


def _texts(replies: Any) -> Any:
    return replies.text if isinstance(replies, Reply) else [_texts(each) for each in replies]
