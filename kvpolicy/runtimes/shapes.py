"""What a model's configuration says of the heads of its layers and of its positions: the one place where it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = (
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "layer_types",
    "per_layer_config", "global_head_dim", "num_global_key_value_heads", "attention_k_eq_v", "num_kv_shared_layers",
)  # fmt: skip
"""What is read of a configuration."""

_LISTED = ("num_attention_heads", "num_key_value_heads", "head_dim")


def layer_fields(text: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Return what a text configuration says of one layer.

    Overrides by layer (`per_layer_config`), lists with a number for each layer, and the fields that Gemma-4 has for
    layers of full attention take the place of what holds for all layers.

    Args:
        text: fields of the configuration, as in a config.json; what is missing or None is not said.
        layer: index of the layer.
    """
    found = {name: text.get(name) for name in FIELDS if name != "per_layer_config"}
    kinds, overrides = text.get("layer_types"), text.get("per_layer_config")
    if isinstance(overrides, Mapping):
        found |= overrides.get(layer, overrides.get(str(layer))) or {}
    elif isinstance(kinds, list | tuple) and layer < len(kinds) and kinds[layer] == "full_attention":
        found["head_dim"] = text.get("global_head_dim") or found["head_dim"]
        if text.get("attention_k_eq_v", True):
            found["num_key_value_heads"] = text.get("num_global_key_value_heads") or found["num_key_value_heads"]
    for name in _LISTED:
        value = found[name]
        if isinstance(value, list | tuple):
            found[name] = value[layer] if layer < len(value) else None
    return found


def head_shape(fields: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of KV heads and their size, of what `layer_fields` returned."""
    query_heads = int(fields["num_attention_heads"])
    return int(fields["num_key_value_heads"] or query_heads), int(
        fields["head_dim"] or fields["hidden_size"] // query_heads
    )


def positions_of(config: Any) -> int | None:
    """Return how many positions the configuration of a decoder allows a text; None where it sets no limit.

    Dynamic scaling of RoPE has none. Linear scaling and YaRN reach further by their factor, where the configuration's
    number is that of the model before it was scaled, as Qwen's cards say to write it.
    """
    limit, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    scaling = rope if isinstance(rope, dict) else {}  # by type of layer it says nothing here: such limits are scaled
    kind, factor = scaling.get("rope_type"), scaling.get("factor")
    if kind == "dynamic":
        return None
    if kind in ("linear", "yarn") and isinstance(factor, int | float):
        return max(limit, int(factor * (scaling.get("original_max_position_embeddings") or limit)))
    return limit
