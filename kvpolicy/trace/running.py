"""Runs a model under a policy with a recorder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf import generate as generate_under
from kvpolicy.study.decoding import Prompts, forward
from kvpolicy.study.forcing import room
from kvpolicy.trace.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from kvpolicy.trace.recording import Recording


def record_generation(
    model: Any,
    inputs: Mapping[str, Tensor],
    policy: Policy,
    *,
    stream: Callable[[PolicyCache], AbstractContextManager[Any]] | None = None,
    snapshots: int | None = None,
    **kwargs: Any,
) -> tuple[list[int], Recording]:
    """Generate a text and record what the policy kept of it.

    Args:
        model: a decoder of transformers.
        inputs: one row, as for ``model.generate``.
        policy: what to do with the cache.
        stream: makes a streamer for ``model.generate`` out of the cache.
        snapshots: as for `Recorder`.
        kwargs: passed on to ``model.generate``.

    Returns:
        All tokens, the prompt's too, and the recording; the last token has not gone into the cache.

    Raises:
        KVPolicyError: the policy does not fit the model or the prompt.
    """
    recorder = Recorder() if snapshots is None else Recorder(snapshots)
    with PolicyCache(recorder.watch(policy), model) as cache:
        with nullcontext() if stream is None else stream(cache) as streamer:
            output, _ = generate_under(model, inputs, cache, streamer=streamer, **kwargs)
        return output[0].tolist(), recorder.recording(cache)


def record_reading(
    model: Any,
    tokens: Sequence[int],
    prompt: int,
    policy: Policy,
    *,
    snapshots: int | None = None,
    step: Callable[[int], None] | None = None,
) -> Recording:
    """Read a given text as if the model had generated it, and record what the policy kept of it.

    Tokens are read in blocks that end where the policy's trigger may fire; compactions are those of reading one by one.

    Args:
        model: a decoder of transformers.
        tokens: token ids, all of which go into the cache.
        prompt: how many of them are the prompt, at least 1.
        policy: what to do with the cache.
        snapshots: as for `Recorder`.
        step: called with the number of tokens read so far.

    Raises:
        KVPolicyError: the policy does not fit the model or the prompt.
    """
    recorder = Recorder() if snapshots is None else Recorder(snapshots)
    with torch.inference_mode(), PolicyCache(recorder.watch(policy), model) as cache:
        Prompts([tokens[:prompt]], model.device).run(model, cache)
        at = prompt
        while at < len(tokens):
            count = min(room(cache), len(tokens) - at)
            cache.expect("verify")  # what follows is decoding, however many tokens come at once
            ids = torch.tensor([tokens[at : at + count]], device=model.device)
            places = torch.arange(at, at + count, device=model.device)[None]
            forward(model, cache, ids, places, None)
            at += count
            if step is not None:
                step(at)
        return recorder.recording(cache)
