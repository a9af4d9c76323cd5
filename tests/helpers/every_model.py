"""Tiny random models of every architecture that transformers knows."""

import inspect
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

TEXT_MODELS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_MODELS = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(TEXT_MODELS))

_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim_model", "embedding_size", "emb_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HEADS += ("decoder_attention_heads", "encoder_attention_heads")
_WIDE = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim")
_WIDE += ("dff", "dim_ff", "n_inner", "d_ff", "d_inner", "intermediate_size_mlp")
_MOE = ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size")
_MOE += ("shared_intermediate_size", "moe_shared_expert_intermediate_size", "lru_width")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "zero_expert_num")
_GROUPS = ("n_group", "num_expert_group", "topk_group")
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_LAYERS += ("encoder_layers",)

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "is_decoder": True,
    "bos_token_id": 1,
    "initializer_range": 0.2,  # the default, 0.02, makes attention all but uniform
    **dict.fromkeys(_HIDDEN, 64),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_WIDE, 96),
    **dict.fromkeys(_MOE, 32),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_CHOSEN, 2),
    **dict.fromkeys(_GROUPS, 1),
    **dict.fromkeys(_LENGTHS, 512),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "d_kv", "d_head", "kv_channels"), 16),
    **dict.fromkeys(("attention_head_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("rotary_dim", "hidden_size_per_layer_input", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    "linear_num_key_heads": 2,
    "mamba_d_ssm": 128,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "v_head_dim": 12,
    "lru_width": 64,
    "attention_hidden_size": 128,
}
_ALWAYS = ("head_dim", "num_key_value_heads", "vocab_size")
"""What is given where the default is None, too."""

_VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads",), 2),
    **dict.fromkeys(("codebook_size", "num_embeddings", "out_hidden_size"), 64),
    "text_hidden_size": 64,
    "image_size": 56,
    "patch_size": 14,
    "head_dim": 16,
}

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_WITH_MROPE = ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm46v_text", "glm_ocr_text")
_WITH_MROPE += ("paddleocr_vl_text", "qwen2_5_omni_text")
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_WITH_MROPE, {"rope_parameters": _MROPE}),
    "blt": {"encoder_hash_byte_group_vocab": 128},
    **dict.fromkeys(
        ("kosmos_2_text_model", "kosmos_2_5_text_model"),
        {"layers": 4, "attention_heads": 4, "embed_dim": 64, "init_std": 0.2},
    ),
    "bamba": {"attn_layer_indices": [1, 3], "layer_types": None},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dots1": {
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe_text": {"rope_parameters": _MROPE | {"mrope_section": [3, 3, 2]}},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "intermediate_size": 96,
        "activation_sparsity_pattern": None,
        "layer_types": [
            *("sliding_attention", "full_attention", "sliding_attention"),
            *("full_attention", "full_attention"),
        ],
        "num_hidden_layers": 5,
    },
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text"),
        {
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_hidden_layers": 6,
        },
    ),
    "glm4v_moe_text": {
        "rope_parameters": _MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_expand": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "layer_types": None},
    "kimi_linear": {"head_dim": 16, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"layer_types": None, "num_heads": 8, "head_dim": 16},
    "hunyuan_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 2, 2, 2]}},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    **dict.fromkeys(
        ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), {"vision_start_token_id": 122}
    ),
    "Qwen2VLVisionConfig": {"hidden_size": 64},  # of what it hands to the text
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "rwkv": {"attention_hidden_size": 64},
    "step3p5": {"sliding_window": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""What sizes alone do not make consistent."""


def tiny_config(kind: type[PreTrainedConfig], is_text: bool = True) -> PreTrainedConfig:
    """Shrink a default configuration; each kind of layer that it has stays."""
    default: Any = kind()
    known = {name for name in vars(default) if not name.startswith("_")}
    known |= set(inspect.signature(kind.__init__).parameters)
    sizes: dict[str, Any] = {}
    for name in kind.sub_configs:
        if (part := getattr(default, name, None)) is not None:
            speaks = any(x in name for x in ("text", "thinker", "llm", "decoder", "language"))
            sizes[name] = tiny_config(type(part), speaks)
    for name, value in (_SIZES if is_text else _VISION).items():
        own = _default(default, name)
        given = name in _ALWAYS or own is not None
        if name in known and name not in kind.sub_configs and given:
            sizes[name] = [value] * len(own) if isinstance(own, list | tuple) else value
    if is_text:
        sizes |= _text_sizes(kind, default, known)
    if "qk_rope_head_dim" in sizes:  # all heads are made of one latent
        sizes |= {"head_dim": 8, "num_key_value_heads": 4}
    sizes |= _OWN.get(kind.model_type, {}) | _OWN.get(kind.__name__, {})
    sizes = {name: x for name, x in sizes.items() if x is not None or name != "layer_types"}
    try:
        made = kind(**sizes)
    except AttributeError:  # whose kinds of layers follow from others of its options
        sizes.pop("layer_types", None)
        made = kind(**sizes)
    parts = {name: sizes[name] for name in kind.sub_configs if name in sizes}
    if not all(hasattr(made, name) for name in parts):  # older ones read mappings
        made = kind(**sizes | {name: part.to_dict() for name, part in parts.items()})
    return made


def _default(config: Any, name: str) -> Any:
    """Read an option; None where each layer has its own."""
    try:
        return getattr(config, name, None)
    except (RuntimeError, ValueError):
        return None


def _text_sizes(kind: type[PreTrainedConfig], default: Any, known: set[str]) -> dict[str, Any]:
    special = {"eos_token_id": None, "pad_token_id": 0}
    sizes: dict[str, Any] = {name: x for name, x in special.items() if name in known}
    if kinds := getattr(default, "layer_types", None):
        sizes["layer_types"] = _each_kind(kinds)
    elif kind.model_type.startswith("mistral"):  # newer ones have no window
        sizes["sliding_window"] = None
    depth = len(sizes.get("layer_types", "four"))
    sizes |= {name: depth for name in _LAYERS if name in known}
    ropes = getattr(default, "rope_parameters", None)
    if isinstance(ropes, dict) and "mrope_section" in ropes:
        section = [2, 3, 3] if ropes.get("partial_rotary_factor", 1) == 1 else [1, 1, 2]
        sizes["rope_parameters"] = ropes | {"mrope_section": section}
    return sizes


def _each_kind(kinds: list[str]) -> list[str]:
    """At least four layers, of each kind one, of full attention the last."""
    some = list(dict.fromkeys(kinds))
    if "full_attention" in some:
        some.remove("full_attention")
        some += ["full_attention"] * 2
    return (some * 4)[-4:] if len(some) < 4 else some


def build(name: str) -> PreTrainedModel:
    """Build the tiny model of an entry of the auto-mappings."""
    kind = CONFIG_MAPPING[name]
    is_text = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    of = (MODEL_FOR_CAUSAL_LM_MAPPING if is_text else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)[kind]
    if isinstance(of, tuple):
        of = of[0]
    config = tiny_config(kind)
    if not issubclass(kind, of.config_class) and kind is not of.config_class:
        text = config.get_text_config(decoder=True)
        config = text if isinstance(text, of.config_class) else config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return of(config).eval()
