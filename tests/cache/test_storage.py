"""Saved caches: what comes back, and what is refused."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from moekv.budget import Kept
from moekv.cache.ragged import RaggedLayer
from moekv.cache.storage import load_cache, save_cache
from moekv.models.fingerprint import fingerprint


def make_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def cache(model):
    """Layer 0 dense, the others compressed with a tail of one token."""
    cache = DynamicCache()
    ids = torch.arange(40)[None] % 50
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for index in (1, 2):
            layer = cache.layers[index]
            kept = torch.ones(1, 2, 40, dtype=torch.bool)
            kept[0, 0, ::2] = kept[0, 1, :15] = False
            kept = Kept.from_mask(kept)
            cache.layers[index] = RaggedLayer.compress(layer.keys, layer.values, kept)
        model(ids[:, :1], past_key_values=cache)
    return cache


def test_a_loaded_cache_goes_on_as_the_saved_one(model, cache, tmp_path):
    path = tmp_path / "context.safetensors"
    save_cache(cache, path, model)
    loaded = load_cache(path, model)
    assert loaded.get_seq_length() == 41
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        expected = model(ids, past_key_values=cache).logits
        assert torch.equal(model(ids, past_key_values=loaded).logits, expected)
        again = load_cache(path, model)  # asked twice: the file is as it was
        assert torch.equal(model(ids, past_key_values=again).logits, expected)
    assert os.listdir(tmp_path) == [path.name]


def test_a_cache_that_was_filled_with_gradients_is_saved(model, tmp_path):
    cache = DynamicCache()
    model(torch.arange(9)[None], past_key_values=cache)
    assert cache.layers[0].keys.requires_grad
    kept = Kept.from_mask(torch.ones(1, 2, 9, dtype=torch.bool))
    layer = cache.layers[1]
    cache.layers[1] = RaggedLayer.compress(layer.keys, layer.values, kept)
    model(torch.arange(2)[None], past_key_values=cache)
    assert cache.layers[1].tail_keys.requires_grad
    save_cache(cache, tmp_path / "x", model)
    assert load_cache(tmp_path / "x", model).get_seq_length() == 11


def test_the_file_holds_the_kept_pairs_only(model, cache, tmp_path):
    path = tmp_path / "context.safetensors"
    save_cache(cache, path, model)
    dense, compressed = 2 * 2 * 41 * 8 * 4, 2 * (45 + 2) * 8 * 4
    assert dense + 2 * compressed <= path.stat().st_size <= dense + 2 * compressed + 2500


def test_another_model_is_refused_by_name(model, cache, tmp_path):
    path = tmp_path / "context.safetensors"
    save_cache(cache, path, model)
    other = make_model(seed=1)
    with pytest.raises(ValueError) as error:
        load_cache(path, other)
    assert fingerprint(model) in str(error.value) and fingerprint(other) in str(error.value)


def test_fingerprints_differ_by_weights_and_shapes_not_by_dtype(model):
    names = {
        fingerprint(model),
        fingerprint(make_model(1)),
        fingerprint(make_model(0, vocab_size=51)),
    }
    assert len(names) == 3
    assert fingerprint(make_model().bfloat16()) == fingerprint(model)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(model, cache, tmp_path, keep):
    path = tmp_path / "context.safetensors"
    save_cache(cache, path, model)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_cache(path, model)


def test_an_altered_file_is_refused(model, cache, tmp_path):
    path = tmp_path / "context.safetensors"
    save_cache(cache, path, model)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum does not match"):
        load_cache(path, model)


def test_altered_layer_descriptions_are_refused(model, cache, tmp_path):
    path = tmp_path / "context.safetensors"
    save_cache(cache, path, model)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["layers"] = header["layers"].replace("40", "39")
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match="checksum does not match"):
        load_cache(path, model)


def test_other_files_and_caches_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "nothing", model)
    save_file({"x": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match="to be a cache of format moekv-cache-1, got None"):
        load_cache(tmp_path / "x", model)
    with pytest.raises(ValueError, match="got one without layers"):
        save_cache(DynamicCache(), tmp_path / "y", model)
    static = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(TypeError, match="layer 0 is a StaticLayer"):
        save_cache(static, tmp_path / "y", model)
    assert not (tmp_path / "y").exists()


def test_a_failed_write_leaves_the_old_file(model, cache, tmp_path, monkeypatch):
    path = tmp_path / "context.safetensors"
    save_cache(cache, path, model)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("moekv.cache.storage.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_cache(cache, path, model)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
