"""An engine that is driven with scripted keys, values and queries, as a model would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvpolicy import PolicySpec, Rope
from kvpolicy.cache.engine import Engine
from kvpolicy.cache.entering import NEED, enter
from kvpolicy.cache.ledger import Kind
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.policy.policy import Policy

GROUPS, DIM = 2, 8
CPU = torch.device("cpu")


def policy(**fields: Any) -> Policy:
    """A small policy of key norms, with these fields of a specification."""
    base = {
        "policy": "test",
        "budget": 16,
        "trigger": {"every": 4},
        "protect": {"sinks": 2, "recent": 4},
        "importance": "key_norm",
    }
    return PolicySpec(**{**base, **fields}).build()


class RowText:
    """The tensors of one row: what a token brings depends on row, layer and position only."""

    def __init__(self, seed: int, heads: dict[int, int]) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.keys = {i: torch.randn(h, 400, DIM, generator=generator) for i, h in heads.items()}
        self.values = {i: torch.randn(h, 400, DIM, generator=generator) for i, h in heads.items()}
        self.queries = {i: torch.randn(h * GROUPS, 400, DIM, generator=generator) for i, h in heads.items()}


class Driver:
    """Feeds an engine as a model would: all layers, one forward pass after another."""

    def __init__(
        self,
        texts: list[int],
        groups: Sequence[Sequence[int]] = ((0, 2),),
        heads: dict[int, int] | None = None,
        **fields: Any,
    ) -> None:
        layers = [layer for group in groups for layer in group]
        self.heads = heads or dict.fromkeys(layers, 2)
        ropes = dict.fromkeys(layers, Rope(torch.tensor([1.0, 0.5, 0.1, 0.02])))
        self.engine = Engine(policy(**fields), groups, 4, ropes)
        self.texts = [RowText(seed, self.heads) for seed in texts]
        self.at = [0] * len(texts)

    def feed(self, *mask: str, kind: Kind | None = None) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """One forward pass; a row's mask has `x` for a token and `.` for padding."""
        valid = torch.tensor([[letter == "x" for letter in row] for row in mask])
        columns = valid.shape[1]
        kind = kind or ("prompt" if columns > 1 or not self.engine.columns else "decode")
        forward = self.engine.open(len(mask), columns, valid, CPU, kind=kind)
        returned = {}
        for layer in self.engine.layers:
            made = []
            for source in ("keys", "values", "queries"):
                rows = []
                for b, text in enumerate(self.texts):
                    tensor = getattr(text, source)[layer]
                    row = torch.full((tensor.shape[0], columns, DIM), float("nan") if source != "queries" else 0.0)
                    count = int(valid[b].sum())
                    row[:, valid[b]] = tensor[:, self.at[b] : self.at[b] + count]
                    rows.append(row)
                made.append(torch.stack(rows))
            returned[layer] = self.engine.append(layer, made[0], made[1])
            if NEED in self.engine.policy.needs:
                enter(self.engine, layer, made[0].transpose(1, 2).flatten(2))
            self.engine.record(layer, made[2], LayerFacts(GROUPS, DIM**-0.5))
        assert not forward.pending
        for b, row in enumerate(valid):
            self.at[b] += int(row.sum())
        return returned

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.feed(*["x"] * len(self.texts))

    def kept(self, b: int) -> list[list[list[int]]]:
        """Positions by layer and head."""
        resident = self.engine.rows[b].resident
        stores = self.engine.stores
        return [stores[i].positions[stores[i].index[i], b, :, :resident].tolist() for i in self.engine.layers]

    def check_contents(self) -> None:
        """Each slot holds the key and value of the position that it says."""
        for i in self.engine.layers:
            store = self.engine.stores[i]
            for b, row in enumerate(self.engine.rows):
                for h in range(self.heads[i]):
                    at = store.positions[store.index[i], b, h, : row.resident].long()
                    assert bool((at[1:] > at[:-1]).all())
                    assert torch.equal(
                        store.values[store.index[i], b, h, : row.resident], self.texts[b].values[i][h, at]
                    )
                    if not self.engine.policy.post:
                        held = store.keys[store.index[i], b, h, : row.resident]
                        assert torch.equal(held, self.texts[b].keys[i][h, at])


POLICIES: dict[str, dict[str, Any]] = {
    "key norm": {},
    "rkv": {
        "importance": {"use": "window_attention", "observe": 4}, "redundancy": "key_cosine",
        "mixer": {"use": "linear", "weight": 0.1},
    },
    "accumulated": {"importance": "accumulated_attention", "trigger": "each_step"},
    "random": {"importance": "random"},
    "fraction": {"budget": 0.4},
    "re-rotated": {"importance": "accumulated_attention", "post": ["rerotate"]},
    "one set": {"selector": {"use": "top_k", "scope": "model"}},
    "both": {"phase": "both"},
    "aligned": {"trigger": {"use": "every", "interval": 3, "align": 4}},
}  # fmt: skip
