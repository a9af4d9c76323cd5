"""Generation over ragged caches: equal to what masks on a full cache give, in less memory."""

import copy
import functools
import gc
import itertools
import weakref
from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from folded_reference import asked_behind, joined_in_head
from folded_reference import folded as reference
from given_expert import press_by
from kvpress import (
    AdaKVPress,
    CriticalAdaKVPress,
    DMSPress,
    DuoAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVgradPress,
    KVzipPress,
    SnapKVPress,
)
from tiny_models import VOCABULARY, prefill, tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer
from twins import rounded

from moekv import load_cache, ragged, save_cache
from moekv.budget import Kept
from moekv.cache.attention import install
from moekv.cache.buffers import storage_bytes
from moekv.cache.growing import GrowingLayer
from moekv.cache.ragged import RaggedLayer
from moekv.cache.rows import Rows
from moekv.cache.tail import Tail
from moekv.integrations.kvpress.prompts import _places
from moekv.models.watching import watched

BUDGETS = ["uniform", "head", "model"]
LENGTH = 120


given_press = functools.partial(press_by, lambda layer: 0.2 * layer)


def cache_bytes(cache: DynamicCache) -> int:
    return sum(
        layer.nbytes if isinstance(layer, RaggedLayer) else storage_bytes(layer.keys, layer.values)
        for layer in cache.layers
    )


def generate(model: Any, input_ids: Tensor, cache: DynamicCache, **options: Any) -> Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    options["suppress_tokens"] = [0]  # its embedding is 0, for which kvpress finds no fake key
    options.setdefault("attention_mask", torch.ones_like(input_ids))
    return model.generate(input_ids, past_key_values=cache, **options)


@pytest.mark.parametrize("ratio", [0.25, 0.75, 0.97])
@pytest.mark.parametrize("budget", BUDGETS)
def test_totals_are_exact_and_heads_differ(budget: str, ratio: float) -> None:
    model, press, cache = tiny_model(), given_press(ratio, budget=budget), DynamicCache()
    full = prefill(model, tokens(1, LENGTH))
    with press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    per_head = max(1, int(LENGTH * (1 - ratio)))
    heads = full.layers[0].keys.shape[1]
    if budget == "uniform":
        assert [layer.keys.shape[2] for layer in cache.layers] == [per_head] * len(cache)
    else:
        lengths = [layer.to_dense()[2] for layer in cache.layers]
        sums = [int(n.sum()) for n in lengths]
        assert sum(sums) == per_head * heads * len(cache)
        if per_head > press.sinks + press.recent:
            assert (len(set(sums)) == 1) == (budget == "head")
            assert any(len(set(n.flatten().tolist())) > 1 for n in lengths)
        assert all(int(n.min()) >= min(per_head, press.sinks + press.recent) for n in lengths)
    stats = press.get_stats()["compression"]
    assert stats["ratio"] == pytest.approx(1 - per_head / LENGTH)
    assert stats["bytes_after"] == cache_bytes(cache) == cache_bytes(full) * per_head // LENGTH


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_padded_rows_equal_rows_alone(name: str, budget: str) -> None:
    model = tiny_model(name)
    input_ids, padding = tokens(3, LENGTH), [0, 45, 96]
    mask = torch.ones_like(input_ids)
    for row, n in enumerate(padding):
        mask[row, :n] = 0
    together = DynamicCache()
    with given_press(0.6, budget=budget)(model):
        out = generate(model, input_ids, together, attention_mask=mask)
    for row, n in enumerate(padding):
        alone, one = DynamicCache(), input_ids[row : row + 1, n:]
        with given_press(0.6, budget=budget)(model):
            expected = generate(model, one, alone)
        assert torch.equal(out[row, LENGTH:], expected[0, LENGTH - n :])
        for layer, single in zip(together.layers, alone.layers, strict=True):
            lengths = layer.to_dense()[2][row]
            for head, count in enumerate(lengths.tolist()):
                keys = layer.to_dense()[0][row, head, -count:]
                if isinstance(single, RaggedLayer):
                    dense, _, counts = single.to_dense()
                    assert counts[0, head] == count
                    single_keys = dense[0, head, -count:]
                else:
                    single_keys = single.keys[0, head]
                torch.testing.assert_close(keys, single_keys, atol=2e-5, rtol=1e-5)


def test_padding_is_neither_stored_nor_counted() -> None:
    model, press, cache = tiny_model(), given_press(0.5, budget="uniform"), DynamicCache()
    input_ids = tokens(2, LENGTH)
    mask = torch.ones_like(input_ids)
    mask[1, :100] = 0
    with press(model):
        model(input_ids, attention_mask=mask, past_key_values=cache)
    heads = len(cache.layers[0].begin[0])
    assert [layer.to_dense()[2].tolist() for layer in cache.layers] == [
        [[60] * heads, [10] * heads]
    ] * len(cache)
    assert press.get_stats()["compression"]["ratio"] == pytest.approx(1 - 70 / 140)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaKVPress(KeyDiffPress(0.6)),
        lambda: AdaKVPress(SnapKVPress(0.75, window_size=16), alpha_safeguard=0.0),
        lambda: CriticalAdaKVPress(KnormPress(0.3)),
        lambda: CriticalAdaKVPress(SnapKVPress(0.8, window_size=16), alpha_safeguard=0.0),
        lambda: AdaKVPress(given_press(0.7)),
        lambda: DMSPress(KnormPress(), threshold=-5.0, sliding_window_size=20),
    ],
    ids=["KeyDiff", "SnapKV", "Critical", "CriticalSnapKV", "moekv", "DMS"],
)
def test_head_wise_presses_of_kvpress_give_the_same_tokens_in_less_memory(make: Any) -> None:
    model, input_ids = tiny_model(), tokens(1, LENGTH)
    masked, freed = DynamicCache(), DynamicCache()
    with make()(model):
        expected = generate(model, input_ids, masked)
    evicted = [len(layer.self_attn.masked_key_indices[0]) for layer in model.model.layers]
    press = make()
    with ragged(press)(model):
        assert torch.equal(generate(model, input_ids, freed), expected)
    full = cache_bytes(prefill(model, input_ids))
    kept = sum(layer.stored_keys.numel() + layer.stored_values.numel() for layer in freed.layers)
    pair = 2 * 16 * 4
    assert kept * 4 == full - sum(evicted) * pair
    # kvpress rounds twice where heads have a safeguard of their own.
    assert kept * 4 == pytest.approx(full * (1 - press.compression_ratio), rel=0.05)
    assert all(getattr(m, "masked_key_indices", None) is None for m in model.modules())


def decode_by_hand(model: Any, cache: DynamicCache, steps: int = 12) -> Tensor:
    """Logits of a few greedy steps from a prefilled cache, at the true positions."""
    token, logits = torch.tensor([[5]]), []
    for step in range(steps):
        where = torch.tensor([LENGTH + step])
        with torch.no_grad():
            logits.append(
                model(
                    token,
                    past_key_values=cache,
                    cache_position=where,
                    position_ids=where[None],
                ).logits
            )
        token = logits[-1][..., 1:].argmax(-1) + 1
    return torch.cat(logits, dim=1)


@pytest.fixture
def tokenizer_folder(tmp_path: Any) -> str:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", bos_token="w1")
    fast.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("ratio", [0.3, 0.8])
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("kind", [KVzipPress, KVgradPress])
def test_presses_that_decide_after_the_prefill(
    kind: Any, ratio: float, layerwise: bool, tokenizer_folder: str
) -> None:
    """Heads and layers of any length, some of them without a single pair."""
    model, input_ids = tiny_model(), tokens(1, LENGTH)
    model.config._name_or_path = tokenizer_folder
    masked, freed = DynamicCache(), DynamicCache()
    expected = None
    for cache, wrap in ((masked, lambda press: press), (freed, ragged)):
        press = kind(ratio, layerwise=layerwise, chunk_size=50)
        with torch.no_grad(), wrap(press)(model):
            model(input_ids, past_key_values=cache)
        logits = decode_by_hand(model, cache)
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
        expected = logits if expected is None else expected
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    full = cache_bytes(prefill(model, input_ids))
    kept = sum(layer.stored_keys.numel() + layer.stored_values.numel() for layer in freed.layers)
    assert kept * 4 == pytest.approx(full * (1 - ratio), rel=0.01)
    assert freed.get_seq_length() == masked.get_seq_length() == LENGTH + 12


def test_duo_attention_has_whole_heads_and_streaming_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, input_ids = tiny_model("llama_mha"), tokens(2, LENGTH)
    heads = np.array([[0.9, 0.1, 0.4, 0.2], [0.05, 0.8, 0.7, 0.3]])
    pattern = staticmethod(lambda model: (4, 16, heads))
    monkeypatch.setattr(DuoAttentionPress, "load_attention_pattern", pattern)
    masked, freed = DynamicCache(), DynamicCache()
    with DuoAttentionPress(0.5)(model):
        expected = generate(model, input_ids, masked)
    press = DuoAttentionPress(0.5)
    with ragged(press)(model):
        assert torch.equal(generate(model, input_ids, freed), expected)
    whole = heads >= 0.4
    for layer, is_whole in zip(freed.layers, whole, strict=True):
        stored = (layer.end - layer.begin).tolist()
        assert stored == [[LENGTH if w else 20 for w in is_whole]] * 2
    ratio = 0.5 * (1 - 20 / LENGTH)
    assert press.compression_ratio == pytest.approx(ratio)
    full = cache_bytes(prefill(model, input_ids))
    kept = sum(layer.stored_keys.numel() + layer.stored_values.numel() for layer in freed.layers)
    assert kept * 4 == pytest.approx(full * (1 - ratio))


def test_ragged_says_when_a_press_masks_nothing() -> None:
    model = tiny_model()
    with (
        pytest.raises(RuntimeError, match="KnormPress masked no keys"),
        ragged(KnormPress(0.5))(model),
    ):
        prefill(model, tokens(1, LENGTH))
    with pytest.raises(TypeError, match="expected a kvpress press, got str"):
        ragged("AdaKV")


def test_a_conversation_goes_on_at_the_true_position() -> None:
    """Stored ragged but nothing evicted: every later turn is that of the full cache."""
    model, context = tiny_model(), tokens(1, LENGTH)
    question, more = tokens(1, 7, seed=1), tokens(1, 5, seed=2)
    full, compressed = prefill(model, context), prefill(model, context)
    for index, layer in enumerate(compressed.layers):
        everything = Kept.from_mask(torch.ones(layer.keys.shape[:3], dtype=torch.bool))
        compressed.layers[index] = RaggedLayer.compress(layer.keys, layer.values, everything)
    caches = {"full": full, "compressed": compressed}
    outs = {}
    for name, cache in caches.items():
        turn = generate(model, torch.cat([context, question], dim=1), cache)
        outs[name] = generate(model, torch.cat([turn, more], dim=1), cache)
    assert torch.equal(outs["full"], outs["compressed"])
    assert full.get_seq_length() == compressed.get_seq_length()
    for cache in caches.values():
        cache.crop(LENGTH + 3)
    again = [model(question, past_key_values=cache).logits for cache in caches.values()]
    torch.testing.assert_close(again[0], again[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("budget", ["head", "model"])
def test_beams_and_several_questions_on_one_context(budget: str) -> None:
    model, cache = tiny_model(), DynamicCache()
    context = tokens(1, LENGTH)
    with given_press(0.5, budget=budget)(model):
        model(context, past_key_values=cache)
    answers = []
    for _ in range(2):
        ids = torch.cat([context, tokens(1, 6)], dim=1)
        beams = copy.deepcopy(cache)
        beams.batch_repeat_interleave(3)
        answers.append(generate(model, ids, beams, num_beams=3))
        cache_length = cache.get_seq_length()
        answers.append(generate(model, ids, cache))
        cache.crop(cache_length)
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("pairs", ["k8v8", "k8v4", "k4v4"])
@pytest.mark.parametrize("make", [AdaKVPress, CriticalAdaKVPress])
def test_presses_of_kvpress_with_quantised_pairs(make: Any, pairs: str) -> None:
    """The same pairs stay, in fewer bits."""
    model, ids, found = tiny_model(), tokens(1, LENGTH), []
    for each in ("16", pairs):
        inner, cache = make(SnapKVPress(0.6, window_size=8)), DynamicCache()
        with torch.no_grad(), ragged(inner, pairs=each)(model):
            model(ids, past_key_values=cache)
        found.append(cache)
    for one, other in zip(*(cache.layers for cache in found), strict=True):
        assert torch.equal(one.begin, other.begin) and torch.equal(one.end, other.end)
        read = rounded(one.stored_keys, one.stored_values, pairs)
        assert all(map(torch.equal, read, other.rows.dense()))
        assert other.rows.pairs == pairs


def test_pairs_of_a_ragged_press_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="pairs among 16, k8v8, k8v4, k4v4, got 'auto'"):
        ragged(AdaKVPress(KnormPress()), pairs="auto")
    model, press = tiny_model(), ragged(KnormPress(0.5), pairs="k8v8")
    cache = prefill(model, tokens(1, 30))
    with pytest.raises(RuntimeError, match="masked no keys"), press(model):
        model(tokens(1, 1), past_key_values=cache)  # filled before the block, as are its pairs
    assert all(type(layer) is DynamicLayer for layer in cache.layers)


@pytest.mark.parametrize(
    "make",
    [lambda: KnormPress(0.5), lambda: KnormPress(0.0), lambda: AdaKVPress(KnormPress(0.0))],
    ids=["dense", "dense, nothing evicted", "nothing masked"],
)
def test_what_a_press_leaves_dense_is_quantised_at_the_end(make: Any) -> None:
    """Once, in each cache that the block has filled."""
    model, lengths = tiny_model(), (LENGTH, 31)
    plain, quantised = ([DynamicCache() for _ in lengths] for _ in range(2))
    for press, caches in ((make(), plain), (ragged(make(), pairs="k8v4"), quantised)):
        with torch.no_grad(), press(model):
            for length, cache in zip(lengths, caches, strict=True):
                model(tokens(1, length), past_key_values=cache)
                model(tokens(1, 3, seed=1), past_key_values=cache)
                assert all(type(layer) is DynamicLayer for layer in cache.layers)
    for one, other in zip(plain, quantised, strict=True):
        assert other.get_seq_length() == one.get_seq_length()
        for whole, layer in zip(one.layers, other.layers, strict=True):
            read = rounded(whole.keys, whole.values, "k8v4")
            assert all(map(torch.equal, layer.to_dense()[:2], read))
            assert layer.rows.pairs == "k8v4" and layer.tail_length == 0


def stays(whole: DynamicLayer, left: Any, masked: Any) -> Tensor:
    """Which pairs of a prompt a press has left, bool [B, H, T]: by comparing every two."""
    if masked is not None:
        stay = torch.ones(whole.keys.shape[:3], dtype=torch.bool)
        stay[tuple(masked)] = False
        return stay
    same = (whole.keys[:, :, :, None] == left.keys[:, :, None]).all(-1)
    return same.any(-1)


@pytest.mark.parametrize(
    ("make", "padding"),
    [
        (lambda: KnormPress(0.6), 0),
        (lambda: KnormPress(0.6), 37),
        (lambda: SnapKVPress(0.8, window_size=8), 0),
        (lambda: AdaKVPress(KnormPress(0.7)), 0),
        (lambda: CriticalAdaKVPress(SnapKVPress(0.6, window_size=8)), 0),
    ],
    ids=["Knorm", "Knorm, padded", "SnapKV", "AdaKV", "CriticalAdaKV"],
)
def test_what_presses_of_kvpress_evict_joins_what_stays(make: Any, padding: int) -> None:
    """By the reference of tests/helpers, in float64; a prompt of a batch of two."""
    install()
    model, ids, asked = tiny_model(), tokens(2, LENGTH, seed=1), {}
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": where}
    layers = [layer.self_attn for layer in model.model.layers]
    whole = DynamicCache()
    with (
        torch.no_grad(),
        watched(layers, lambda layer, what: asked.setdefault(layer, what.query)),
    ):
        model(ids, past_key_values=whole, **given)
    plain, folded = DynamicCache(), DynamicCache()
    with torch.no_grad(), make()(model):
        model(ids, past_key_values=plain, **given)
    masked = [getattr(layer, "masked_key_indices", None) for layer in layers]
    for layer in layers:
        layer.masked_key_indices = None
    later = tokens(2, 3, seed=2)
    with torch.no_grad(), ragged(make(), pairs="k8v8", fold=True)(model):
        model(ids, past_key_values=folded, **given)
        model(
            later,
            past_key_values=folded,
            attention_mask=nn.functional.pad(mask, (0, 3), value=1),
            position_ids=where[:, -1:] + torch.arange(1, 4),
        )
    begins, joined = (1 - mask).sum(-1), 0
    for i, layer in enumerate(folded.layers):
        assert isinstance(layer, RaggedLayer)
        stay = stays(whole.layers[i], plain.layers[i], masked[i])
        queries = asked_behind(asked[layers[i]], begins, model.config)
        keys, values, counts = layer.to_dense()
        biases = layer.rows.bias
        for b, h in itertools.product(range(2), range(2)):
            begin = int(begins[b])
            pairs = joined_in_head(
                queries[b].unflatten(0, (2, -1))[h].flatten(0, 1),
                whole.layers[i].keys[b, h],
                stay[b, h],
                begin,
                scaling=16**-0.5,
                softcap=0.0,
            )
            first = int(layer.begin[b, h])
            for n, (place, found) in enumerate(pairs.items()):
                ways = [
                    reference(whole.layers[i].values[b, h], place, way) for way in found.all_ways()
                ]
                value = values[b, h, n - int(counts[b, h])]
                bias = float(biases[first + n])
                width = float(whole.layers[i].values.abs().max()) / 60  # of eight bits
                assert any(
                    (value - v).abs().max() < width and abs(bias - offset) < 2e-3
                    for v, offset in ways
                ), (i, b, h, place)
                joined += len(found.sure)
    assert joined > 20


def test_nothing_joins_where_nothing_leaves_and_prompts_are_let_go() -> None:
    model, caches = tiny_model(), [DynamicCache() for _ in range(2)]
    with torch.no_grad(), ragged(KnormPress(0.0), pairs="k8v8", fold=True)(model):
        for cache in caches:
            generate(model, tokens(1, LENGTH), cache)
    assert all(layer.rows.bias is None for cache in caches for layer in cache.layers)
    press, cache = ragged(KnormPress(0.5), pairs="k8v8", fold=True), DynamicCache()
    with torch.no_grad(), press(model):
        generate(model, tokens(1, LENGTH), cache)
    assert all(layer.rows.bias is not None for layer in cache.layers)
    held = weakref.ref(cache)
    del cache
    gc.collect()
    assert held() is None


def test_equal_pairs_each_have_a_place() -> None:
    keys = torch.zeros(1, 1, 6, 4)
    keys[0, 0, 3:] = torch.tensor([[1.0], [torch.nan], [1.0]])
    found = _places((keys, keys), (keys[:, :, [0, 1, 3, 4, 5]],) * 2)
    assert sorted(found[0, 0].tolist()) in ([0, 1, 3, 4, 5],)
    assert len(set(found[0, 0].tolist())) == 5


def spoilt(part: Tensor | Rows | Tail) -> Any:
    if isinstance(part, Rows):
        return part._each(spoilt)
    if isinstance(part, Tail):
        tail = copy.copy(part)
        tail.put_back(*map(spoilt, part.buffers), part.length)
        return tail
    return torch.full_like(part, torch.nan) if part.is_floating_point() else torch.ones_like(part)


@pytest.mark.parametrize(("budget", "pairs"), [*((x, "16") for x in BUDGETS), ("model", "k8v4")])
def test_an_offloaded_cache_takes_compressed_layers(
    budget: str, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one device: what has been offloaded reads as NaN until it is fetched again."""
    names = {
        GrowingLayer: ("_key_buffer", "_value_buffer"),
        RaggedLayer: ("rows", "_tail"),
    }
    away: dict[int, dict[str, Any]] = {}
    times = 0

    def move(layer: Any) -> None:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    monkeypatch.setattr(DynamicLayer, "offload", move)
    for kind, parts in names.items():
        offload = kind.offload

        def send(layer: Any, parts: Any = parts, offload: Any = offload) -> None:
            nonlocal times
            times += 1
            offload(layer)
            away[id(layer)] = {name: getattr(layer, name) for name in parts}
            for name, tensor in away[id(layer)].items():
                setattr(layer, name, spoilt(tensor))
            if isinstance(layer, GrowingLayer):
                assert layer.nbytes == storage_bytes(*away[id(layer)].values())  # no room is left

        def fetch(layer: Any) -> None:
            for name, tensor in away.pop(id(layer), {}).items():
                setattr(layer, name, tensor)

        monkeypatch.setattr(kind, "offload", send)
        monkeypatch.setattr(kind, "prefetch", fetch)
    monkeypatch.setattr(torch.cuda, "default_stream", MagicMock())
    model, cache = tiny_model(), DynamicCache()
    with given_press(0.5, budget=budget, pairs=pairs)(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    plain, offloaded = copy.deepcopy(cache), DynamicCache(offloading=True)
    offloaded.layers, offloaded.prefetch_stream = cache.layers, nullcontext()
    expected = decode_by_hand(model, plain)
    assert torch.equal(decode_by_hand(model, offloaded), expected)
    assert times == 12 * 2 and expected.isfinite().all()


def test_a_saved_context_answers_as_the_one_in_memory(tmp_path: Any) -> None:
    model, cache = tiny_model(), DynamicCache()
    context, ids = tokens(1, LENGTH), tokens(1, LENGTH + 6)
    with given_press(0.5, budget="model")(model):
        model(context, past_key_values=cache)
    save_cache(cache, tmp_path / "context", model)
    loaded = load_cache(tmp_path / "context", model)
    assert torch.equal(generate(model, ids, loaded), generate(model, ids, cache))
