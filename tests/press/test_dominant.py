"""The dominant policy: one expert decides a layer."""

import math

import pytest
import torch
from press_probes import LENGTH, Fixed, Routed, compress, kept_positions, make_press
from tiny_models import prefill, tiny_model, tokens

from moekv.press import rater


@pytest.mark.parametrize(
    ("favourite", "kept"),
    [
        (0, [*range(16), *range(72, 80)]),
        (1, [*range(24), *range(64, 80)]),
        (2, [*range(40), *range(56, 80)]),
        (3, [*range(7, 67, 3)]),
    ],
)
def test_dominant_by_hand(favourite: int, kept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The expert with the highest mean probability keeps what it keeps alone, to the position."""
    # Most tokens prefer another expert, by little.
    probs = torch.full((LENGTH, 4), 0.25)
    probs[:60, (favourite + 1) % 4] += 0.01
    probs[:60, favourite] -= 0.01
    probs[60:] = 0
    probs[60:, favourite] = 1
    weights, chosen = probs.topk(2)
    router = Routed(probs, weights, chosen)
    monkeypatch.setattr(rater, "make_router", lambda *_, **__: router)
    scores = torch.zeros(LENGTH)
    scores[7:67:3] = torch.arange(20.0) + 1
    experts = ["aggressive", "moderate", "conservative", Fixed("custom", scores)]
    press = make_press(0.75, experts=experts, policy="dominant")
    model, input_ids = tiny_model(), tokens(2, LENGTH)
    cache, full = compress(press, model, input_ids), prefill(model, input_ids)
    stats = press.get_stats()
    assert stats["compression"]["ratio"] == (LENGTH - len(kept)) / LENGTH
    for index in range(2):
        positions = kept_positions(cache, full, index)
        assert positions.tolist() == [[kept] * 2] * 2
        layer = stats["layer_stats"][index]["expert_compression_stats"]
        names = list(layer["expert_usage"])
        usage = [0.0] * 4
        usage[favourite] = 1.0
        assert list(layer["expert_usage"].values()) == usage
        ratio = layer["compression_ratios"][names[favourite]]
        assert ratio == pytest.approx(1 - len(kept) / LENGTH)
        assert sum(map(math.isnan, layer["compression_ratios"].values())) == 3


def test_dominant_ties_go_to_the_lower_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.full((LENGTH, 3), 1 / 3)
    router = Routed(probs, *probs.topk(2))
    monkeypatch.setattr(rater, "make_router", lambda *_, **__: router)
    cache = compress(make_press(num_experts=3, policy="dominant"), tiny_model(), tokens(1, LENGTH))
    assert cache.layers[0].keys.shape[2] == 24 and cache.get_seq_length() == LENGTH


def test_dominant_layers_of_different_lengths_generate() -> None:
    model = tiny_model()
    experts = [Fixed("long", torch.arange(99.0)), "aggressive"]
    experts[0].kept = lambda length, ratio: 70
    press = make_press(experts=experts, policy="dominant")
    input_ids = tokens(1, 99)
    with press(model):
        prefill(model, input_ids)
        press._rater.routers[1].prior.copy_(torch.tensor([0.0, 5.0]))
        press._rater.routers[0].prior.copy_(torch.tensor([5.0, 0.0]))
        out = model.generate(
            input_ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
    lengths = [layer.to_dense()[2].tolist() for layer in out.past_key_values.layers]
    assert lengths == [[[70 + 4] * 2], [[19 + 9 + 4] * 2]]
    assert out.past_key_values.get_seq_length() == 99 + 4
    assert out.sequences.shape == (1, 99 + 5)
