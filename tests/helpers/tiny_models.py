"""Randomly initialised language models of every attention that the press knows."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

VOCABULARY = 128

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
    # The default, 0.02, makes attention all but uniform.
    "initializer_range": 0.2,
}
_GEMMA = _SHAPE | {"num_hidden_layers": 3, "head_dim": 16, "query_pre_attn_scalar": 24}


def _gemma_text() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        **_GEMMA,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )


_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "llama_mha": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE | {"num_key_value_heads": 4})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=24)),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(
            **_SHAPE,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(_gemma_text()),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_GEMMA,
            sliding_window=16,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            attn_logit_softcapping=2.0,
        )
    ),
    "gemma3_multimodal": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=_gemma_text(),
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
        )
    ),
}
TINY_MODELS = tuple(_MODELS)

_PARTICULAR: dict[str, Callable[[], PreTrainedModel]] = {
    # Neighbours are turned together, with cosines for each channel and for each half of a head.
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_SHAPE, use_qk_norm=True)),
    "glm": lambda: GlmForCausalLM(GlmConfig(**_SHAPE, head_dim=16)),
    # Rotated in half of a head, and attended to by a class for each implementation.
    "nemotron": lambda: NemotronForCausalLM(NemotronConfig(**_SHAPE, head_dim=16)),
    # Normed before they become heads, and after, by a class of its own.
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_SHAPE)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SHAPE, num_experts=4, num_experts_per_tok=2, head_dim=24)
    ),
    # Every fourth layer turns nothing.
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**_SHAPE | {"num_hidden_layers": 4})),
    # Each head's mask, and half of its values, are made of those of all heads.
    "doge": lambda: DogeForCausalLM(DogeConfig(**_SHAPE)),
    "diffllama": lambda: DiffLlamaForCausalLM(DiffLlamaConfig(**_SHAPE)),
    # What keys and values are made of may be what is cached.
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_SHAPE | {"num_key_value_heads": 4},
            kv_lora_rank=24,
            q_lora_rank=40,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=12,
            head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
        )
    ),
    # Normed behind the rotation.
    "hunyuan": lambda: HunYuanDenseV1ForCausalLM(HunYuanDenseV1Config(**_SHAPE, head_dim=16)),
    "nanochat": lambda: NanoChatForCausalLM(NanoChatConfig(**_SHAPE)),
    # With logits beside those of the pairs, and cosines of half a head.
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **_SHAPE,
            head_dim=16,
            sliding_window=16,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    ),
    # Whose positions are learned, and layers called otherwise.
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)
    ),
    # Normed in a way that nobody knows.
    "stablelm": lambda: StableLmForCausalLM(StableLmConfig(**_SHAPE, qk_layernorm=True)),
}
"""Models that form queries in ways of their own."""


def tiny_model(name: str = "llama", attention: str = "sdpa") -> PreTrainedModel:
    """Build a model whose weights depend on its name alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (_MODELS | _PARTICULAR)[name]()
    try:
        if name != "gpt_oss":
            model.set_attn_implementation(attention)
    except ValueError as error:  # Gemma 2 of newer ones, whose logits are capped
        pytest.skip(f"this transformers says: {error}")
    model.generation_config.eos_token_id = None
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: torch.Tensor, **inputs: object) -> DynamicCache:
    """Fill a new cache."""
    cache = DynamicCache(config=model.config)
    model(input_ids, past_key_values=cache, **inputs)
    return cache
