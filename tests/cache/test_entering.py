"""What components make of hidden states when tokens enter stays with the entries as everything else does."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from kvpolicy import ImportanceScorer, SlotState
from kvpolicy.cache.engine import Engine
from kvpolicy.cache.paged import unserved_traits
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.slot_state import NewTokens
from kvpolicy.errors import ComponentError
from kvsupport.engine_driver import Driver


class Told(ImportanceScorer):
    """The sum of the hidden state, and ten thousand times the head."""

    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    def slot_state(self):
        return (SlotState("told"),)

    def enter(self, tokens: NewTokens):
        heads = tokens.heads.numbers(torch.device("cpu"))
        said = tokens.hidden_states.sum(-1)[:, None] + 1e4 * heads[None, :, None]
        return {"told": said.float()}

    def score(self, view):
        return torch.where(view.valid, view.state["told"], 0.0)


def _check(driver: Driver) -> None:
    """Compare the state of every entry with what its token says."""
    count = 0
    for layer in driver.engine.layers:
        for b, text in enumerate(driver.texts):
            view = driver.engine.view(layer, slice(b, b + 1))
            for h in range(view.shape[1]):
                slots = view.valid[0, h].nonzero()[:, 0]
                at = view.positions[0, h, slots].long()
                wanted = text.keys[layer].transpose(0, 1).flatten(1)[at].sum(-1) + 1e4 * h
                assert torch.allclose(view.state["told"][0, h, slots], wanted, atol=1e-2)
                count += len(slots)
    assert count


def _driver(texts: list[int], importance: ImportanceScorer, **fields) -> Driver:
    driver = Driver(texts, **fields)
    before = driver.engine
    policy = replace(before.policy, importance=importance)
    driver.engine = Engine(policy, before.groups, before.num_layers, before.ropes)
    return driver


@pytest.mark.parametrize("allocator", ["uniform", {"use": "adaptive_heads", "normalise": "z_score"}], ids=str)
def test_state_follows_its_entry_through_padding_chunks_compactions_rows_and_crops(allocator):
    driver = _driver([1, 2], Told(), allocator=allocator)
    driver.feed("xxxxxxxxx", ".....xxxx")
    _check(driver)
    driver.feed("xxxx", "..xx", kind="prompt")
    _check(driver)
    driver.steps(30)
    assert all(row.compactions > 1 for row in driver.engine.rows)
    _check(driver)
    driver.feed("x", ".")
    _check(driver)
    twin = driver.engine.clone()
    driver.engine.crop(1)
    driver.at = [row.seen for row in driver.engine.rows]
    _check(driver)
    driver.steps(6)
    _check(driver)
    driver.engine.take_rows(torch.tensor([1, 0, 1]))
    driver.texts, driver.at = [driver.texts[i] for i in (1, 0, 1)], [driver.at[i] for i in (1, 0, 1)]
    driver.steps(9)
    _check(driver)
    assert len(twin.rows) == 2


def test_what_entering_returns_is_checked():
    class Wrong(Told):
        said: str = "told"
        tokens: int = 0

        def enter(self, tokens):
            return {self.said: torch.zeros(*tokens.shape[:2], tokens.shape[2] + self.tokens)}

    for component, message in (
        (Wrong(said="other"), "returned slot state 'other', and declares told"),
        (Wrong(tokens=1), r"instead of torch.float32 \[1, 2, 5\]"),
    ):
        with pytest.raises(ComponentError, match=message):
            _driver([1], component).feed("xxxxx")


def test_a_component_without_the_need_must_not_be_asked():
    tokens = NewTokens(torch.zeros(1, 1, 4), 0, 1, HeadSpan.whole(2))
    assert tokens.shape == (1, 2, 1)
    from kvpolicy_plugins.importance.key_norm import KeyNorm

    with pytest.raises(TypeError, match="needs no hidden states"):
        KeyNorm().enter(tokens)


def test_a_paged_cache_refuses_the_need():
    policy = _driver([1], Told()).engine.policy
    assert "not what its layers read" in unserved_traits(policy)["hidden_states"]
