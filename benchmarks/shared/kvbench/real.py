"""What a real model caches for a real text: SmolLM2 over this project's own documentation and source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import kvpolicy
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import SpecError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.demo_model import ensure_demo_model

ROOT = Path(__file__).resolve().parents[3]


def load_model(folder: Path | None = None, log: Callable[[str], None] = print) -> PreTrainedModel:
    """Return the model in a folder in fp32, SmolLM2-135M-Instruct by default."""
    disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder or ensure_demo_model(log), dtype=torch.float32)
    return model.eval()


def real_tokens(count: int) -> Tensor:
    """Return the first `count` tokens of the documentation and the source, int64 `[1, count]`.

    Raises:
        SystemExit: there are not so many.
    """
    files = sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "kvpolicy").glob("*.py"))
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in files)
    ids = AutoTokenizer.from_pretrained(ensure_demo_model(lambda _: None))(text[: count * 8])["input_ids"]
    if len(ids) < count:
        raise SystemExit(
            f"the project's own text has only {len(ids)} tokens, but {count} were asked for; ask for less."
        )
    return torch.tensor([ids[:count]])


@contextmanager
def due_cache(model: PreTrainedModel, entries: int, policy: str = "rkv") -> Iterator[PolicyCache]:
    """Give a cache that holds `entries` entries of a real text, in which the next decode step compacts.

    Its budget is so much below `entries` as the policy's trigger waits for.

    Raises:
        SystemExit: that leaves the policy no budget.
    """
    spec = kvpolicy.load(policy, budget=entries)
    try:
        spec = spec.replace("budget.tokens", entries - spec.build().trigger.buffer())
    except SpecError as error:
        raise SystemExit(f"{entries} keys are too few for policy {policy!r}, ask for more: {error}") from None
    tokens = real_tokens(entries)
    with torch.no_grad(), PolicyCache(spec, model) as cache:
        for piece in tokens[:, :-1].split(512, 1):
            model(piece, past_key_values=cache, logits_to_keep=1)
        model(tokens[:, -1:], past_key_values=cache)
        yield cache


def views_of(cache: PolicyCache) -> list[CacheView]:
    """Return what a compaction of a cache's only row would score, one view per layer."""
    engine = cache.engine
    window, budget = engine.log.window(), [engine.policy.entries(engine.rows[0].seen, engine.rows[0].prompt)]
    return [engine.view(layer, slice(0, 1), window, budget) for layer in engine.layers]
