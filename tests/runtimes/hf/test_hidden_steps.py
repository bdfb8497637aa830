"""A step of one token honours a mask that hides earlier tokens, as a step of several does."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvpolicy.errors import CacheStateError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.late import LateCheck
from kvpolicy.testing.tiny import tiny_model


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return tiny_model("llama", attention=request.param)


@pytest.fixture
def ids(random_prompts):
    return torch.tensor(random_prompts(30)).repeat(2, 1)


def _positions(mask, count):
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]


@torch.no_grad()
def _turns(model, cache, ids, hidden, counts):
    """Feed the prompt, then passes of `counts` tokens under a mask that hides columns `hidden` of row 0."""
    mask = torch.ones(2, ids.shape[1], dtype=torch.long)
    logits = [model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]]
    for count in counts:
        mask = torch.cat([mask, mask.new_ones(2, count)], 1)
        mask[0, hidden] = 0
        logits.append(
            model(
                ids[:, :count],
                attention_mask=mask,
                position_ids=_positions(mask, count),
                past_key_values=cache,
            ).logits[:, -1]
        )
    return torch.stack(logits)


@pytest.mark.parametrize("hidden", [slice(5, 25), slice(0, 1), slice(3, 30, 4)])
@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [2, 1], [1, 3, 1]])
def test_hidden_tokens_are_not_attended_to_at_a_step_of_one_token(model, ids, hidden, counts):
    expected = _turns(model, DynamicCache(config=model.config), ids, hidden, counts)
    with PolicyCache("full", model) as cache:
        got = _turns(model, cache, ids, hidden, counts)
        kept = set(range(30 + sum(counts))) - set(range(30)[hidden])
        assert len(cache.kept(0, 0, row=0)) == len(kept)
        assert len(cache.kept(0, 0, row=1)) == 30 + sum(counts)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_tokens_of_a_compacted_row_cannot_be_hidden_at_a_step_of_one_token(model, compose, ids):
    prompt = ids.repeat(1, 3)
    with PolicyCache(compose(), model) as cache:
        _turns(model, cache, prompt, slice(0, 0), [1, 1])
        assert cache.stats().compactions
        mask = torch.ones(2, 93, dtype=torch.long)
        mask[0, 5:25] = 0
        with torch.no_grad(), pytest.raises(CacheStateError, match="hides tokens of row 0"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_rows_that_do_not_fit_a_mask_are_named_at_a_step_of_one_token(model, ids):
    with torch.no_grad(), PolicyCache("full", model) as cache:
        model(ids, past_key_values=cache)
        with pytest.raises(CacheStateError, match="rows"):
            model(ids[:, :1], attention_mask=torch.ones(3, 31), past_key_values=cache)


class Steps:
    """Masks `[2, seen]` that grow by a column at a time, given to a `LateCheck`."""

    def __init__(self):
        self.check = LateCheck()
        self.mask = torch.ones(2, 10, dtype=torch.long)
        self.check.start(self.mask, 9)

    def step(self):
        self.mask = torch.cat([self.mask, self.mask.new_ones(2, 1)], 1)
        self.check.check()
        assert self.check.follows(self.mask, self.mask.shape[1] - 1)
        self.check.compare(self.mask, self.mask.shape[1] - 1)


def test_masks_that_only_grow_pass_the_late_check():
    steps = Steps()
    for _ in range(5):
        steps.step()
    steps.check.check()


@pytest.mark.parametrize("column", [0, 9, -1])
def test_a_hidden_token_is_noticed_at_the_next_step_and_at_every_later_one(column):
    steps = Steps()
    steps.step()
    steps.mask = torch.cat([steps.mask, steps.mask.new_ones(2, 1)], 1)
    steps.mask[1, column] = 0
    steps.check.compare(steps.mask, steps.mask.shape[1] - 1)
    for call in (steps.step, steps.check.check, steps.check.forget):
        with pytest.raises(CacheStateError, match="one step late"):
            call()


def test_only_the_mask_of_the_next_column_follows():
    steps = Steps()
    steps.step()
    assert not steps.check.follows(torch.ones(2, 13), 12)
    assert not steps.check.follows(torch.ones(3, 12), 11)
    steps.check.forget()
    assert not steps.check.follows(torch.ones(2, 12), 11)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device")
def test_on_a_gpu_a_turn_of_one_token_is_honoured_and_a_later_change_is_noticed(ids):
    model = tiny_model("llama").cuda()
    ids = ids.cuda()

    def feed(cache, count, hidden, seen):
        mask = torch.ones(2, seen + count, dtype=torch.long, device="cuda")
        if hidden:
            mask[0, hidden] = 0
        with torch.no_grad():
            return model(
                ids[:, :count], attention_mask=mask, position_ids=_positions(mask, count), past_key_values=cache
            ).logits[:, -1]

    turns = [(30, None, 0), (1, slice(5, 25), 30), (1, slice(5, 25), 31)]
    reference = DynamicCache(config=model.config)
    expected = [feed(reference, *turn) for turn in turns]
    with PolicyCache("full", model) as cache:
        got = [feed(cache, *turn) for turn in turns]
        torch.testing.assert_close(torch.stack(got), torch.stack(expected), atol=1e-4, rtol=1e-3)
    cache = PolicyCache("full", model)
    for turn in [(30, None, 0), (1, None, 30), (1, None, 31), (1, slice(3, 4), 32)]:
        feed(cache, *turn)
    with pytest.raises(CacheStateError, match="one step late"):
        feed(cache, 1, slice(3, 4), 33)
    with pytest.raises(CacheStateError, match="one step late"):
        cache.stats()
