"""What tests of compressed contexts share: a text, questions, and what is compared."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

CONTEXT = "the cat sat on a mat and then it ran away from the big dog who was not amused at all by it. " * 3
QUESTIONS = ["who sat?", "where did the cat sit, and what of the dog?", "why?"]
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def plain(model: Any, tokenizer: Any, text: str, tokens: int = 12) -> tuple[int, ...]:
    """Return what generate says behind a text with transformers' own cache."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    cache = DynamicCache(config=model.config)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, max_new_tokens=tokens,
        pad_token_id=0
    )  # fmt: skip
    return tuple(found[0, ids.shape[1] :].tolist())


def held(cache: Any) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Return a copy of all that a cache's stores hold, and of its counters."""
    arenas = [t.clone() for s in cache.engine.stores.distinct() for t in s._arenas()]
    for store in cache.engine.stores.distinct():
        arenas += [t.clone() for base in getattr(store, "bases", {}).values() for t in base.arenas.values()]
    for layer in cache.layers:
        others = (getattr(layer, name, None) for name in ("keys", "values", "conv_states", "recurrent_states"))
        arenas += [t.clone() for t in others if isinstance(t, torch.Tensor)]
    return arenas, [vars(row).copy() for row in cache.engine.rows]


def same(a: Any, b: Any) -> bool:
    """Return whether two results of `held` are equal to the bit."""
    return a[1] == b[1] and len(a[0]) == len(b[0]) and all(map(torch.equal, a[0], b[0]))
