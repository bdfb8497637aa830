"""A protection that drops slots: what is held is what was kept, not what the budget allows."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch

import kvpolicy
from kvpolicy import Protection, SpecError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import tiny_model


class DropOdd(Protection):
    """Odd positions go; with `of_head`, in that head only."""

    effect: ClassVar = "drop"

    of_head: int | None = None

    def mask(self, view):
        head = torch.arange(view.shape[1])[:, None]
        here = torch.ones_like(view.valid) if self.of_head is None else (head == self.of_head).expand_as(view.valid)
        return view.valid & here & (view.positions % 2 == 1)


def dropping(budget, interval, *protections):
    base = kvpolicy.load("sinks-recent", budget=budget, trigger={"every": interval}).build()
    return dataclasses.replace(base, protections=(*base.protections, *protections), phase="both")


@pytest.mark.parametrize("budget", [8, 16, 24])
def test_what_is_dropped_does_not_come_back(budget):
    model, ids = tiny_model("llama"), torch.randint(3, 250, (2, 80), generator=torch.Generator().manual_seed(0))
    with PolicyCache(dropping(budget, 8, DropOdd()), model) as cache, torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        gone: set[int] = set()
        for i in range(40, 80):
            model(ids[:, i : i + 1], past_key_values=cache)
            kept = cache.kept(1, 1, row=1)
            assert kept == sorted(set(kept) - gone)
            assert len(kept) == cache.stats().resident <= budget + 8
            gone = set(range(i + 1)) - set(kept)
    assert {1, 3, 5, 37, 39} <= gone


def test_heads_that_lose_more_hold_less():
    model, ids = tiny_model("llama"), torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with PolicyCache(dropping(30, 8, DropOdd(of_head=1)), model) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        assert len(cache.kept(0, 0)) > len(cache.kept(0, 1))
        assert all(p % 2 == 0 for p in cache.kept(0, 1) if p < 40)


def test_re_rotation_names_the_protection_that_leaves_heads_uneven():
    base = kvpolicy.load("streaming-llm", budget=24).build()
    with pytest.raises(SpecError, match="which DropOdd does not leave"):
        dataclasses.replace(base, protections=(*base.protections, DropOdd()))
