"""Calibrated routers that are none, that cannot be read, or that do not fit."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peers import peer
from random_router import random_router
from refusals import LENGTH, assert_untouched, lengths, refuse_block
from tiny_models import prefill, tiny_model, tokens
from transformers import DynamicCache

from moekv import CalibratedRouter, DecodingConfig, MoERouterPress, load_cache, save_cache
from moekv.calibration import router as router_module
from moekv.models.fingerprint import fingerprint, short

UNSEEN = "tokens have all been fed in a block of this press.*router=None"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": "semantic"}, "no shared beside a calibrated router.*got 'semantic'"),
        ({"shared": None}, "no shared beside a calibrated router.*got None"),
        ({"policy": "dominant"}, "no calibrated router with policy 'dominant'"),
    ],
)
def test_options_beside_a_calibrated_router(options: dict[str, Any], message: str) -> None:
    router = random_router(tiny_model())
    with pytest.raises(ValueError, match=f"{message}.*router=None"):
        MoERouterPress(router=router, **options)


def test_what_is_no_calibrated_router() -> None:
    with pytest.raises(TypeError, match="expected router a moekv.CalibratedRouter.*got int"):
        MoERouterPress(router=3)
    with pytest.raises(ValueError, match="top_k between 1 and 3 experts, got 4"):
        random_router(tiny_model(), top_k=4)
    with pytest.raises(ValueError, match="expected an expert among .*, got 'learned'"):
        random_router(tiny_model(), experts=["learned", "semantic"])


def refuse_name(name: Any) -> None:
    message = f"hub id of a calibrated router, got '{re.escape(str(name))}', .*none can be read"
    with pytest.raises(ValueError, match=message):
        MoERouterPress(router=str(name))


def test_routers_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (tmp_path / "nowhere", "./nowhere", "a/b/c", tmp_path):  # the last is empty
        refuse_name(name)
    press = MoERouterPress(router="nobody/nothing")  # a constructor asks no hub
    message = "hub id of a calibrated router, got 'nobody/nothing', .*none can be read"
    with pytest.raises(ValueError, match=message), press(tiny_model()):
        pass
    with pytest.raises(ValueError, match="config.json cannot be found"):
        MoERouterPress(router=str(tmp_path))
    assert capsys.readouterr().out == ""


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def widen(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 32}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", cut),
        ("config.json", Path.unlink),
        ("config.json", widen),
        ("model.safetensors", cut),
        ("model.safetensors", Path.unlink),
    ],
)
def test_routers_that_cannot_be_read(
    name: str,
    damage: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    random_router(tiny_model()).save_pretrained(tmp_path)
    MoERouterPress(router=str(tmp_path))  # it can, before
    damage(tmp_path / name)
    refuse_name(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_router_of_an_earlier_format(tmp_path: Path) -> None:
    random_router(tiny_model()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("format") == 2
    for found in ({}, {"format": 3}):
        file.write_text(json.dumps(config | found))
        message = f"format 2, got one of format {found.get('format', 1)}.*`moekv calibrate`"
        with pytest.raises(ValueError, match=message):
            MoERouterPress(router=str(tmp_path))


def test_router_of_another_model() -> None:
    model, other = tiny_model(), tiny_model("qwen2")
    names = f"a tiny model \\({short(fingerprint(model))}\\).*{short(fingerprint(other))}"
    refuse_block(ValueError, names, other, MoERouterPress(router=random_router(model)))


# --- Tokens that a router has not seen ------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CalibratedRouter:
    """A router that comes with the package for the tiny model."""
    router = random_router(tiny_model())
    router.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(router_module, "SHIPPED", tmp_path)
    return router


def test_tokens_that_a_calibrated_router_has_not_seen(shipped: CalibratedRouter) -> None:
    model, config = tiny_model(), DecodingConfig(20, 5)
    cache = prefill(model, tokens(1, LENGTH))
    press = MoERouterPress(router=shipped, budget="uniform", decoding=config)
    with pytest.raises(RuntimeError, match=UNSEEN), press(model):
        model(tokens(1, 1), past_key_values=cache)
    assert_untouched(model, press, cache)
    # Some tokens outside of the block are enough.
    cache = DynamicCache()
    with torch.no_grad():
        with press(model):
            model(tokens(1, LENGTH), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
        with pytest.raises(RuntimeError, match=UNSEEN), press(model):
            model(tokens(1, 1), past_key_values=cache)
        assert cache.get_seq_length() == LENGTH + 1 and lengths(cache) == [20 + 1] * 2
        with MoERouterPress(router=None, decoding=DecodingConfig(9, 3))(model):
            model(tokens(1, 1), past_key_values=cache)
        # Another press has gone on without notes: there are none any more.
        with pytest.raises(RuntimeError, match=UNSEEN), press(model):
            model(tokens(1, 1), past_key_values=cache)


def test_notes_of_another_router(shipped: CalibratedRouter, tmp_path: Path) -> None:
    """What one has read of the tokens that stay means nothing to another."""
    model = tiny_model()
    routers = {seed: random_router(model, seed) for seed in (1, 2)}
    alike = random_router(model, 1)
    alike.gate_bias += 1.0  # which is no matter of notes

    def ask(router: CalibratedRouter, cache: Any) -> None:
        press = MoERouterPress(router=router, decoding=DecodingConfig(20, 5))
        with press(model), torch.no_grad():
            for _ in range(7):
                model(tokens(1, 1), past_key_values=cache)

    press = MoERouterPress(router=routers[1], decoding=DecodingConfig(20, 5))
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
    save_cache(cache, tmp_path / "cache", model)
    for each in (cache, load_cache(tmp_path / "cache", model)):
        with pytest.raises(RuntimeError, match="or of another router"):
            ask(routers[2], each)
        assert each.get_seq_length() == LENGTH
        ask(alike, each)
        assert each.get_seq_length() == LENGTH + 7


def test_the_packages_own_router_gives_way(shipped: CalibratedRouter) -> None:
    """Nobody has asked for it. But once it has rated, it is not given up in silence."""
    model, config = tiny_model(), DecodingConfig(20, 5)
    cache, press = prefill(model, tokens(1, LENGTH)), MoERouterPress(decoding=config)
    with press(model), torch.no_grad():
        model(tokens(1, 1), past_key_values=cache)
    assert press.get_stats()["router"] == "none, not calibrated"
    assert sum(sum(layer.count_pairs([0])) for layer in cache.layers) == 2 * 2 * 20
    press = MoERouterPress(decoding=config)
    with press(model), torch.no_grad():
        prefill(model, tokens(1, LENGTH))
        cache = prefill(tiny_model(), tokens(1, LENGTH))  # the same model, outside of the block
        with pytest.raises(RuntimeError, match=UNSEEN):
            model(tokens(1, 1), past_key_values=cache)
    assert "calibrated for" in press.get_stats()["router"]


@pytest.mark.parametrize("asked", [True, False])
def test_calibrated_routers_and_kvpress_decoding(shipped: CalibratedRouter, asked: bool) -> None:
    model = tiny_model()
    cache = prefill(model, tokens(1, LENGTH))
    press = MoERouterPress(router=shipped) if asked else MoERouterPress()
    wrapper = peer("DecodingPress")(press, compression_interval=3, target_size=16)
    with wrapper(model), torch.no_grad():
        model(tokens(1, 1), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
        if asked:
            with pytest.raises(RuntimeError, match=UNSEEN):
                model(tokens(1, 1), past_key_values=cache)
            assert lengths(cache)[0] == LENGTH + 3
            return
        model(tokens(1, 1), past_key_values=cache)
    assert lengths(cache)[1] == 16
    assert press.get_stats()["router"] == "none, not calibrated"


def test_weights_that_change_under_a_press(shipped: CalibratedRouter) -> None:
    model, press = tiny_model(), MoERouterPress(0.5)

    def name() -> str:
        with press(model):
            prefill(model, tokens(1, LENGTH))
        return str(press.get_stats()["router"])

    assert "calibrated for" in name()
    model.model.layers[0].input_layernorm.weight.data[::2] += 0.1
    with pytest.raises(ValueError, match="other weights.*reset_stats"):
        name()
    press.reset_stats()
    assert "not calibrated" in name()
