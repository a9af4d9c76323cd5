"""Files that are no caches, or not this model's: a ValueError says why."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from moekv import DecodingConfig, MoERouterPress, load_cache, save_cache
from moekv.cache import storage
from tests.helpers.random_router import random_router
from tests.helpers.tiny_models import tiny_model, tokens

Change = Callable[[dict[str, str], list[dict[str, Any]], dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def file(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ragged cache with all that a layer can have beside its pairs."""
    cache, path = DynamicCache(), tmp_path_factory.mktemp("caches") / "good"
    press = MoERouterPress(0.5, router=random_router(model), decoding=DecodingConfig(20, 4))
    with torch.no_grad(), press(model):
        model(tokens(1, 40), past_key_values=cache)
        for _ in range(2):
            model(tokens(1, 1), past_key_values=cache)
    save_cache(cache, path, model)
    assert load_cache(path, model).get_seq_length() == 42
    return path


def changed(file: Path, change: Change) -> Path:
    """Change a file and give it a checksum that fits, as somebody could who means harm."""
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    layers = json.loads(header["layers"])
    before = header["layers"]
    change(header, layers, tensors)
    if header.get("layers") == before:
        header["layers"] = json.dumps(layers)
    if header.pop("sha256", None) is not None:
        header["sha256"] = storage._checksum(header, tensors)
    other = file.with_name("changed")
    save_file(tensors, other, metadata=header)
    return other


def number(name: str, value: Any, layer: int = 0) -> Change:
    return lambda header, layers, tensors: layers[layer].update({name: value})


def tensor(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    return lambda header, layers, tensors: tensors.update({name: value(tensors[name]).clone()})


def _notes_of_others(header: Any, layers: Any, tensors: dict[str, Tensor]) -> None:
    tensors["0.notes.begin"] = torch.zeros_like(tensors["0.notes.begin"])
    del tensors["0.notes.positions"]


CHANGES: dict[str, tuple[str, Change]] = {
    "fewer layers": ("of 2 layers, got 1", lambda h, n, t: n.pop()),
    "more layers": ("of 2 layers, got 4", lambda h, n, t: n.extend(n[:])),
    "no model": ("expected a header of", lambda h, n, t: h.pop("model")),
    "no checksum": ("expected a header of", lambda h, n, t: h.pop("sha256")),
    "more keys": ("expected a header of", lambda h, n, t: h.update(more="")),
    "another format": ("format", lambda h, n, t: h.update(format="moekv-cache-1")),
    "no fingerprint": ("no fingerprint", lambda h, n, t: h.update(model="../../etc/passwd")),
    "dtype": ("dtype torch.float32", lambda h, n, t: h.update(dtype="torch.float16")),
    "shard": ("shard 0/1", lambda h, n, t: h.update(shard="1/2")),
    "no JSON": ("no JSON", lambda h, n, t: h.update(layers="{")),
    "deep JSON": ("no JSON", lambda h, n, t: h.update(layers="[" * 100_000)),
    "no list": ("a list of layers", lambda h, n, t: h.update(layers="3")),
    "no tensors of a layer": (
        "layer 1: expected tensors",
        lambda h, n, t: [t.pop(name) for name in list(t) if name.startswith("1.")],
    ),
    "no such layer": ("tensors of 2 layers", lambda h, n, t: t.update({"7.x": torch.zeros(1)})),
    "no number": ("tensors of 2 layers", lambda h, n, t: t.update({"-1.x": torch.zeros(1)})),
    "twice": ("each tensor once", lambda h, n, t: t.update({"00.begin": torch.zeros(1)})),
    "unknown tensor": ("expected tensors", lambda h, n, t: t.update({"0.x": torch.zeros(1)})),
    "kind": ("a kind among dense", number("kind", "eval")),
    "another kind": ("expected \\[", number("kind", "dense")),
    "no layer": ("a kind among dense", lambda h, n, t: n.__setitem__(0, 3)),
    "negative": ("expected run an integer", number("run", -1)),
    "true": ("expected most an integer", number("most", True)),
    "huge": ("expected context_length an integer", number("context_length", 10**30)),
    "NaN": ("expected run an integer", number("run", float("nan"))),
    "long run": ("a run of 99 within", number("run", 99)),
    "other length": ("for each of 41 positions", number("context_length", 39, 1)),
    "first": ("first positions of 1 rows", number("first", [1, 2])),
    "first beyond": ("first positions an integer", number("first", [99])),
    "backend": ("backend", number("backend", "os.system")),
    "counted": ("counted pairs", number("counted", [1, 2])),
    "recent": ("size, end and counts", number("recent", {})),
    "many recent": (
        "remembered inputs",
        number("recent", {"size": 10**12, "end": 1, "counts": [1]}),
    ),
    "few recent": ("inputs, got", number("recent", {"size": 1, "end": 40, "counts": [1]})),
    "no notes": ("expected no notes", lambda h, n, t: n[0].pop("notes")),
    "no reader": ("name of a router for notes", number("reader", 7)),
    "nested notes": ("without notes", lambda h, n, t: n[0]["notes"].update(notes=n[1])),
    "other notes": ("those of their layer", lambda h, n, t: n[0]["notes"].update(kind="growing")),
    "short notes": (
        "notes: expected a context of at most 3",
        lambda h, n, t: n[0]["notes"].update(context_length=1),
    ),
    "dtype of pairs": ("stored_keys in F32", tensor("0.stored_keys", Tensor.long)),
    "dtype of tables": ("begin in I32", tensor("0.begin", Tensor.float)),
    "shape of tables": ("expected end", tensor("0.begin", lambda x: x.repeat(1, 2))),
    "rank": ("expected stored_keys", tensor("0.stored_keys", lambda x: x[None])),
    "table beyond": ("within", tensor("0.end", lambda x: x + 10**6)),
    "table before": ("within", tensor("0.begin", lambda x: x - 10)),
    "table backwards": ("within", tensor("0.end", torch.zeros_like)),
    "other positions": ("as many positions as pairs", tensor("0.positions", torch.zeros_like)),
    "fewer positions": ("bytes for 40 positions", tensor("0.positions", lambda x: x[..., 1:])),
    "dtype of positions": ("positions in U8", tensor("0.positions", Tensor.int)),
    "shape of positions": ("expected positions", tensor("0.positions", lambda x: x[:, 1:])),
    "notes of others": ("pairs that are held", _notes_of_others),
    "no checksum that fits": ("checksum", lambda h, n, t: h.pop("sha256") and h.update(sha256="")),
}


def _fewer_notes(header: Any, layers: Any, tensors: dict[str, Tensor]) -> None:
    for name in ("0.notes.stored_keys", "0.notes.stored_values"):
        tensors[name] = tensors[name][1:].clone()


QUANTISED: dict[str, tuple[str, Change]] = {
    "no pairs": ("expected \\['backend'", lambda h, n, t: n[0].pop("pairs")),
    "16": ("pairs among k8v8, k8v4, k4v4, got '16'", number("pairs", "16")),
    "no format": ("pairs among", number("pairs", {"k8v4": 1})),
    "another format": ("codes and scales of", number("pairs", "k4v4")),
    "another kind": ("expected \\['backend'", number("kind", "ragged")),
    "notes of codes": (
        "those of their layer",
        lambda h, n, t: n[0]["notes"].update(kind="quantised"),
    ),
    "no scales": ("expected tensors", lambda h, n, t: t.pop("0.scales")),
    "fewer scales": ("codes and scales of", tensor("0.scales", lambda x: x[:, 1:])),
    "fewer rows of scales": ("expected scales", tensor("0.scales", lambda x: x[1:])),
    "fewer rows of values": ("expected value_codes", tensor("0.value_codes", lambda x: x[1:])),
    "longer codes": ("codes and scales of", tensor("0.key_codes", lambda x: x.repeat(1, 2))),
    "dtype of scales": ("scales in F16", tensor("0.scales", Tensor.float)),
    "dtype of codes": ("key_codes in U8", tensor("0.key_codes", Tensor.int)),
    "table beyond": ("within", tensor("0.end", lambda x: x + 10**6)),
    "waits": ("tokens that wait, and stored ones, got 3", number("waits", 3)),
    "more waits": (
        "expected waiting tokens an integer",
        number("waits", {"tokens": 99, "stored": [0]}),
    ),
    "stored waits": (
        "of waiting tokens that are stored an integer",
        number("waits", {"tokens": 0, "stored": [1]}),
    ),
    "waits of rows": (
        "of waiting tokens that are stored of 1 rows",
        number("waits", {"tokens": 0, "stored": [0, 0]}),
    ),
    "wide heads": (
        "codes and scales of|keys of",
        tensor("0.tail_keys", lambda x: x.new_zeros(*x.shape[:3], 2**20)),
    ),
    "odd heads": (
        "even head dim",
        tensor("0.tail_values", lambda x: x.new_zeros(*x.shape[:3], 15)),
    ),
    "notes of others": ("pairs that are held", _notes_of_others),
    "fewer notes": ("one for each pair", _fewer_notes),
}


BIASED: dict[str, tuple[str, Change]] = {
    "no biases": ("expected tensors", lambda h, n, t: t.pop("0.bias")),
    "fewer biases": ("expected bias", tensor("0.bias", lambda x: x[1:])),
    "dtype of biases": ("bias in F16", tensor("0.bias", Tensor.float)),
    "two of each": ("expected bias", tensor("0.bias", lambda x: x[:, None].repeat(1, 2))),
    "another kind": ("expected tensors", number("kind", "quantised")),
}


@pytest.fixture(scope="module")
def quantised(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised cache with a tail and notes."""
    cache, path = DynamicCache(), tmp_path_factory.mktemp("caches") / "quantised"
    config = DecodingConfig(20, 4)
    press = MoERouterPress(0.9, router=random_router(model), pairs="k8v4", decoding=config)
    with torch.no_grad(), press(model):
        model(tokens(1, 40), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
    save_cache(cache, path, model)
    assert load_cache(path, model).get_seq_length() == 41
    return path


@pytest.mark.parametrize("name", QUANTISED)
def test_files_of_quantised_pairs_that_claim_more_than_they_hold(
    quantised: Path, model: PreTrainedModel, name: str
) -> None:
    message, change = QUANTISED[name]
    with pytest.raises(ValueError, match=message):
        load_cache(changed(quantised, change), model)


@pytest.mark.parametrize("name", BIASED)
def test_files_of_folded_pairs_that_claim_more_than_they_hold(
    model: PreTrainedModel, tmp_path: Path, name: str
) -> None:
    cache, path = DynamicCache(), tmp_path / "folded"
    with torch.no_grad(), MoERouterPress(0.9, router=None, pairs="k8v4", fold=True)(model):
        model(tokens(1, 40), past_key_values=cache)
    save_cache(cache, path, model)
    assert torch.equal(load_cache(path, model).layers[0].rows.bias, cache.layers[0].rows.bias)
    message, change = BIASED[name]
    with pytest.raises(ValueError, match=message):
        load_cache(changed(path, change), model)


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_are_no_caches(file: Path, model: PreTrainedModel, name: str) -> None:
    message, change = CHANGES[name]
    path = changed(file, change)
    if name == "no checksum that fits":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        message, path = "checksum|header", path
    with pytest.raises(ValueError, match=message) as error:
        load_cache(path, model)
    assert str(path) in str(error.value)


def test_caches_of_another_model(file: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    turned = LlamaForCausalLM(
        type(model.config)(
            **model.config.to_dict()
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        )
    )
    turned.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="another architecture, size or rotation"):
        load_cache(file, turned)
    with pytest.raises(ValueError, match="dtype torch.bfloat16, got one with 'torch.float32'"):
        load_cache(file, tiny_model().bfloat16())
    other = tiny_model()
    torch.nn.init.normal_(other.model.layers[0].self_attn.q_proj.weight)
    for layer in other.model.layers:
        layer.input_layernorm.weight.data += 0.01 * torch.randn(64)
    with pytest.raises(ValueError, match="other weights"):
        load_cache(file, other)
    cache = DynamicCache()
    cache.layers = load_cache(file, model).layers[:1]
    with pytest.raises(ValueError, match="of 2 layers, got 1"):
        save_cache(cache, tmp_path / "x", model)
    assert not (tmp_path / "x").exists()


def test_paths_that_are_no_files(file: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    cache = load_cache(file, model)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="expected a file, got"):
            load_cache(path, model)
        with pytest.raises(ValueError, match="expected a file, got"):
            save_cache(cache, path, model)
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "nothing", model)


def test_fuzzed_files(file: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, sizes and offsets that are changed at random: ValueError, whatever it is."""
    monkeypatch.setattr(storage, "check_same", lambda *_: 0.0)  # it takes most of the time
    data, drawn, path = file.read_bytes(), random.Random(0), file.with_name("fuzzed")
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for case in range(150):
        if case % 3 == 0:  # bytes of the header
            broken = bytearray(data)
            for _ in range(drawn.choice([1, 1, 2, 8])):
                broken[drawn.randrange(8 + length)] = drawn.randrange(256)
        elif case % 3 == 1:  # an entry of the table
            table = json.loads(json.dumps(header))
            entry = table[drawn.choice([name for name in table if name != "__metadata__"])]
            what = drawn.choice(["dtype", "shape", "data_offsets"])
            entry[what] = drawn.choice(
                [
                    [],
                    [-1, 0],
                    [2**63, 1],
                    [0, 8],
                    ["x"],
                    None,
                    "F64",
                    "I32",
                    "BOOL",
                    {},
                    [1, 1, 1, 1],
                ]
            )
            text = json.dumps(table).encode()
            broken = bytearray(struct.pack("<Q", len(text)) + text + data[8 + length :])
        else:  # a size, or an end
            size = drawn.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
            broken = bytearray(struct.pack("<Q", size) + data[8 : drawn.randrange(9, len(data))])
        if bytes(broken) == data:
            continue
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="fuzzed"):
            load_cache(path, model)
