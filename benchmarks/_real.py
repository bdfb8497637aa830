"""What a real model caches for a real text: keys, values and queries of SmolLM2 over this project's own documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kvpolicy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.demo_model import ensure_demo_model
from kvpolicy.view import CacheView

ROOT = Path(__file__).resolve().parent.parent


def load_model(log: Callable[[str], None] = print) -> PreTrainedModel:
    """Return SmolLM2-135M-Instruct in fp32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(ensure_demo_model(log), dtype=torch.float32)
    return model.eval()


def real_tokens(count: int) -> torch.Tensor:
    """Return the first `count` tokens of the documentation and the source, int64 `[1, count]`."""
    files = sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "kvpolicy").glob("*.py"))
    text = "\n\n".join(path.read_text() for path in files)
    ids = AutoTokenizer.from_pretrained(ensure_demo_model(lambda _: None))(text[: count * 8])["input_ids"]
    if len(ids) < count:
        raise SystemExit(f"the project's own text has only {len(ids)} tokens, {count} were asked for.")
    return torch.tensor([ids[:count]])


@contextmanager
def real_views(model: PreTrainedModel, slots: int, policy: str = "rkv") -> Iterator[list[CacheView]]:
    """Give the views of all layers that a compaction at `slots` entries would score; nothing is evicted."""
    spec = kvpolicy.load(policy, budget=2 * slots)
    with torch.no_grad(), PolicyCache(spec, model) as cache:
        tokens = real_tokens(slots)
        for piece in tokens.split(512, 1):
            model(piece, past_key_values=cache, logits_to_keep=1)
        engine = cache.engine
        window = engine.log.window()
        yield [engine.view(layer, slice(0, 1), window, [slots - 128]) for layer in engine.layers]
