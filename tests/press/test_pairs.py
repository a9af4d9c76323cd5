"""``pairs``: caches in fewer bits, under a budget in bytes."""

import copy
from typing import Any

import pytest
import torch
from growth_cases import Uneven, decode
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from twins import rounded

from moekv import DecodingConfig, MoERouterPress, ops, prefill_in_chunks
from moekv.budget import kept_pairs
from moekv.cache.ragged import RaggedLayer
from moekv.cache.rows import gain
from tests.helpers.random_router import random_router

LENGTH, LAYERS, HEADS, DIM = 60, 2, 2, 16  # of the tiny Llama
QUANTISED = ops.PAIRS[1:]
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "streaming": {"streaming": True},
    "by head": {"budget": "head"},
    "by layer": {"budget": "layer"},
    "uniform": {"budget": "uniform"},
    "uniform, streaming": {"budget": "uniform", "streaming": True},
}


def compressed(
    model: PreTrainedModel, press: MoERouterPress, ids: Tensor, mask: Tensor | None = None
) -> DynamicCache:
    inputs = {}
    if mask is not None:
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with press(model):
        return prefill(model, ids, **inputs)


def bytes_of(cache: DynamicCache) -> int:
    """Bytes of all storages, by what PyTorch says of them."""
    parts = [x for layer in cache.layers for x in (*layer.rows.tensors, *layer.keys.tail)]
    return sum(x.untyped_storage().nbytes() for x in parts)


def stored_pairs(cache: DynamicCache) -> int:
    return sum(len(layer.rows) for layer in cache.layers)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pairs", ops.PAIRS)
@pytest.mark.parametrize("ratio", [0.1, 0.8, 0.93])
def test_the_ratio_is_of_bytes_exact_to_one_pair(ratio: float, pairs: str, way: str) -> None:
    model = tiny_model()
    press = MoERouterPress(ratio, router=None, pairs=pairs, fold=False, **WAYS[way])
    cache = compressed(model, press, tokens(2, LENGTH))
    dense = 2 * LAYERS * HEADS * LENGTH * 2 * DIM * 4
    one = 2 * DIM * 4 if pairs == "16" else ops.pair_layout(pairs, DIM, DIM).num_bytes
    heads = 2 * LAYERS * HEADS
    per_head = min(LENGTH, int(LENGTH * (1 - ratio) * (2 * DIM * 4) / one))
    stats = press.get_stats()
    held = sum(layer.nbytes for layer in cache.layers)
    assert held == per_head * one * heads == stats["cache"]["bytes_held"]
    assert stats["compression"]["ratio"] == (dense - held) / dense
    assert stats["compression"]["evicted"] == (LENGTH - per_head) / LENGTH
    assert dense - held == stats["compression"]["bytes_freed"]
    # No pair more would have fitted; none fewer was asked for.
    assert held <= (1 - ratio) * dense
    assert per_head == LENGTH or held + one * heads > (1 - ratio) * dense
    assert stats["pairs"] == {"asked": pairs, "used": pairs}
    if pairs != "16":
        assert all(isinstance(x, RaggedLayer) and x.rows.pairs == pairs for x in cache.layers)
        assert bytes_of(cache) == held
        assert stats["cache"]["bits_per_number"] == 8 * one / (2 * DIM)


@pytest.mark.parametrize("pairs", QUANTISED)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_pair_stays_where_quantising_makes_the_room(
    pairs: str, streaming: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is what the op makes of the pair, whichever way it has come there."""
    model, ids = tiny_model(), tokens(1, LENGTH)
    full = prefill(model, ids)
    for ratio in (0.0, 0.6):
        press = MoERouterPress(ratio, router=None, pairs=pairs, streaming=streaming)
        cache = compressed(model, press, ids)
        for layer, whole in zip(cache.layers, full.layers, strict=True):
            keys, values, lengths = layer.to_dense()
            read = rounded(whole.keys, whole.values, pairs)
            assert torch.equal(keys, read[0]) and torch.equal(values, read[1])
            assert (lengths == LENGTH).all()
        stats = press.get_stats()
        assert stats["compression"]["evicted"] == stats["cache"]["evictions"] == 0
        assert stats["compression"]["ratio"] > 0.6
        press.summary()
        assert "of the bytes, no pair: " in capsys.readouterr().out


@pytest.mark.parametrize("pairs", QUANTISED)
def test_more_pairs_stay_than_in_16_bits_and_the_best_of_them(pairs: str) -> None:
    """Smaller budgets keep subsets of larger ones: quantising adds pairs, and swaps none."""
    model, ids = tiny_model(), tokens(1, LENGTH)
    kept = []
    for each in ("16", pairs):
        press = MoERouterPress(0.9, router=None, pairs=each, experts=[Uneven()], top_k=1)
        cache = compressed(model, press, ids)
        full = prefill(model, ids)
        held = []
        for layer, whole in zip(cache.layers, full.layers, strict=True):
            keys, _, lengths = layer.to_dense()
            for h in range(HEADS):
                own = keys[0, h, keys.shape[2] - int(lengths[0, h]) :]
                distance = torch.cdist(own, whole.keys[0, h])
                held.append(set(distance.argmin(1).tolist()))
                assert len(held[-1]) == len(own)
        kept.append(held)
    assert all(few <= many for few, many in zip(*kept, strict=True))
    assert sum(map(len, kept[1])) > 2 * sum(map(len, kept[0]))


@pytest.mark.parametrize("pairs", QUANTISED)
@pytest.mark.parametrize("budget", ["model", "head", "uniform"])
def test_a_stream_ends_where_a_prefill_does(pairs: str, budget: str) -> None:
    model, ids = tiny_model(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {"router": None, "pairs": pairs, "budget": budget, "fold": False}
    one = compressed(model, MoERouterPress(0.9, **options), ids, mask)
    other = compressed(model, MoERouterPress(0.9, streaming=True, **options), ids, mask)
    for a, b in zip(one.layers, other.layers, strict=True):
        assert torch.equal(a.begin, b.begin) and torch.equal(a.end, b.end)
        assert all(torch.equal(x, y) for x, y in zip(a.rows.tensors, b.rows.tensors, strict=True))


@pytest.mark.parametrize("pairs", QUANTISED)
@pytest.mark.parametrize("ratio", [0.0, 0.85])
def test_a_padded_row_is_stored_as_it_is_alone(pairs: str, ratio: float) -> None:
    model, ids = tiny_model(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    options = {"router": None, "pairs": pairs, "experts": [Uneven()], "top_k": 1}
    both = compressed(model, MoERouterPress(ratio, **options), ids, mask)
    alone = compressed(model, MoERouterPress(ratio, **options), ids[1:, 20:])
    for a, b in zip(both.layers, alone.layers, strict=True):
        a = copy.deepcopy(a)
        a.batch_select_indices(torch.tensor([1]))
        for one, other in zip(a.to_dense()[:2], b.to_dense()[:2], strict=True):
            assert (one - other).abs().mean() < 1e-3  # where a number lies between two codes
        assert a.stored_pairs == b.stored_pairs and len(a.rows) == len(b.rows)


@pytest.mark.parametrize("pairs", QUANTISED)
@pytest.mark.parametrize("budget", ["model", "layer", "uniform"])
@pytest.mark.parametrize("ratio", [0.0, 0.85])
def test_the_record_is_of_the_pairs_that_are_held(pairs: str, budget: str, ratio: float) -> None:
    """Padding included, and with as many bytes as there are."""
    model, ids, mask = tiny_model(), tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :9] = 0
    press = MoERouterPress(ratio, router=None, pairs=pairs, budget=budget, fold=False)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    whole = prefill(model, ids, **inputs)
    with press(model, record=True):
        cache = prefill(model, ids, **inputs)
    recording = press.recording()
    assert recording.bytes_after == sum(layer.nbytes for layer in cache.layers)
    assert recording.bytes_after == press.get_stats()["cache"]["bytes_held"]
    for layer, held, full in zip(recording.layers, cache.layers, whole.layers, strict=True):
        assert not (layer.kept & (mask == 0)[:, None]).any()
        keys, values, lengths = held.to_dense()
        assert torch.equal(lengths, layer.kept.sum(-1))
        read = rounded(full.keys, full.values, pairs)
        for own, exact in zip((keys, values), read, strict=True):
            there = torch.arange(own.shape[2]) >= own.shape[2] - lengths[..., None]
            assert torch.equal(own[there], exact[layer.kept])


# --- growth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", QUANTISED)
@pytest.mark.parametrize("budget", ["model", "uniform"])
@pytest.mark.parametrize("length", [10, LENGTH])
def test_decoding_compresses_into_the_same_format(pairs: str, budget: str, length: int) -> None:
    """Prompts longer and shorter than the target: the tail is quantised when it is compressed."""
    model = tiny_model()
    config = DecodingConfig(24, 5)
    press = MoERouterPress(0.0, router=None, pairs=pairs, budget=budget, decoding=config)
    one = ops.pair_layout(pairs, DIM, DIM).num_bytes
    with press(model):
        cache = prefill(model, tokens(1, length))
        for step in range(40):
            before = [copy.copy(layer.rows) for layer in cache.layers]
            decode(model, cache, length + step)
            held = stored_pairs(cache)
            tails = [layer.tail_length for layer in cache.layers]
            count = held + LAYERS * HEADS * tails[0]
            assert len(set(tails)) == 1 and count <= LAYERS * HEADS * (24 + 5)
            for layer, old in zip(cache.layers, before, strict=True):
                assert layer.rows.pairs == pairs
                room = layer._tail.room * HEADS * 2 * DIM * 4
                assert layer.nbytes == len(layer.rows) * one + room
                # What has been stored before is found as it was.
                rows = {bytes(row.numpy()) for row in old.keys}
                left = sum(bytes(row.numpy()) in rows for row in layer.rows.keys)
                assert left >= min(len(old), len(layer.rows) - HEADS * (24 + 5 - min(length, 24)))
            cached = press.get_stats()["cache"]
            assert cached["bytes_held"] <= cached["bytes_allowed"]
    assert held == LAYERS * HEADS * 24 or length < 24
    stats = press.get_stats()
    assert stats["cache"]["evictions"] > 0
    came = LAYERS * HEADS * (length + 40 - tails[0])
    assert stats["compression"]["evicted"] == (came - stored_pairs(cache)) / came
    left = stored_pairs(cache) * one / (came * 2 * DIM * 4)
    assert stats["compression"]["ratio"] == pytest.approx(1 - left)


@pytest.mark.parametrize("pairs", QUANTISED)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("chunk", [7, 25])
def test_chunks_are_stored_as_they_come(pairs: str, ratio: float, chunk: int) -> None:
    """No tail is left in 16 bits, whether anything is evicted or not."""
    model = tiny_model()
    press = MoERouterPress(ratio, router=None, pairs=pairs)
    out = prefill_in_chunks(press, model, tokens(1, LENGTH), chunk_size=chunk)
    cache = out.past_key_values
    keys = cache.layers[0].tail_keys
    per_head = kept_pairs(LENGTH, ratio, gain(pairs, keys, keys))
    one = ops.pair_layout(pairs, DIM, DIM).num_bytes
    assert cache.get_seq_length() == LENGTH
    assert [layer.tail_length for layer in cache.layers] == [0] * LAYERS
    assert sum(x.nbytes for x in cache.layers) == LAYERS * HEADS * per_head * one
    assert press.get_stats()["compression"]["evicted"] == (LENGTH - per_head) / LENGTH


@pytest.mark.parametrize("pairs", QUANTISED)
def test_notes_of_a_calibrated_router_go_along(pairs: str) -> None:
    model = tiny_model()
    press = MoERouterPress(
        0.8, router=random_router(model), pairs=pairs, decoding=DecodingConfig(20, 4)
    )
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
        for step in range(12):
            decode(model, cache, LENGTH + step)
            for layer in cache.layers:
                notes = layer.whole_notes()
                assert notes is not None and notes.rows.pairs == "16"
                assert torch.equal(notes.begin, layer.begin) and torch.equal(notes.end, layer.end)
    assert press.get_stats()["cache"]["bytes_by_kind"]["notes"] > 0


def test_a_quantised_layer_keeps_its_format() -> None:
    """Whatever a later press asks for: nothing is rounded twice, and nothing grows back."""
    model = tiny_model()
    cache = compressed(model, MoERouterPress(0.5, router=None, pairs="k8v8"), tokens(1, LENGTH))
    for pairs in ("16", "k4v4"):
        later = MoERouterPress(router=None, pairs=pairs, decoding=DecodingConfig(20, 4))
        mine = copy.deepcopy(cache)
        with later(model):
            for step in range(6):
                decode(model, mine, LENGTH + step)
        assert [layer.rows.pairs for layer in mine.layers] == ["k8v8"] * LAYERS
        assert stored_pairs(mine) == LAYERS * HEADS * 20


# --- beams, generate, a model's own logits ------------------------------------------------------


@pytest.mark.parametrize("pairs", QUANTISED)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generate_with_beams(pairs: str, options: dict[str, int]) -> None:
    model, ids = tiny_model(), tokens(1, LENGTH)
    cache, press = DynamicCache(), MoERouterPress(0.8, router=None, pairs=pairs)
    with press(model):
        out = model.generate(
            ids, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0, **options
        )
    assert out.shape[1] == LENGTH + 5
    assert all(layer.rows.pairs == pairs for layer in cache.layers)


def test_fewer_bits_are_farther_from_the_full_cache() -> None:
    """And 8 bits are near it: the whole way, through every layer's attention."""
    model, ids = tiny_model(), tokens(1, LENGTH)
    with torch.no_grad():
        expected = model(tokens(1, 1, 5), past_key_values=prefill(model, ids)).logits
        distance = []
        for pairs in QUANTISED:
            cache = compressed(model, MoERouterPress(0.0, router=None, pairs=pairs), ids)
            logits = model(tokens(1, 1, 5), past_key_values=cache).logits
            distance.append(float((logits - expected).norm() / expected.norm()))
    assert distance[0] < distance[1] < distance[2] < 0.3 and distance[0] < 0.02


# --- "auto" -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "dtype", "used"),
    [
        (0.0, torch.float32, None),
        (0.5, torch.float32, "k8v8"),
        (0.9, torch.float32, "k8v4"),
        (0.97, torch.float32, "k4v4"),
        (0.3, torch.bfloat16, "k8v8"),
        (0.5, torch.bfloat16, "k8v4"),
        (0.92, torch.bfloat16, "k8v4"),
        (0.94, torch.bfloat16, "k4v4"),
    ],
)
def test_auto_goes_by_the_bits_that_are_left(
    ratio: float, dtype: torch.dtype, used: str | None
) -> None:
    model, press = tiny_model().to(dtype), MoERouterPress(ratio, router=None, pairs="auto")
    compressed(model, press, tokens(1, LENGTH))
    assert press.get_stats()["pairs"] == {"asked": "auto", "used": used}


@pytest.mark.parametrize("case", ["eager", "odd heads"])
def test_auto_takes_what_can_be_served(case: str) -> None:
    model = tiny_model("llama", "eager" if case == "eager" else "sdpa")
    if case == "odd heads":
        shape = {"hidden_size": 42, "num_attention_heads": 6, "num_key_value_heads": 2}
        shape |= {"intermediate_size": 16, "vocab_size": 64, "num_hidden_layers": 2}
        shape |= {"head_dim": 6}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
        for layer in model.model.layers:
            layer.self_attn.v_proj = nn.Linear(42, 2 * 6)
    press = MoERouterPress(0.8, router=None, pairs="auto")
    compressed(model, press, tokens(1, LENGTH) % 60)
    used = press.get_stats()["pairs"]["used"]
    assert used == ("16" if case == "eager" else "k8v4")
