"""The reasoning model before its training: tokenizer, and a standard architecture of any shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kvpolicy.study.wording import vocabulary


@dataclass(frozen=True)
class Shape:
    """What of the architecture may be another than the shipped model's; width (128), layers (4) and MLP (384) stay.

    Attributes:
        heads: query heads.
        kv_heads: KV heads, of which `heads` is a multiple.
        head_dim: dimensions of a head.
        theta: base of the rotary embedding.
        qk_norm: whether queries and keys are normalised (Qwen3) or not (Llama).
    """

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    theta: float = 1e6
    qk_norm: bool = True


SHIPPED: Final = Shape()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: words are what blanks separate, ``<bos>`` comes first."""
    words = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        bos_token="<bos>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, shape: Shape) -> Qwen3ForCausalLM | LlamaForCausalLM:
    """Return the untrained model: Qwen3 or, without norms of queries and keys, Llama; 0.8 M parameters as shipped."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape.qk_norm:
        return Qwen3ForCausalLM(Qwen3Config(**settings))
    return LlamaForCausalLM(LlamaConfig(**settings))
