"""Calibration as a whole: its texts, its settings, and where it was interrupted."""

import dataclasses
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_cases import SMALL, text, texts
from tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedTokenizerFast

from moekv import CalibratedRouter, CalibrationConfig, MoERouterPress, calibrate
from moekv.calibration.calibrate import find_domains
from moekv.calibration.needs import Needs, calibration_needs
from moekv.calibration.oracle import Oracle, Reading
from moekv.calibration.ridge import Sums


def test_calibration_ranks_better_than_chance_and_is_repeatable(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model()
    first = calibrate(model, tokenizer, texts(24), config=SMALL, progress=False)
    again = calibrate(model, tokenizer, texts(24), config=SMALL, progress=False)
    for (name, one), (_, other) in zip(
        first.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    curve = first.recipe["curve"]
    assert len(curve) == SMALL.epochs + 1
    # Chance misses (0.5 + 0.75 + 0.9) / 3 = 0.717; a model of random weights has little to find.
    assert min(row["ranking_loss"] for row in curve) < 0.7
    assert first.recipe["num_texts"] == 24


@pytest.mark.parametrize("how", ["train mode", "autocast", "inference mode", "no gradients"])
def test_a_model_is_read_as_it_answers(how: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Without dropout and in its own dtype, whatever surrounds the calibration."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj, nn.Dropout(0.5))
    plain = calibrate(model, tokenizer, texts(8), config=SMALL, progress=False)
    around: dict[str, AbstractContextManager[Any]] = {
        "train mode": nullcontext(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "inference mode": torch.inference_mode(),
        "no gradients": torch.no_grad(),
    }
    model.train(how == "train mode")
    state = torch.get_rng_state()
    with around[how]:
        other = calibrate(model, tokenizer, texts(8), config=SMALL, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == (how == "train mode") for module in model.modules())
    for (name, one), (_, its) in zip(
        plain.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(one, its), name


def test_a_model_in_a_block_is_not_read(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    with MoERouterPress()(model), pytest.raises(RuntimeError, match="outside of a press's block"):
        calibrate(model, tokenizer, texts(8), config=SMALL, progress=False)


def test_an_interrupted_calibration_goes_on(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = tiny_model(), tmp_path / "checkpoint.pt"
    whole = calibrate(model, tokenizer, texts(12), config=SMALL, progress=False)
    read, calls = Oracle.read, []

    def fail_at_the_tenth(self: Oracle, words: str, **options: Any) -> Reading:
        calls.append(words)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return read(self, words, **options)

    monkeypatch.setattr(Oracle, "read", fail_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, texts(12), config=SMALL, checkpoint=file, progress=False)
    with pytest.raises(ValueError, match="another model, other texts or other settings"):
        calibrate(model, tokenizer, texts(11), config=SMALL, checkpoint=file, progress=False)
    resumed = calibrate(model, tokenizer, texts(12), config=SMALL, checkpoint=file, progress=False)
    assert len(calls) == 10 + 4  # texts 9 to 12
    for name, one in whole.state_dict().items():
        assert torch.equal(one, resumed.state_dict()[name]), name
    assert list(tmp_path.iterdir()) == []


def test_layers_in_groups_are_fitted_as_all_at_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is interrupted in the second group, whose first has a file of its own."""
    model, file = tiny_model(), tmp_path / "checkpoint.pt"
    settings = dataclasses.replace(SMALL, experts=("expected", "semantic"))
    told: list[Needs] = []
    options: dict[str, Any] = {"config": settings, "progress": False, "announce": told.append}
    whole = calibrate(model, tokenizer, texts(12), **options)
    together = told[0].memory
    with pytest.raises(ValueError, match=r"expected a memory of [\d.]+ MiB or more, got 1\.0 KiB"):
        calibrate(model, tokenizer, texts(12), memory=1000, **options)
    options |= {"checkpoint": file, "memory": together - 1}
    held, read, calls = [], Oracle.read, []
    empty = Sums.empty

    def counted(router: CalibratedRouter, num_layers: int, num_domains: int) -> Sums:
        held.append(num_layers)
        return empty(router, num_layers, num_domains)

    def fail_at_the_last(self: Oracle, words: str, **options: Any) -> Reading:
        calls.append(words)
        if len(calls) == 24:
            raise KeyboardInterrupt
        return read(self, words, **options)

    monkeypatch.setattr(Sums, "empty", counted)
    monkeypatch.setattr(Oracle, "read", fail_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, texts(12), **options)
    assert held == [1, 1]  # layers at a time
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-layers-0-0.pt",
        "checkpoint-layers-1-1.pt",
    ]
    with pytest.raises(ValueError, match="checkpoints of groups of 2 layers, got .*-0-0"):
        calibrate(model, tokenizer, texts(12), **options | {"memory": together})
    resumed = calibrate(model, tokenizer, texts(12), **options)
    assert len(calls) == 24 + 4  # texts 9 to 12 of the second group
    assert told[-1].memory < together and len(told[-1].groups) == 2
    assert "1 of 2 layers at a time: every text is read 2 times" in str(told[-1])
    curve = whole.recipe["curve"]
    assert resumed.recipe["curve"] == curve
    assert curve[-1]["choice_loss"] != curve[0]["choice_loss"]  # the gates were trained
    for name, one in whole.state_dict().items():
        assert torch.equal(one, resumed.state_dict()[name]), name
    assert list(tmp_path.iterdir()) == []


def test_what_a_large_model_takes() -> None:
    """Llama-3.1-8B's layers: 32 of hidden size 4,096 with 8 KV heads."""
    router = CalibratedRouter(
        model="",
        layers=range(32),
        hidden_size=4096,
        num_kv_heads=8,
        experts=["expected"],
        top_k=2,
    )
    needs = calibration_needs(router, CalibrationConfig(), itemsize=2)
    assert needs.memory <= 8 << 30
    assert [x for rows in needs.groups for x in rows] == list(range(32))
    whole = calibration_needs(router, CalibrationConfig(), itemsize=2, memory=1 << 40)
    assert len(whole.groups) == 1
    # The equations by hand: 4 domains, (4096 + 3 + 2 * 8 + 1) features squared, float32.
    assert needs.disk == whole.disk > 32 * 4 * 4116**2 * 4
    with pytest.raises(ValueError, match=r"expected a memory of \d\.\d GiB or more, got 1\.0 GiB"):
        calibration_needs(router, CalibrationConfig(), itemsize=2, memory=1 << 30)


WIDE = """
import torch
from memory import peak_mib
from moekv import CalibratedRouter
from moekv.calibration.ridge import Sums, solve

torch.set_num_threads(1)


def run(size):
    router = CalibratedRouter(
        model="", layers=[0], hidden_size=size, num_kv_heads=1, experts=[], top_k=1
    )
    sums = Sums.empty(router, 1, 3)
    sums.gram[:] = torch.eye(sums.gram.shape[-1])
    solve(sums, router, 1e-3)


run(10)  # what libraries take once
print(peak_mib(lambda: run(1000)))
"""


def test_no_more_memory_than_is_told() -> None:
    """Of one wide layer, whose equations are what memory is taken by, in a process of its own."""
    router = CalibratedRouter(
        model="", layers=[0], hidden_size=1000, num_kv_heads=1, experts=[], top_k=1
    )
    needs = calibration_needs(router, dataclasses.replace(SMALL, domains=3), itemsize=4)
    helpers = Path(__file__).parents[1] / "helpers"
    done = subprocess.run(
        [sys.executable, "-c", WIDE],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{helpers}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == 0, done.stderr
    assert 0.3 * needs.memory < float(done.stdout) * 2**20 < needs.memory


def test_texts_that_are_alike_are_one_domain() -> None:
    centres = torch.eye(3, 16)
    noise = 0.1 * torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    kinds = [i % 3 for i in range(30)]
    found = find_domains(5 + centres[kinds] + noise, 3)
    assert len(set(zip(kinds, found, strict=True))) == 3
    assert set(find_domains(torch.ones(2, 4), 3)) == {0}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"length": 3}, "length an integer >= 64, got 3"),
        ({"exponent": 0.5}, "exponent between 1 and inf, got 0.5"),
        ({"held_out": 0.9}, "held_out between 0 and 0.5, got 0.9"),
        ({"top_k": True, "epochs": -1}, "epochs an integer >= 0, got -1"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CalibrationConfig(**options)


def test_too_few_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="two or more texts of 64 tokens or more, got 1"):
        calibrate(tiny_model(), tokenizer, ["w1 w2", text(80)], config=SMALL, progress=False)
