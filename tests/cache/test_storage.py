"""Saved caches: what comes back, and what is refused."""

import copy
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from moekv import DecodingConfig, MoERouterPress, ops
from moekv.budget import Kept
from moekv.cache import storage
from moekv.cache.ragged import RaggedLayer
from moekv.cache.storage import load_cache, save_cache
from moekv.models.fingerprint import fingerprint, short
from tests.helpers.quantized import quantized_cache
from tests.helpers.random_router import random_router
from tests.helpers.tiny_models import prefill, tiny_model, tokens


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


def test_what_is_loaded_does_not_change_with_its_file(model, cache, tmp_path):
    path = tmp_path / "x"
    save_cache(cache, path, model)
    loaded = load_cache(path, model)
    with torch.no_grad():
        expected = model(torch.tensor([[7]]), past_key_values=cache).logits
        with open(path, "r+b") as file:  # as cp does, which writes to the file that there is
            file.write(b"\xff" * path.stat().st_size)
        assert torch.equal(model(torch.tensor([[7]]), past_key_values=loaded).logits, expected)


def test_the_file_holds_the_kept_pairs_only(model, cache, tmp_path):
    path = tmp_path / "context.safetensors"
    save_cache(cache, path, model)
    dense, compressed = 2 * 2 * 41 * 8 * 4, 2 * (45 + 2) * 8 * 4
    assert dense + 2 * compressed <= path.stat().st_size <= dense + 2 * compressed + 4500


def test_another_model_is_refused_by_name(model, cache, tmp_path):
    path = tmp_path / "context.safetensors"
    save_cache(cache, path, model)
    other = make_model(seed=1)
    with pytest.raises(ValueError) as error:
        load_cache(path, other)
    for each in (model, other):
        assert short(fingerprint(each)) in str(error.value)


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
    header["layers"] = header["layers"].replace('"run": 0', '"run": 1')
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match="checksum does not match"):
        load_cache(path, model)


def test_other_files_and_caches_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "nothing", model)
    save_file({"x": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match="format moekv-cache-2 or .* or moekv-cache-6, got None"):
        load_cache(tmp_path / "x", model)
    with pytest.raises(ValueError, match="got one without layers"):
        save_cache(DynamicCache(), tmp_path / "y", model)
    quantized = quantized_cache()
    with torch.no_grad():
        model(torch.arange(9)[None], past_key_values=quantized)
    with pytest.raises(TypeError, match="layer 0 is a IdentityLayer"):
        save_cache(quantized, tmp_path / "y", model)
    assert not (tmp_path / "y").exists()


def goes_on_alike(model, cache, path, steps: int = 3) -> None:
    """Save a cache, load it, and feed both the same tokens: logits are equal bit for bit."""
    save_cache(cache, path, model)
    loaded = load_cache(path, model)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
    with torch.no_grad():
        for step in range(steps):
            ids = torch.full((1, 1), 5 + step)
            seen = int(cache.get_seq_length())
            position = torch.tensor([seen])
            assert int(loaded.get_seq_length()) == seen
            logits = [
                model(ids, past_key_values=x, position_ids=position[None]).logits
                for x in (cache, loaded)
            ]
            assert torch.equal(*logits)


@pytest.mark.parametrize("pressed", [True, False])
def test_static_caches(pressed, tmp_path):
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=70)
    press = MoERouterPress(0.5 if pressed else 0, router=None)
    with torch.no_grad(), press(model):
        model(tokens(1, 40), past_key_values=cache)
    assert pressed == (int(cache.layers[0].evicted) > 0)
    goes_on_alike(model, cache, tmp_path / "x")
    # The pairs that are held, and no empty slots.
    assert (tmp_path / "x").stat().st_size < 2 * 2 * 2 * 16 * 4 * (20 if pressed else 40) + 4500


@pytest.mark.parametrize("static", [False, True])
def test_sliding_windows(static, tmp_path):
    model = tiny_model("gemma3")
    cache = DynamicCache(config=model.config)
    if static:
        cache = StaticCache(config=model.config, max_cache_len=70)
    with torch.no_grad(), MoERouterPress(0.5, router=None)(model):
        model(tokens(1, 40), past_key_values=cache)
    goes_on_alike(model, cache, tmp_path / "x", steps=20)


@pytest.mark.parametrize("pairs", ops.PAIRS[1:])
@pytest.mark.parametrize("streaming", [False, True])
def test_quantised_pairs(pairs, streaming, tmp_path):
    model, cache = tiny_model(), DynamicCache()
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    press = MoERouterPress(0.85, router=None, pairs=pairs, streaming=streaming)
    with torch.no_grad(), press(model):
        model(ids, attention_mask=mask, past_key_values=cache)
    save_cache(cache, tmp_path / "x", model)
    assert (tmp_path / "x").stat().st_size < sum(x.nbytes for x in cache.layers) + 4500
    loaded = load_cache(tmp_path / "x", model)
    for one, other in zip(cache.layers, loaded.layers, strict=True):
        assert other.rows.pairs == pairs and other.rows.dtype == one.rows.dtype
        assert all(map(torch.equal, one.rows.tensors, other.rows.tensors))
        assert all(map(torch.equal, one.to_dense(), other.to_dense()))
    with torch.no_grad():
        mask, ids = torch.cat([mask, mask[:, :1]], 1), tokens(2, 1)
        mask[1, -1] = 1
        given = {"attention_mask": mask, "position_ids": torch.tensor([[40], [31]])}
        logits = [model(ids, past_key_values=x, **given).logits for x in (cache, loaded)]
    assert torch.equal(*logits)
    goes_on = {"attention_mask": torch.cat([mask, mask[:, -1:]], 1)}
    save_cache(loaded, tmp_path / "y", model)  # now with a tail
    again = load_cache(tmp_path / "y", model)
    with torch.no_grad():
        given = goes_on | {"position_ids": torch.tensor([[41], [32]])}
        logits = [model(ids, past_key_values=x, **given).logits for x in (cache, again)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_files_of_formats_before_are_read(version, model, cache, tmp_path):
    """They knew fewer kinds of layers, and no positions, and are the same otherwise."""
    path = tmp_path / "context.safetensors"
    save_cache(cache, path, model)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["format"] = f"moekv-cache-{version}"
    assert sum(tensors.pop(f"{i}.positions", None) is not None for i in range(3)) == 2
    del header["sha256"]
    header["sha256"] = storage._checksum(header, tensors)
    save_file(tensors, path, metadata=header)
    loaded, ids = load_cache(path, model), torch.tensor([[7]])
    with torch.no_grad():
        logits = [model(ids, past_key_values=x).logits for x in (cache, loaded)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("budget", ["uniform", "model"])
@pytest.mark.parametrize("router", [True, False])
@pytest.mark.parametrize("pairs", ["16", "k8v4"])
def test_a_growing_cache_goes_on_as_it_would_have(budget, router, pairs, tmp_path):
    model = tiny_model()
    options = {"decoding": DecodingConfig(20, 4), "budget": budget, "pairs": pairs}
    options["router"] = random_router(model) if router else None
    if not router and budget == "uniform":
        options["experts"] = ["selective", "semantic"]
        del options["router"]
    press = MoERouterPress(0.5, **options)
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(tokens(1, 40), past_key_values=cache)
        for step in range(6):  # between two compressions
            model(tokens(1, 1, seed=step), past_key_values=cache)
    save_cache(cache, tmp_path / "x", model)
    loaded, twin = load_cache(tmp_path / "x", model), copy.deepcopy(press)
    for each, its in ((cache, press), (loaded, twin)):
        with torch.no_grad(), its(model):
            for step in range(15):
                last = model(tokens(1, 1, seed=50 + step), past_key_values=each).logits
        if each is cache:
            wanted = last
    assert torch.equal(last, wanted)
    assert [x.context_length for x in loaded.layers] == [x.context_length for x in cache.layers]
    assert twin.get_stats()["compression"] == press.get_stats()["compression"]


@pytest.mark.parametrize("budget", ["uniform", "model"])
@pytest.mark.parametrize("fed", [1, 15])
def test_notes_of_fewer_tokens_are_saved(budget, fed, tmp_path):
    """Tokens that were fed outside of blocks have none; without them the cache goes on."""
    model = tiny_model()
    options = {"router": random_router(model), "budget": budget, "fold": False, "pairs": "16"}
    press = MoERouterPress(0.5, decoding=DecodingConfig(15, 4), **options)
    with torch.no_grad():
        with press(model):
            cache = prefill(model, tokens(1, 24))
            model(tokens(1, 1, 1), past_key_values=cache)
        model(tokens(1, fed, 2), past_key_values=cache)
        save_cache(cache, tmp_path / "cache", model)
        both = [cache, load_cache(tmp_path / "cache", model)]
        assert all(layer.whole_notes() is None for layer in both[1].layers)
        with press(model):
            said = []
            for each in both:
                each.crop(-fed)
                ids = [tokens(1, 1, 3 + step) for step in range(6)]
                said.append([model(x, past_key_values=each).logits for x in ids])
    assert all(map(torch.equal, *said))


def test_offloaded_models(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, plain = tiny_model(), tiny_model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    cache = DynamicCache()
    with torch.no_grad(), MoERouterPress(0.5, router=random_router(plain))(model):
        model(tokens(1, 40), past_key_values=cache)
    goes_on_alike(model, cache, tmp_path / "x")
    loaded = load_cache(tmp_path / "x", plain)
    assert loaded.layers[0].stored_keys.device.type == "cpu"


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
