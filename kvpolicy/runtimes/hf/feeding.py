"""How a cache is filled before `generate`, or instead of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvpolicy.runtimes.hf.prompts import feed_prompt, read_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvpolicy.policy.policy import Policy
    from kvpolicy.runtimes.hf.passes import Passes


class FedCache:
    """What a `PolicyCache` does with a prompt, or a context, that it is given."""

    policy: Policy
    model: PreTrainedModel
    _passes: Passes

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, chunk: int | None = None) -> None:
        """Run a prompt through the model, all but its end, which is left to ``model.generate``.

        Without chunks that is one forward pass, and the last token is left. With chunks the last chunk is; boundaries
        are counted from the prompt's end, so that a padded row is cut like the row alone. Compactions take place in
        between as the policy says.

        Args:
            input_ids: int64 `[B, P]`, the prompt, left-padded where rows differ.
            attention_mask: `[B, P]`, 0 for padding.
            chunk: tokens per forward pass; the policy's `prefill_chunk` by default.

        Raises:
            CacheStateError: the chunk is no size, or the cache has seen as many tokens.
            UnsupportedError: the policy needs the prompt in one piece.
        """
        size = self.policy.prefill_chunk if chunk is None else chunk
        feed_prompt(self.model, self, self._passes, input_ids, attention_mask, size)

    def prefill_chunks(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Run a prompt in the chunks that the policy declares, all but the last one; nothing if it declares none.

        For callers that run the rest of the prompt themselves; arguments and exceptions are those of `prefill`.
        """
        if self.policy.prefill_chunk is not None:
            self.prefill(input_ids, attention_mask)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """Read a context to its end and compress it to the policy's budget; return its last logits `[B, V]`.

        Whatever trigger and phase say, rows above their budget are compacted when the context has been read and, with
        chunks, after each, so that no more than budget and chunk are held. A question that is not to be part of the
        prompt comes after `expect("decode")`.

        Args:
            input_ids: int64 `[B, C]`, left-padded where rows differ.
            attention_mask: `[B, C]`, 0 for padding.
            chunk: tokens per forward pass; the policy's `prefill_chunk` by default.

        Raises:
            CacheStateError: the chunk is no size, or the cache has seen something.
            UnsupportedError: the policy pins the prompt, works while decoding only, or needs the context in one piece.
        """
        size = self.policy.prefill_chunk if chunk is None else chunk
        return read_context(self.model, self, self._passes, input_ids, attention_mask, size)

    def compact(self) -> None:
        """Compact every row that holds more than its budget, now, whatever trigger and phase say."""
        self._passes.compact()
