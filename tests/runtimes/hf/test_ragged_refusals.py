"""What attention over heads with different numbers of entries does not compute is refused at the first pass."""

from __future__ import annotations

import pytest
import torch

import kvpolicy
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import tiny_model

IDS = torch.arange(3, 83)[None]


@pytest.fixture
def spec():
    return kvpolicy.load("adakv-snapkv", budget=36)


@pytest.mark.parametrize("by_config", [True, False], ids=["config", "call"])
def test_weights_of_ragged_policies_cannot_be_returned(spec, by_config):
    model = tiny_model("llama", attention="eager")
    model.config.output_attentions = by_config
    options = {} if by_config else {"output_attentions": True}
    with torch.no_grad(), PolicyCache(spec, model) as cache, pytest.raises(UnsupportedError, match="output_att"):
        model(IDS, past_key_values=cache, **options)


def test_weights_that_are_asked_for_after_an_eviction_cannot_be_returned(spec):
    model = tiny_model("llama", attention="eager")
    with torch.no_grad(), PolicyCache(spec, model) as cache:
        for part in (IDS, IDS[:, :1]):
            model(part, past_key_values=cache)
        assert cache.stats().compactions
        with pytest.raises(UnsupportedError, match="output_attentions"):
            model(IDS[:, :1], past_key_values=cache, output_attentions=True)


def test_weights_of_equal_counts_have_a_column_for_each_slot():
    model = tiny_model("llama", attention="eager")
    with torch.no_grad(), PolicyCache(kvpolicy.load("rkv", budget=40, trigger={"every": 4}), model) as cache:
        model(IDS, past_key_values=cache)
        for _ in range(3):
            weights = model(IDS[:, :1], past_key_values=cache, output_attentions=True).attentions
        assert cache.stats().compactions
        assert weights[0].shape[-1] < cache.stats().seen
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(weights[0].shape[:-1]))


def test_attention_dropout_in_training_mode_is_refused(spec):
    model = tiny_model("llama", attention_dropout=0.3).train()
    with torch.no_grad(), PolicyCache(spec, model) as cache, pytest.raises(UnsupportedError, match=r"model\.eval"):
        model(IDS, past_key_values=cache)
