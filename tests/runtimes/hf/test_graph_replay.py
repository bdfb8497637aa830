"""A captured graph that is replayed: nothing of Python runs in it, as in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpolicy.errors import CacheStateError
from kvpolicy.runtimes.hf import PolicyCache


class Captured:
    """A backend of torch.compile that keeps the graph of a step and the tensors that it was run with."""

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        def run(*inputs):
            self.graph, self.inputs = graph, inputs
            return graph(*inputs)

        return run

    def replay(self):
        """Run the operations again on the same tensors; return the logits."""
        return next(each for each in self.graph(*self.inputs) if each.dim() == 3 and each.shape[1] == 1)


@pytest.fixture
def captured():
    torch.compiler.reset()
    yield Captured()
    torch.compiler.reset()


def test_replays_write_the_text_of_the_model_with_compactions_in_between(captured, tiny, small, random_prompts):
    policy, model, prompt = small("rkv"), tiny(), torch.tensor(random_prompts(20))
    with torch.no_grad(), PolicyCache(policy, model) as cache:
        output, expected = model(prompt, past_key_values=cache), []
        for _ in range(50):
            expected.append(int(output.logits[0, -1].argmax()))
            output = model(torch.tensor([[expected[-1]]]), past_key_values=cache)
        kept = cache.kept(1, 0)
    with torch.no_grad(), PolicyCache(policy, model, graph=True) as cache:
        token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        texts = [int(token)]
        step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=captured)
        logits = step(token, past_key_values=cache).logits
        for _ in range(49):
            token.copy_(logits[:, -1:].argmax(-1))
            texts.append(int(token))
            cache.begin_step()
            logits = captured.replay()
            cache.end_step()
        assert texts == expected
        assert cache.kept(1, 0) == kept
        assert cache.engine.rows[0].compactions == 5


def test_a_replay_that_is_not_told_of_is_refused_and_not_overwritten(tiny, small, random_prompts):
    model, prompt = tiny(), torch.tensor(random_prompts(20))
    with torch.no_grad(), PolicyCache(small("rkv"), model, graph=True) as cache:
        with pytest.raises(CacheStateError, match="end_step: no step is open"):
            cache.end_step()
        model(prompt, past_key_values=cache)
        cache.begin_step()
        with pytest.raises(CacheStateError, match="begun before has not run; run it, and call end_step"):
            cache.begin_step()
        cache.end_step()
        with pytest.raises(CacheStateError, match="end_step: no step is open"):
            cache.end_step()
        cache.begin_step()
        cache.end_step()
        assert cache.stats().seen == 22
    with torch.no_grad(), PolicyCache(small("rkv"), model) as cache:
        model(prompt, past_key_values=cache)
        with pytest.raises(CacheStateError, match="end_step: no step is open"):
            cache.end_step()
