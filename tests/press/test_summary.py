"""What a press says that it did, against what is there."""

import pytest
import torch
from press_probes import make_press
from tiny_models import prefill, tiny_model, tokens

from moekv import DecodingConfig

LENGTH = 60


@pytest.mark.parametrize("budget", ["uniform", "layer", "head", "model"])
@pytest.mark.parametrize("ratio", [0.0, 0.6])
def test_kept_pairs_are_those_of_the_cache(budget: str, ratio: float) -> None:
    model, press = tiny_model(), make_press(ratio, budget=budget)
    with press(model):
        cache = prefill(model, tokens(2, LENGTH))
    stats = press.get_stats()
    held = 0
    for index, layer in enumerate(cache.layers):
        if hasattr(layer, "to_dense") and budget in ("head", "model") and ratio:
            heads = layer.to_dense()[2].sum(0).tolist()
        else:
            heads = [2 * layer.keys.shape[2]] * 2
        assert stats["layer_stats"][index]["kept_pairs"] == heads
        held += sum(heads)
    assert stats["cache"]["evictions"] == 2 * 2 * 2 * LENGTH - held
    assert stats["cache"]["bytes_held"] >= held * 2 * 16 * 4
    assert stats["cache"]["bytes_allowed"] is None


def test_the_cache_is_read_while_tokens_come() -> None:
    model, press = tiny_model(), make_press(0.5, decoding=DecodingConfig(target=20, interval=6))
    allowed = 2 * 2 * 26 * 2 * 16 * 4
    with torch.no_grad(), press(model):
        cache = prefill(model, tokens(1, LENGTH))
        evictions = [press.get_stats()["cache"]["evictions"]]
        for step in range(14):
            model(tokens(1, 1, seed=step), past_key_values=cache)
            seen = press.get_stats()
            assert seen["cache"]["bytes_allowed"] == allowed
            evictions.append(seen["cache"]["evictions"])
    assert evictions[0] == 2 * 2 * (LENGTH - 20)
    assert evictions[-1] == evictions[0] + 2 * 2 * 6 * 2
    heads = [n for layer in seen["layer_stats"].values() for n in layer["kept_pairs"]]
    assert sum(heads) == 2 * 2 * 20
    del cache
    assert press.get_stats()["cache"]["bytes_held"] is None


def test_summary_says_what_was_done_in_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    model, press = tiny_model(), make_press(0.6, num_experts=4, router_type="pikv")
    press.summary()
    assert "nothing has been compressed" in capsys.readouterr().out
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
    press.summary()
    out = capsys.readouterr().out
    stats = press.get_stats()
    assert len(out.splitlines()) <= 12
    for part in ("pikv, not calibrated", "model (asked for: auto)", "60.0% of the pairs"):
        assert part in out
    sums = [sum(layer["kept_pairs"]) for layer in stats["layer_stats"].values()]
    assert f"{min(sums)} pairs" in out and str(max(sums)) in out
    assert "expected 90.0%" in out and "selective" in out and "iB held" in out
    del cache
