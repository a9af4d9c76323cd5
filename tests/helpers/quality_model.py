"""The model on which the quality benchmark is tested."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_model(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        **options,
    )
    return LlamaForCausalLM(config).eval()
