"""What a model's configuration says about itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from kvpolicy.runtimes.shapes import FIELDS, head_shape, layer_fields


def head_shapes(model: PreTrainedModel, layers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the number of KV heads and their size for each of some layers, as the model's configuration says."""
    config: Any = model.config.get_text_config(decoder=True)
    said = config.to_dict()
    own = set(getattr(config, "attribute_map", ()))  # under names of its own, as GPT-2's `n_head`: attributes only
    text = {name: getattr(config, name, None) if name in own else said.get(name) for name in FIELDS}
    return [head_shape(layer_fields(text, layer)) for layer in layers]


def hidden_size(model: PreTrainedModel) -> int | None:
    """Return the size of a model's hidden states, as its configuration says; None where it says nothing."""
    found = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    return found if isinstance(found, int) else None


def image_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids that stand for image and video tokens in the text, as the model's configuration says."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    return [value for name in names if isinstance(value := getattr(model.config, name, None), int)]
