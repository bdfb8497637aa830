"""`learned_gate` against powers of beta, written out."""

from __future__ import annotations

import math

import pytest
import torch

from kvpolicy.contracts.view import CacheView
from kvpolicy.tables import Table, supplying
from kvpolicy_plugins.importance.learned_gate import LearnedGate


def _view(logits, positions, seen):
    shape = logits.shape
    return CacheView(
        keys=torch.zeros(*shape, 4), values=torch.zeros(*shape, 4), positions=positions,
        valid=torch.ones(shape, dtype=torch.bool), scale=1.0, layer_idx=0, num_layers=1,
        prompt_length=torch.tensor([0]), seen=torch.tensor([seen]), compaction=torch.tensor([0]),
        state={"learned_gate": logits},
    )  # fmt: skip


def _supplied(output):
    tensors = {"output_weight": torch.eye(2)[None], "output_bias": torch.zeros(1, 2)}
    table = Table("gates", "m", "m", 1, 2, 4, tensors, notes={"output": output})
    return supplying(lambda name, kind: table)


@pytest.mark.parametrize("ahead", [0, 1, 5])
@pytest.mark.parametrize("lookahead", [1, 2, 40])
def test_a_retention_gate_decays_by_the_token(ahead, lookahead):
    logits = torch.tensor([[[-4.0, 0.0, 3.0, 9.0], [2.0, 2.0, -1.0, 14.0]]])
    positions = torch.tensor([[[0, 3, 7, 10], [1, 2, 9, 10]]], dtype=torch.int32)
    with _supplied("retention"):
        got = LearnedGate(gate="x/y", ahead=ahead, lookahead=lookahead).score(_view(logits, positions, 11))
    for h in range(2):
        for n in range(4):
            beta = 1 / (1 + math.exp(-float(logits[0, h, n])))
            first = 11 + ahead - int(positions[0, h, n])
            wanted = math.log(math.fsum(beta ** (first + step) for step in range(lookahead)))
            assert float(got[0, h, n]) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_a_beta_of_one_and_one_of_nothing_stay_finite():
    logits = torch.tensor([[[200.0, -200.0], [0.0, 60.0]]])
    positions = torch.zeros(1, 2, 2, dtype=torch.int32)
    with _supplied("retention"):
        for lookahead in (1, 100_000):
            got = LearnedGate(gate="x/y", lookahead=lookahead).score(_view(logits, positions, 1 << 20))
            assert torch.isfinite(got).all()
            assert float(got[0, 0, 0]) == pytest.approx(math.log(lookahead), rel=1e-3)


def test_a_score_gate_says_what_it_said():
    logits = torch.tensor([[[-4.0, 0.0], [3.0, 9.0]]])
    with _supplied("score"):
        got = LearnedGate(gate="x/y").score(_view(logits, torch.zeros(1, 2, 2, dtype=torch.int32), 9))
    assert torch.equal(got, logits)
