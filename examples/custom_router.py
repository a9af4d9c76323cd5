"""A router of your own: tokens with large hidden states count for more."""

import sys

from torch import Tensor

from moekv import BaseMoERouter, MoERouterPress, load_model


class BySize(BaseMoERouter):
    """The importance of a token grows with its hidden state."""

    def _rate(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        logits, _ = super()._rate(hidden_states, mask)  # [B, T, E]
        size = hidden_states.float().square().mean(-1)
        return logits, size / (1 + size)  # importance [B, T], in [0, 1]


model, tokenizer = load_model(*sys.argv[1:2])
text = "The lamp of the lighthouse was lit at nine, and the keeper wrote down the hour. " * 20
input_ids = tokenizer(text, return_tensors="pt").input_ids

hidden = model.config.get_text_config().hidden_size
router = BySize(hidden, 3, 2)  # three experts, two for each token
experts = ["selective", "semantic", "temporal"]
press = MoERouterPress(compression_ratio=0.75, experts=experts, router_type=router)
with press(model):  # every layer works with a copy of the router
    model(input_ids)
for index, layer in press.get_stats()["layer_stats"].items():
    usage = layer["router_stats"]["expert_usage_ratios"]
    print(f"layer {index:2}:", ", ".join(f"{name} {share:.0%}" for name, share in usage.items()))
