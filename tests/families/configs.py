"""Tiny configs of every family in transformers' table of causal language models.

Most families get one by rule: `SIZES` replaces every size that a config has, and lists of layer kinds are cut so that
each kind occurs. `CHANGES` has what the rule does not know.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

LAYERS = 4
VOCABULARY = 64
MAX_PARAMETERS = 3_000_000

SIZES: dict[str, Any] = {
    # width and depth
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"], LAYERS),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"], 48),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads"], 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(["head_dim", "global_head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 128),
    "rotary_dim": 4,
    "sliding_window": 8,
    # tokens; weights far from zero, so that logits differ
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "type_vocab_size": 2,
    "initializer_range": 0.2,
    "init_std": 0.2,
    # experts of the base
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"], 16),
    "moe_shared_expert_intermediate_size": 16,
    **dict.fromkeys(["n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "first_k_dense_replace"], 1),
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # state-space layers and linear attention
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"], 8),
    **dict.fromkeys(["mamba_headdim", "mamba_d_state", "ssm_state_size", "state_size", "mamba_dt_rank"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "mamba_chunk_size", "chunk_size", "time_step_rank"], 8),
    **dict.fromkeys(["mamba_n_groups", "n_groups"], 1),
    "mamba_d_ssm": 64,
    "linear_conv_kernel_dim": 4,
    **dict.fromkeys(["lru_width", "attention_hidden_size"], 32),
    # Gemma 3n and 4
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
}
OPTIONAL = {"sliding_window", "head_dim", "q_lora_rank", "rotary_dim", "intermediate_size"}  # None has a meaning
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
MAMBA_AND_ATTENTION = ["mamba", "attention"] * 2

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "cpmant": {"dim_head": 8, "dim_ff": 48, "prompt_length": 4, "prompt_types": 2, "segment_types": 4},
    "dots3_note_text": {"num_key_value_heads": 4, "num_attention_heads": 4, "shared_experts_intermediate_size": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "max_seq_len": 128,
    },
    "fuyu": {"text_config": {"model_type": "persimmon"}, "patch_size": 4, "num_channels": 1},
    "gemma3": {
        "vision_config": TOWER,
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8, "num_heads": 4},
    "granitemoehybrid": {"layer_types": MAMBA_AND_ATTENTION},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"], "attention_window_size": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "roc_bert": {
        "shape_vocab_size": 64,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 8,
        "pronunciation_embed_dim": 8,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "n_mamba_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "zamba2": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "num_key_value_heads": 4,
    },
    "qwen4_exp_text": INDEXER,
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str, **more: Any) -> PreTrainedConfig:
    """Return the config of a family with 4 layers of width 32."""
    return _small(CONFIG_MAPPING[family], **(CHANGES.get(family, {}) | more))


def _small(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    default = kind().to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in _fields(kind, default)}
    sizes = {n: size for n, size in sizes.items() if n not in OPTIONAL or default.get(n) is not None}
    if "decoder_layers" in sizes:  # in an encoder-decoder, num_hidden_layers is the encoder's
        sizes.pop("num_hidden_layers", None)
        sizes["encoder_layers"] = LAYERS
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in LAYER_KINDS:
        kinds = list(dict.fromkeys(default.get(name) or []))
        if kinds:
            sizes[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    sub_configs: Any = kind.sub_configs or {}
    for name, sub in sub_configs.items():
        is_used = default.get(name) is not None or "text" in name
        if is_used and name not in changes and sub.__name__ != "AutoConfig":
            sizes[name] = _small(sub).to_dict()
    return kind(**(sizes | changes))


def _fields(kind: type[PreTrainedConfig], default: dict[str, Any]) -> set[str]:
    annotated = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    return set(default) | annotated | set(kind.attribute_map)


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a frozen random model in evaluation mode; same config, same weights.

    Raises:
        ValueError: It is too large to be tiny: a size is missing in `SIZES` or `CHANGES`.
    """
    with torch.device("meta"):
        parameters = list(AutoModelForCausalLM.from_config(config).named_parameters())
    total = sum(parameter.numel() for _, parameter in parameters)
    if total > MAX_PARAMETERS:
        largest = max(parameters, key=lambda pair: pair[1].numel())
        raise ValueError(f"{total:,} parameters; the largest is {largest[0]}, {tuple(largest[1].shape)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
