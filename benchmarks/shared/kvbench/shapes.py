"""Models with random weights in the shapes of real ones: speed and memory do not depend on what a model has learnt."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
_QWEN2_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
LLAMA: dict[str, dict[str, Any]] = {
    "toy-llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "vocab_size": 256, "rope_parameters": _LLAMA3_ROPE},
    "narrow": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 16, "num_attention_heads": 4,
               "num_key_value_heads": 2, "vocab_size": 256},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152},
    "llama-3.1-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                     "rope_parameters": _LLAMA3_ROPE},
}  # fmt: skip
QWEN2: dict[str, dict[str, Any]] = {
    "toy-qwen2": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3,
                  "num_key_value_heads": 1, "vocab_size": 256, "tie_word_embeddings": True,
                  "rope_parameters": _QWEN2_ROPE},
    "qwen2-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                   "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
                   "rope_parameters": _QWEN2_ROPE},
}  # fmt: skip
SHAPES = [*LLAMA, *QWEN2]


def random_model(shape: str, device: torch.device, dtype: torch.dtype, *, layers: int | None = None) -> PreTrainedModel:
    """Return a decoder of one of `SHAPES` with random weights, made on the device; it reads up to 131,072 tokens.

    Args:
        shape: of a real model.
        device: where it is to be.
        dtype: of its weights.
        layers: fewer than it has.
    """
    torch.manual_seed(0)
    family, config = (LlamaForCausalLM, LlamaConfig) if shape in LLAMA else (Qwen2ForCausalLM, Qwen2Config)
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    with device:
        model: PreTrainedModel = family._from_config(  # noqa: SLF001  what from_config of the auto classes calls
            config(**(LLAMA | QWEN2)[shape] | fewer, max_position_embeddings=131072), dtype=dtype
        )
    return model.eval()
