"""Feeds an engine with synthetic keys, values and queries, as a model would, and reads what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpolicy.cache.engine import Engine
from kvpolicy.cache.entering import NEED, enter
from kvpolicy.cache.ledger import Kind
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.contracts.view import Rope
from kvpolicy.policy.policy import Policy

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 4
_PROJECTION = torch.randn(HEADS, GROUP, DIM, 6, generator=torch.Generator().manual_seed(7))
_FACTS = LayerFacts(groups=GROUP, scale=0.5, output_projection=_PROJECTION)
_ROPE = Rope(torch.tensor([1.0, 0.25]))

Held = dict[int, tuple[Tensor, ...]]
"""Position -> key, value and slot states of one head of one layer."""


@dataclass(frozen=True)
class Text:
    """The keys, values and queries of one row, by position; the same numbers wherever the row is.

    Attributes:
        seed: another seed is another text.
        length: tokens.
    """

    seed: int
    length: int = 48

    def tensors(self, jitter: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values `[LAYERS, HEADS, length, DIM]` and queries `[LAYERS, HEADS * GROUP, length, DIM]`."""
        g = torch.Generator().manual_seed(self.seed)
        shapes = (HEADS, HEADS, HEADS * GROUP)
        drawn = [torch.randn((LAYERS, heads, self.length, DIM), generator=g) for heads in shapes]
        if jitter:
            drawn = [x * (1 + jitter * torch.randn(x.shape, generator=g)) for x in drawn]
        return drawn[0], drawn[1], drawn[2]


@dataclass
class Drive:
    """An engine and the texts of its rows.

    Attributes:
        policy: what it runs.
        texts: one per row.
        jitter: relative noise on the texts, to see whether rounding decides.
    """

    policy: Policy
    texts: list[Text]
    jitter: float = 0.0
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        ropes = dict.fromkeys(range(LAYERS), _ROPE) if "rope" in self.policy.needs else {}
        self.engine = Engine(self.policy, [tuple(range(LAYERS))], LAYERS, ropes)
        self.start(self.texts)

    def start(self, texts: Sequence[Text]) -> None:
        """Take other texts, from their beginning."""
        self.texts = list(texts)
        self._tensors = [text.tensors(self.jitter) for text in self.texts]
        self.read = [0] * len(self.texts)
        self.images = torch.zeros(len(self.texts), 0, dtype=torch.bool)

    def forward(self, counts: Sequence[int], *, prefill: bool) -> None:
        """Run the next `counts[b]` tokens of each row, padded on the left with NaN."""
        columns = max(counts)
        rows = len(self.texts)
        pads = [columns - count for count in counts]
        valid = torch.tensor([[False] * pad + [True] * (columns - pad) for pad in pads])
        at = torch.tensor(self.read)[:, None] + valid.cumsum(1) - 1
        self.images = torch.cat([self.images, valid & (at % 3 == 1)], 1)
        if "modality" in self.policy.needs:
            self.engine.modality = self.images
        kind: Kind = "prompt" if prefill else "decode"
        self.engine.open(rows, columns, None if not any(pads) else valid, torch.device("cpu"), kind=kind)
        for layer in range(LAYERS):
            keys, values, queries = (
                [self._part(b, i, layer, counts[b], columns) for b in range(rows)] for i in range(3)
            )
            self.engine.append(layer, torch.stack(keys), torch.stack(values))
            if NEED in self.policy.needs:
                enter(self.engine, layer, torch.stack(keys).transpose(1, 2).flatten(2))
            self.engine.record(layer, torch.stack(queries), _FACTS)
        for b, count in enumerate(counts):
            self.read[b] += count

    def _part(self, row: int, which: int, layer: int, count: int, columns: int) -> Tensor:
        text = self._tensors[row][which][layer]
        new = text[:, self.read[row] : self.read[row] + count]
        blank = torch.full((text.shape[0], columns - count, DIM), float("nan"))
        return torch.cat([blank, new], dim=1)

    @property
    def compactions(self) -> int:
        """How many compactions the row has had that had most."""
        return max(row.compactions for row in self.engine.rows)

    def settle(self) -> None:
        """Run due compactions and observe all attention."""
        self.engine.settle()
        self.engine.observe()

    def held(self, row: int) -> list[Held]:
        """Return what each layer and head of a row holds, in order of layer and head."""
        found: list[Held] = []
        for layer in range(LAYERS):
            view = self.engine.view(layer, slice(row, row + 1))
            for h in range(HEADS):
                slots = view.valid[0, h].nonzero()[:, 0]
                tensors = [view.keys, view.values, *view.state.values()]
                found.append({int(view.positions[0, h, n]): tuple(t[0, h, n].clone() for t in tensors) for n in slots})
        return found

    def run(self, prompts: Sequence[int], steps: int, chunk: int | None = None) -> None:
        """Read prompts, in chunks counted from their end if `chunk` says so, and then `steps` tokens one by one."""
        left = list(prompts)
        chunk = chunk if chunk is not None else self._chunk()
        while any(left):
            rest = max(left)
            width = rest if chunk is None else (rest - 1) % chunk + 1
            # The longest row goes first; a row joins when its beginning is reached.
            counts = [max(0, min(width, n - (rest - width))) for n in left]
            self.forward(counts, prefill=True)
            left = [n - c for n, c in zip(left, counts, strict=True)]
        for _ in range(steps):
            self.forward([1] * len(self.texts), prefill=False)

    def _chunk(self) -> int | None:
        return self.policy.prefill_chunk if self.policy.phase != "decode" else None


def difference(a: list[Held], b: list[Held]) -> str | None:
    """Say where what two rows hold differs, or return None; numbers up to rounding."""
    for place, (x, y) in enumerate(zip(a, b, strict=True)):
        at = f"layer {place // HEADS}, head {place % HEADS}"
        if list(x) != list(y):
            return f"{at} holds positions {list(y)} instead of {list(x)}"
        for position in x:
            for which, (p, q) in enumerate(zip(x[position], y[position], strict=True)):
                if not torch.allclose(p.float(), q.float(), rtol=1e-4, atol=1e-5, equal_nan=True):
                    name = ("key", "value")[which] if which < 2 else "slot state"
                    return f"{at}: the {name} at position {position} is {q.tolist()} instead of {p.tolist()}"
    return None
