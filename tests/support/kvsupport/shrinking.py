"""Tiny models with random weights, of every class that transformers' auto mappings know; no network, no files.

A configuration class is shrunk by the names of its fields; `OVERRIDES` says what a family needs beyond that, and
`NOT_ALONE` and an error of transformers say of the rest why it cannot be built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CAUSAL: dict[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model type -> class name, as `AutoModelForCausalLM` knows them."""

IMAGE_TEXT: dict[str, str] = {
    family: name
    for family, name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    if family not in CAUSAL
}
"""Likewise for `AutoModelForImageTextToText`, without those that `CAUSAL` has."""

VOCABULARY = 128
LAYERS = 4


def _each(value: Any, fields: str) -> dict[str, Any]:
    return dict.fromkeys(fields.split(), value)


SIZES: dict[str, Any] = {
    **_each(
        64,
        "hidden_size d_model n_embd model_dim embed_dim emb_dim embedding_size word_embed_proj_dim embedding_dim "
        "input_embedding_size output_embedding_size lru_width backbone_hidden_size hidden_dim hidden_size_global "
        "projection_dim text_hidden_size ffn_dim intermediate_size moe_intermediate_size "
        "shared_expert_intermediate_size d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff n_inner "
        "feed_forward_size expert_ffn_hidden_size intermediate_size_mlp shared_intermediate_size d_inner "
        "moe_shared_expert_intermediate_size dense_intermediate_size prefix_dense_intermediate_size "
        "shared_experts_intermediate_size",
    ),
    **_each(LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks num_decoder_layers"),
    **_each(LAYERS, "encoder_layers num_encoder_layers"),
    **_each(2, "depth num_layers_per_stack conf_num_hidden_layers num_perceiver_layers"),
    **_each(
        4,
        "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads attention_heads num_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads index_n_heads "
        "linear_num_value_heads linear_num_heads num_experts n_routed_experts num_local_experts moe_num_experts",
    ),
    **_each(
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads "
        "linear_num_key_heads num_experts_per_tok moe_topk moe_k top_k_experts",
    ),
    **_each(
        16, "head_dim indexer_head_dim swa_head_dim kv_channels dim_head d_kv attention_head_size attention_head_dim"
    ),
    **_each(16, "kv_lora_rank q_lora_rank v_head_dim qk_nope_head_dim index_head_dim mamba_chunk_size chunk_size"),
    **_each(16, "linear_key_head_dim linear_value_head_dim linear_head_dim out_hidden_size_per_head"),
    **_each(8, "qk_rope_head_dim mamba_d_state state_size ssm_state_size mamba_dt_rank hidden_size_per_layer_input"),
    **_each(8, "laurel_rank"),
    **_each(1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace"),
    **_each(1, "num_dense_layers bos_token_id mamba_n_groups n_groups mamba_ngroups"),
    **_each(VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size n_vocab"),
    **_each(512, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"),
    **_each(12, "sliding_window attention_window_size sliding_window_size window_size local_attention"),
    **_each(12, "attention_chunk_size"),
    **_each(4, "index_block_size index_topk_blocks indexer_n_heads indexer_compress_ratio"),
    **_each(8, "index_topk indexer_budget"),
    **_each(1, "index_local_blocks indexer_kv_heads"),
    **_each(32, "image_size"),
    **_each(8, "patch_size"),
    **_each(0.12, "initializer_range init_std"),
    **_each(24, "query_pre_attn_scalar"),
    **_each(0, "pad_token_id"),
    **_each(2, "eos_token_id"),
}
"""Field of a configuration -> its size in a tiny model."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TWO_ROPES = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
_HALF_FULL = ["linear_attention", "full_attention"] * 2
_HALF_SLIDING = ["sliding_attention", "full_attention"] * 2

_ENCODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl"
)


def _for_each(name: str, value: Any, families: str) -> dict[str, dict[str, Any]]:
    return {family: {name: value} for family in families.split()}


OVERRIDES: dict[str, dict[str, Any]] = {
    **_for_each("is_decoder", True, _ENCODERS),
    "bailing_hybrid": {"layer_types": _HALF_FULL},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cwm": {"layer_types": _HALF_SLIDING},
    "cohere_compass_text": {"layer_types": _HALF_SLIDING, "rope_parameters": _TWO_ROPES},
    "deepseek_v3": {"head_dim": 8},  # of what is rotated; transformers 5.2 keeps it apart
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "gemma3_text": {"layer_types": _HALF_SLIDING},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    **_for_each("sliding_window", None, "mistral mixtral ministral3 starcoder2 phi3 phimoe phi4_multimodal"),
    "ministral": {"layer_types": _HALF_SLIDING},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "kimi_linear": {"layer_types": _HALF_FULL},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _HALF_SLIDING, "activation_sparsity_pattern": [0.0] * 4},
}
"""Model type -> fields that its configuration needs besides `SIZES`."""

_THREE_WAYS = "qwen2_vl qwen2_5_vl qwen2_5_omni paddleocr_vl hunyuan_vl glm4v glm46v glm_ocr"
_SECTIONS: dict[str, list[int]] = {
    **{f"{family}_text": [2, 3, 3] for family in _THREE_WAYS.split()},
    "glm4v_moe_text": [1, 1, 2],
    "ernie4_5_vl_moe_text": [3, 3, 2],
}
"""Model type -> how its half head is split over time, height and width where its configuration does not say."""

_DRAFTS = "it drafts for another model, whose keys it reads, and has none of its own"
NOT_ALONE: dict[str, str] = {"gemma4_assistant": _DRAFTS, "gemma4_unified_assistant": _DRAFTS}
"""Model type -> why it is not built at all."""


class CannotBuildError(Exception):
    """A class of which no tiny model can be made; the message says why."""


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """Return a small configuration of a class, its parts made small likewise.

    Args:
        config_class: a configuration class of transformers.
        changes: fields that replace the small ones.
    """
    whole = config_class()
    # In transformers 5.2 configurations are no dataclasses: what they have are attributes.
    fields = dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else None
    known = {field.name for field in fields} if fields is not None else set(vars(whole))
    given = {
        name: size
        for name in known
        if (size := SIZES.get(name)) is not None and name not in config_class.attribute_map and _is_number(whole, name)
    }
    if "kv_lora_rank" in known and "num_key_value_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    rope = getattr(whole, "rope_parameters", None) or {}
    if "mrope_section" in rope or config_class.model_type in _SECTIONS:
        given["rope_parameters"] = rope | {"mrope_section": _SECTIONS.get(config_class.model_type, [2, 3, 3])}
    given |= OVERRIDES.get(config_class.model_type, {})
    for name in config_class.sub_configs:
        part = getattr(whole, name, None)
        if isinstance(part, PreTrainedConfig) and name not in changes and name not in given:
            given[name] = tiny_config(type(part))
    return config_class(**{**given, **changes})


def _is_number(config: PreTrainedConfig, name: str) -> bool:
    return isinstance(vars(config).get(name), int | float | None)  # an attribute may differ by layer and then raises


def tiny_of(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a new tiny model of a model type, in fp32 and evaluation mode, the same every time.

    Args:
        family: a key of `CAUSAL` or `IMAGE_TEXT`.
        seed: another seed is another model.
        changes: fields of its configuration.

    Raises:
        CannotBuildError: it cannot be made small, or transformers cannot make it without something that is missing.
    """
    if family in NOT_ALONE:
        raise CannotBuildError(NOT_ALONE[family])
    auto: Any = AutoModelForCausalLM if family in CAUSAL else AutoModelForImageTextToText
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = auto.from_config(tiny_config(CONFIG_MAPPING[family], **changes))
            _randomise(model.named_parameters())
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        raise CannotBuildError(f"{type(error).__name__}: {first[0][:160]}") from error
    if getattr(model, "generation_config", None) is not None:  # a model that acts, as PI0, has none
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model.eval()


def _randomise(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Draw weights that make neither flat attention nor outputs that all look alike."""
    for name, parameter in parameters:
        if parameter.dim() >= 2 and "A_log" not in name:
            parameter.data.normal_(0.0, 0.12)
        elif name.endswith("sinks"):
            parameter.data.normal_(0.0, 1.5)
