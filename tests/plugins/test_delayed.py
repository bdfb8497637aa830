"""Scores that are given once, against a plain book of who was given what."""

from __future__ import annotations

import pytest
import torch

import kvpolicy


def make(name, **params):
    return kvpolicy.catalog().get("importance", name)(**params)


@pytest.mark.parametrize("delay", [0, 3, 50])
def test_delayed_gives_a_score_once(make_view, delay):
    """Compaction after compaction, with other values each time: what was given stays, and the young wait."""
    generator = torch.Generator().manual_seed(6)
    scorer = make("delayed", base=make("value_norm"), delay=delay)
    state = torch.full((1, 2, 20), scorer.slot_state()[0].fill)
    given: dict[tuple[int, int], float] = {}
    for seen in (8, 12, 20):
        values = torch.randn(1, 2, 20, 8, generator=generator)
        view = make_view(
            shape=(1, 2, 20, 8),
            values=values,
            valid=(torch.arange(20) < seen).expand(1, 2, 20),
            seen=torch.tensor([seen]),
            state={"delayed": state},
        )
        for h in range(2):
            for n in range(seen):
                if (h, n) not in given and seen - 1 - n >= delay:
                    given[h, n] = values[0, h, n].norm().item()
        got, state = scorer.score(view), scorer.remember(view)["delayed"]
        for h in range(2):
            best = max((given[h, n] for n in range(seen) if (h, n) in given), default=0.0)
            for n in range(seen):
                assert got[0, h, n].item() == pytest.approx(given.get((h, n), best), rel=1e-5)
    assert len(given) == 2 * max(20 - delay, 0)
