"""An expert of your own, beside one of moekv."""

import sys

from torch import Tensor

from moekv import Expert, LayerView, MoERouterPress, load_model


class Loudest(Expert):
    """Scores pairs by their values: large ones add most to the output of attention."""

    name = "loudest"

    def scores(self, view: LayerView) -> Tensor:
        """Score every pair: [B, H, T]; pairs with higher scores are retained."""
        return view.values.square().sum(dim=-1)


model, tokenizer = load_model(*sys.argv[1:2])
text = "The lamp of the lighthouse was lit at nine, and the keeper wrote down the hour. " * 20
input_ids = tokenizer(text, return_tensors="pt").input_ids

press = MoERouterPress(compression_ratio=0.75, experts=["selective", Loudest()])
with press(model):
    model(input_ids)
for index, layer in press.get_stats()["layer_stats"].items():
    rates = layer["expert_compression_stats"]["cache_hit_rates"]
    print(f"layer {index:2}: hit rate of selective {rates['selective']:.2f}", end="")
    print(f", of loudest {rates['loudest']:.2f}")
