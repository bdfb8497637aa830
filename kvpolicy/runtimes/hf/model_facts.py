"""What a model's configuration says about itself."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def head_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Return the number of KV heads and their size, as the model's configuration says."""
    config: Any = model.config.get_text_config(decoder=True)
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return heads, int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def image_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids that stand for image and video tokens in the text, as the model's configuration says."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    return [value for name in names if isinstance(value := getattr(model.config, name, None), int)]
