"""A chat whose cache never grows beyond its budget."""

import sys

import torch
from transformers import DynamicCache

from moekv import DecodingConfig, MoERouterPress, load_model
from moekv.cache.layer import CompressedLayer

TURNS = ("Hello! Who are you?", "What is a lighthouse?", "Who lives there?", "Good night!")

model, tokenizer = load_model(*sys.argv[1:2])
# Compressed to 64 pairs a head after every 32 tokens.
press = MoERouterPress(decoding=DecodingConfig(target=64, interval=32))
cache = DynamicCache(config=model.config)
ids = torch.empty(1, 0, dtype=torch.long)
with press(model):
    for turn in TURNS:
        asked = tokenizer(f"\nUser: {turn}\nAssistant:", return_tensors="pt").input_ids
        ids = torch.cat([ids, asked], dim=1)
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=24,
            do_sample=False,
        )
        layers = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
        pairs = sum(sum(layer.count_pairs([0])) for layer in layers)
        heads = sum(layer.num_heads for layer in layers)
        print(f"{ids.shape[1]:4} tokens of chat, {pairs / heads:.0f} pairs a head on average")
