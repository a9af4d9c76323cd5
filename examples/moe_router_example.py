"""Four experts, routed for every token, beside one that all tokens share."""

import sys

from transformers import DynamicCache

from moekv import MoERouterPress, load_model

model, tokenizer = load_model(*sys.argv[1:2])
text = "The lamp of the lighthouse was lit at nine, and the keeper wrote down the hour. " * 20
input_ids = tokenizer(text, return_tensors="pt").input_ids

press = MoERouterPress(
    compression_ratio=0.75, num_experts=4, top_k=2, router_type="pikv", cache_aware=True
)
cache = DynamicCache(config=model.config)
with press(model):
    out = model.generate(input_ids, past_key_values=cache, max_new_tokens=20, do_sample=False)

stats = press.get_stats()
compression = stats["compression"]
print(f"{input_ids.shape[1]} tokens, {compression['ratio']:.0%} of the pairs removed")
print(f"{compression['bytes_before']:,} bytes before, {compression['bytes_after']:,} after")
print("Layer 0, share of the weight and hit rate of each expert:")
first = stats["layer_stats"][0]["expert_compression_stats"]
for name, share in first["expert_usage"].items():
    print(f"  {name:14} {share:6.1%} {first['cache_hit_rates'][name]:6.1%}")
print("It goes on:", tokenizer.decode(out[0, input_ids.shape[1] :], skip_special_tokens=True))
