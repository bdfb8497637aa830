"""What components remember is asked once a compaction, within the policy's backend, and scores nothing again."""

from __future__ import annotations

import pytest
import torch

import kvpolicy
from kvpolicy import ops
from kvpolicy.ops import dispatch
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import tiny_model
from kvpolicy_plugins.importance.attention_memory import AttentionMemory


@pytest.mark.parametrize("allocator", ["uniform", {"use": "adaptive_heads", "normalise": "z_score"}])
def test_what_was_scored_is_not_scored_again_to_be_remembered(allocator, monkeypatch):
    asked, calls = [], []
    importance, remember = ops.window_importance, AttentionMemory.remember
    monkeypatch.setattr(ops, "window_importance", lambda *a, **k: calls.append(1) or importance(*a, **k))
    monkeypatch.setattr(
        AttentionMemory, "remember", lambda self, view: asked.append(dispatch.requested()) or remember(self, view)
    )
    spec = kvpolicy.load("g-kv", budget=24).replace(
        {"allocator": allocator, "trigger": {"every": 8}, "backend": "torch"}
    )
    model, ids = tiny_model("llama"), torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "nobody")  # what the policy names counts, wherever it is asked
    with PolicyCache(spec, model) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        before = cache.engine.rows[0].compactions
        cache.engine.settle()
        assert cache.engine.rows[0].compactions == before + 1
    assert asked == ["torch"] * 3
    assert len(calls) <= 3
