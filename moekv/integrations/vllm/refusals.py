"""Configurations that are refused, before anything runs."""

from __future__ import annotations

from typing import Any

from moekv.integrations.vllm.options import ServingOptions
from moekv.integrations.vllm.plugin import check_version, logger

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""Every layer attends to the whole text, and turns all of a head as Llama does."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Whose angles are in proportion to positions."""


def check_engine(config: Any, options: ServingOptions) -> None:
    """Raise ``ValueError`` or ``RuntimeError`` for an engine that moekv cannot serve.

    Parameters
    ----------
    config : VllmConfig
    options : ServingOptions
    """
    check_version()
    text, parallel = config.model_config.hf_text_config, config.parallel_config
    names = config.model_config.hf_config.architectures or []
    if not set(names) & set(ARCHITECTURES):
        raise ValueError(
            f"moekv: expected a model among {', '.join(ARCHITECTURES)}, got {', '.join(names)}"
        )
    if window := config.model_config.get_sliding_window():
        raise ValueError(
            f"moekv: expected full attention in every layer, got sliding windows of {window}"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    if (kind := rope.get("rope_type", "default")) not in ROPE_TYPES:
        raise ValueError(f"moekv: expected rope_type among {', '.join(ROPE_TYPES)}, got {kind!r}")
    if (cache := config.cache_config.cache_dtype) not in ("auto", "bfloat16", "float16"):
        raise ValueError(f"moekv: expected kv_cache_dtype 'auto', got {cache!r}")
    if config.speculative_config is not None:
        raise ValueError("moekv: expected no speculative decoding, got a speculative_config")
    if config.kv_transfer_config is not None:
        raise ValueError("moekv: expected no KV connector, got a kv_transfer_config")
    if options.interval is not None and config.cache_config.enable_prefix_caching:
        raise ValueError(
            "moekv: expected enable_prefix_caching=False with interval, got True: what later parts "
            "of a prompt compute has seen fewer pairs"
        )
    if config.model_config.enable_prompt_embeds:
        raise ValueError("moekv: expected prompts of tokens, got enable_prompt_embeds")
    if config.use_v2_model_runner:
        raise ValueError("moekv: expected vLLM's model runner V1, got V2")
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if (size := getattr(parallel, name, 1)) > 1:
            raise ValueError(f"moekv: expected {name} 1, got {size}")


def check_layer(name: str, value: object) -> None:
    """Raise ``ValueError`` for what one layer's attention has beyond queries, keys and values."""
    if value is not None:
        raise ValueError(f"moekv: expected attention without {name}, got {value!r}")


def say(config: Any, options: ServingOptions) -> None:
    """Say once what is at work, and what it costs."""
    logger.info(
        "moekv compresses prompts: compression_ratio %s, budget %r, blocks of %d tokens",
        options.compression_ratio,
        options.budget,
        config.cache_config.block_size,
    )
