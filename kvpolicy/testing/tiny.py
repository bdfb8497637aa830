"""Tiny decoders with random weights, one per family that the tests cover."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    # Large enough that the attention is not flat.
    "initializer_range": 0.12,
    "tie_word_embeddings": False,  # tied ones make a text of one token
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _plain(name: str, **more: Any) -> Callable[..., PreTrainedModel]:
    def make(**changes: Any) -> PreTrainedModel:
        config = getattr(transformers, f"{name}Config")(**{**_COMMON, **more, **changes})
        model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config)
        return model

    return make


def _gemma3(**changes: Any) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    fields = {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 12, "query_pre_attn_scalar": 24}
    config = transformers.Gemma3TextConfig(**{**_COMMON, **fields, **changes})
    return transformers.Gemma3ForCausalLM(config)


def _gpt_oss(**changes: Any) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    fields = {"layer_types": kinds, "sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**{**_COMMON, **fields, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.normal_(0.0, 1.5)
    return model


def _qwen3_next(**changes: Any) -> PreTrainedModel:
    """Layers of linear attention between those of full attention."""
    fields = {
        "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    }  # fmt: skip
    config = transformers.Qwen3NextConfig(**{**_COMMON, **fields, **changes})
    return transformers.Qwen3NextForCausalLM(config)


def _qwen2_vl(**changes: Any) -> PreTrainedModel:
    text = {**_COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    ids = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
    config = transformers.Qwen2VLConfig(text_config={**text, **changes}, vision_config=vision, **ids)
    return transformers.Qwen2VLForConditionalGeneration(config)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _plain("Llama"),
    "qwen2": _plain("Qwen2"),
    "qwen3": _plain("Qwen3"),
    "mistral": _plain("Mistral", sliding_window=None),
    "phi3": _plain("Phi3"),
    "gemma2": _plain("Gemma2", layer_types=["full_attention"] * 3, attn_logit_softcapping=4.0),
    "gemma3": _gemma3,
    "glm4": _plain("Glm4", partial_rotary_factor=0.5),  # neighbours are turned, half of the dimensions
    "smollm3": _plain("SmolLM3", no_rope_layer_interval=2),  # every second layer without positions
    "gpt_oss": _gpt_oss,
    "qwen2_vl": _qwen2_vl,
    "qwen3_next": _qwen3_next,
}
"""Family -> function that makes a model; keyword arguments change the text configuration."""


def tiny_model(family: str, *, seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """Return a new model of some 100,000 random weights in fp32, in evaluation mode, the same every time.

    Args:
        family: a key of `FAMILIES`.
        seed: another seed is another model.
        attention: attention implementation; the model's own choice if None.
        changes: fields of the text configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family](**changes)
    if attention is not None:
        model.set_attn_implementation(attention)
    # Random weights end a text at any moment; a test says how long it is.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def tiny_folder(folder: str | Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model with a tokenizer of one token per character, as `from_pretrained` and the CLI load it.

    Args:
        folder: where to; made if it is not there.
        family: as for `tiny_model`.
        seed: likewise.
        changes: likewise.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = [chr(code) for code in range(32, 32 + 256 - len(special))]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *letters])}, unk_token=special[3]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], unk_token=special[3])
    tokenizer.save_pretrained(folder)
    tiny_model(family, seed=seed, **changes).save_pretrained(folder)
    return Path(folder)
