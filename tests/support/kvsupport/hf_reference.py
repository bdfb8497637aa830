"""What the transformers runtime generates and keeps, to compare an engine with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvpolicy import PolicySpec
from kvpolicy.runtimes.hf import PolicyCache

Positions = list[list[list[int]]]


def generate(
    model: Any, spec: PolicySpec | str | Path, prompt: list[int], tokens: int, piece: int | None = None
) -> tuple[list[int], list[Positions]]:
    """Generate greedily under a policy, the prompt in pieces of so many tokens or in one.

    Returns:
        The tokens, and the positions `[L][H][n]` after each compaction.
    """
    kept: list[Positions] = []
    made: list[int] = []
    with torch.inference_mode(), PolicyCache(spec, model) as cache:
        engine = cache.engine
        run = engine._compactor.run

        def noted(rows: Any) -> None:
            run(rows)
            held = engine.held(slice(0, 1))
            kept.append([engine.stores[i].read(i, held).positions[0].tolist() for i in sorted(engine.stores)])

        engine._compactor.run = noted  # type: ignore[method-assign]
        pieces = [prompt[i : i + (piece or len(prompt))] for i in range(0, len(prompt), piece or len(prompt))]
        for each in pieces[:-1]:
            model(torch.tensor([each]), past_key_values=cache, use_cache=True)
        step = torch.tensor([pieces[-1]])
        while len(made) < tokens:
            logits = model(step, past_key_values=cache, use_cache=True).logits[0, -1]
            made.append(int(logits.argmax()))
            step = torch.tensor([[made[-1]]])
    return made, kept
