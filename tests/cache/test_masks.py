"""Masks after a compression: their meaning is kept for all that is stored, or they are refused.

Layers whose pairs know their positions follow them; ``positions = None`` makes others of these.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_reference import Lockstep
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from whole_caches import keep_all

from moekv import DecodingConfig, Expert, LayerView, MoERouterPress, load_cache, save_cache

LENGTH, NUM_NEW = 24, 3
PADDING = (0, 9)


def compressed(model: PreTrainedModel, kind: str) -> Any:
    """A compressed cache of two rows, of which the second is padded where that is served.

    Of kind "ragged" with pairs that do not know their positions, as an earlier file has them.
    """
    cache: Any = DynamicCache()
    options: dict[str, Any] = {}
    if kind == "static":
        cache = StaticCache(model.config, max_cache_len=40)
    elif kind == "padded":
        options["attention_mask"] = whole(LENGTH)
    budget = "model" if kind in ("ragged", "padded") else "uniform"
    with MoERouterPress(0.3, router=None, budget=budget)(model), torch.no_grad():
        model(tokens(2, LENGTH), past_key_values=cache, **options)
    if kind in ("ragged", "padded"):
        forget_positions(cache)
    return cache


def forget_positions(cache: Any) -> None:
    for layer in cache.layers:
        assert layer.follows_masks
        layer.positions = None


def whole(length: int) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, : PADDING[1]] = 0
    return mask


def ask(model: PreTrainedModel, cache: Any, mask: Tensor | None, count: int = NUM_NEW) -> Tensor:
    position = torch.arange(LENGTH, LENGTH + count)
    with torch.no_grad():
        return model(
            tokens(2, count, 1),
            past_key_values=cache,
            attention_mask=mask,
            position_ids=position[None],
            cache_position=position,
        ).logits


def four_d(mask: Tensor, count: int) -> Tensor:
    """The mask that transformers makes of one over positions."""
    length = mask.shape[1]
    causal = torch.ones(count, length).tril(length - count).bool()
    return causal & mask.bool()[:, None, None]


@pytest.mark.parametrize("kind", ["ragged", "uniform", "static"])
@pytest.mark.parametrize("hidden", [slice(10, 20), slice(0, 2), slice(LENGTH - 1, LENGTH)], ids=str)
@pytest.mark.parametrize("count", [1, NUM_NEW])
def test_masks_that_hide_what_may_be_stored(kind: str, hidden: slice, count: int) -> None:
    model = tiny_model()
    cache = compressed(model, kind)
    mask = torch.ones(2, LENGTH + count, dtype=torch.long)
    mask[1, hidden] = 0
    with pytest.raises(ValueError, match=f"shows the {LENGTH} positions that were compressed"):
        ask(model, cache, mask, count)


@pytest.mark.parametrize("kind", ["ragged", "uniform"])
@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_the_callers_own(kind: str, additive: bool) -> None:
    """In four dimensions, over all positions: transformers hands them on as they are."""
    model = tiny_model()
    expected = ask(model, compressed(model, kind), None)
    mask = four_d(torch.ones(2, LENGTH + NUM_NEW), NUM_NEW)
    hiding = mask.clone()
    hiding[1, :, :, 12] = False
    if additive:
        low = torch.finfo(torch.float32).min
        mask, hiding = ((~x).float() * low for x in (mask, hiding))
    got = ask(model, compressed(model, kind), mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="positions that were compressed"):
        ask(model, compressed(model, kind), hiding)


@pytest.mark.parametrize(
    ("attention", "additive"), [("sdpa", False), ("sdpa", True), ("eager", True)]
)
@pytest.mark.parametrize("count", [1, NUM_NEW])
def test_masks_of_the_callers_own_over_static_layers(
    attention: str, additive: bool, count: int
) -> None:
    """Over positions, as for a cache that lacks nothing, or over slots: each means what it says."""
    model = tiny_model("llama", attention)
    slots, seen = 40, LENGTH + 5 + count
    fed = torch.arange(LENGTH + 5, seen)

    def logits(mask: Tensor | None) -> Tensor:
        """Of tokens behind others behind the context."""
        cache = compressed(model, "static")
        ask(model, cache, None, 5)
        if mask is not None and mask.dim() == 4 and additive:
            mask = (~mask).float() * torch.finfo(torch.float32).min
        with torch.no_grad():
            return model(
                tokens(2, count, 2),
                past_key_values=cache,
                attention_mask=mask,
                position_ids=fed[None],
                cache_position=fed,
            ).logits

    shown = torch.ones(2, seen, dtype=torch.long)
    shown[1, LENGTH + 2] = 0
    expected = logits(shown)
    assert not torch.allclose(expected, logits(None), atol=1e-3)
    over_positions = four_d(shown, count)
    left = LENGTH - int(LENGTH * 0.7)
    over_slots = torch.zeros(2, 1, count, slots).bool()
    over_slots[..., : seen - left] = over_positions[..., left:]
    wide = torch.cat([over_positions, over_slots.new_zeros(2, 1, count, 9)], -1)
    for mask in (over_positions, wide, over_slots):
        torch.testing.assert_close(logits(mask), expected, atol=1e-5, rtol=1e-5)
    hiding = (over_positions.clone(), over_slots.clone())
    for mask, place in zip(hiding, (12, 3), strict=True):
        mask[1, :, :, place] = False
        with pytest.raises(ValueError, match="positions that were compressed"):
            logits(mask)
    for mask in (over_positions[..., 1:], over_positions[..., :-1], over_slots[..., :-1]):
        with pytest.raises(ValueError, match="shows the newest token itself"):
            logits(mask)


def test_static_buffers_are_known_by_their_layer_however_they_were_replaced() -> None:
    """Equal buffers of a copy, and others in their place: each mask is over its own cache."""
    model, seen = tiny_model(), LENGTH + 6

    def logits(cache: StaticCache, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return model(
                tokens(2, 1, 2),
                past_key_values=cache,
                attention_mask=mask,
                position_ids=torch.tensor([[seen - 1]]),
                cache_position=torch.tensor([seen - 1]),
            ).logits

    cache = compressed(model, "static")
    ask(model, cache, None, 5)
    shown = torch.ones(2, seen, dtype=torch.long)
    shown[1, LENGTH + 2] = 0
    copies = [copy.deepcopy(cache) for _ in range(4)]
    for layer in copies[0].layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    for layer, other in zip(copies[1].layers, copies[2].layers, strict=True):  # an exchange
        layer.keys, other.keys = other.keys, layer.keys
        layer.values, other.values = other.values, layer.values
    expected = logits(copies[3], shown)
    for each in (cache, *copies[:3]):
        torch.testing.assert_close(logits(each, four_d(shown, 1)), expected, atol=1e-5, rtol=1e-5)
    whole = StaticCache(model.config, max_cache_len=40)  # beside them, and lacks nothing
    with torch.no_grad():
        model(tokens(2, LENGTH + 5), past_key_values=whole)
        same = copy.deepcopy(whole)
    own = torch.nn.functional.pad(four_d(shown, 1), (0, 40 - seen))
    torch.testing.assert_close(logits(whole, own), logits(same, shown), atol=1e-5, rtol=1e-5)


def test_masks_that_add_numbers() -> None:
    model = tiny_model()
    mask = (~four_d(torch.ones(2, LENGTH + NUM_NEW), NUM_NEW)).float() * -1e30
    mask[..., -2] -= 0.5
    with pytest.raises(ValueError, match="adds finite numbers"):
        ask(model, compressed(model, "ragged"), mask)


@pytest.mark.parametrize("kind", ["ragged", "uniform"])
@pytest.mark.parametrize("count", [1, NUM_NEW])
def test_masks_over_later_tokens(kind: str, count: int) -> None:
    """They hide what they say, as in a cache that lacks nothing."""
    model = tiny_model()
    full, cache = (prefill(model, tokens(2, LENGTH)) for _ in range(2))
    keep_all(cache, kind == "ragged")
    mask = torch.ones(2, LENGTH + 4 + count, dtype=torch.long)
    mask[1, LENGTH + 1 : LENGTH + 3] = 0
    logits = []
    for each in (full, cache):
        ask(model, each, None, 4)
        position = torch.arange(LENGTH + 4, LENGTH + 4 + count)[None]
        with torch.no_grad():
            out = model(
                tokens(2, count, 2),
                past_key_values=each,
                attention_mask=mask,
                position_ids=position,
            )
        logits.append(out.logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_padding_stays_hidden(tmp_path: Any) -> None:
    """By whatever mask: padding was never stored. Rows keep theirs when they change places."""
    model = tiny_model()
    cache = compressed(model, "padded")
    save_cache(cache, tmp_path / "cache", model)
    caches = [cache, load_cache(tmp_path / "cache", model)]
    mask = whole(LENGTH + NUM_NEW)
    logits = [ask(model, each, mask) for each in caches]
    assert torch.equal(*logits)
    more = mask.clone()
    more[1, PADDING[1]] = 0
    for each in caches:
        each.crop(LENGTH)
        with pytest.raises(ValueError, match="hides some"):
            ask(model, each, more)
        each.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(ValueError, match="hides some"):
            ask(model, each, mask)
        ask(model, each, mask.flip(0))


@pytest.mark.parametrize("kind", ["packed", "blocks", "heads"])
def test_prompts_of_several_texts(kind: str) -> None:
    """What the last token does not see is no padding where others see it."""
    model = tiny_model()
    mask = torch.ones(LENGTH, LENGTH).tril().bool().repeat(2, 4, 1, 1)
    if kind == "heads":
        mask[:, 1, 9:, :9] = False
    else:
        cuts = [9] if kind == "packed" else [1, 9]
        for cut in cuts:
            mask[1, :, cut:, :cut] = False
    cache = DynamicCache()
    press = MoERouterPress(0.3, router=None)
    with press(model), torch.no_grad(), pytest.raises(ValueError, match="others see"):
        model(tokens(2, LENGTH), past_key_values=cache, attention_mask=mask)
    assert press.get_stats()["forward_count"] == 0
    assert all(layer.keys.shape[2] == LENGTH for layer in cache.layers[:1])


@pytest.mark.parametrize("fill", [False, True])
def test_padding_in_masks_of_four_dimensions(fill: bool) -> None:
    model = tiny_model()
    mask = four_d(whole(LENGTH), LENGTH)
    if fill:
        mask |= ~mask.any(-1, keepdim=True)
    counts = []
    for given in (whole(LENGTH), mask):
        press = MoERouterPress(0.3, router=None)
        with press(model):
            prefill(model, tokens(2, LENGTH), attention_mask=given)
        counts.append(press.get_stats()["compression"])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["ragged", "uniform", "k8v8"])
@pytest.mark.parametrize("form", ["bool", "additive", "one row for all"])
def test_masks_that_show_tokens_to_earlier_ones(kind: str, form: str) -> None:
    """As those of images and of prefixes do: in a ragged layer, too, it is the mask that says."""
    model, logits = tiny_model(), []
    mask = torch.ones(2, 1, 1 if form == "one row for all" else 4, LENGTH + 4).bool()
    if form == "additive":
        mask[:, :, :2, -1] = False
    mask = mask.float().log() if form == "additive" else mask
    if form == "additive":
        mask = mask.clamp(min=torch.finfo(mask.dtype).min)
    pairs = "16" if kind != "k8v8" else kind
    with MoERouterPress(0.0, router=None, pairs=pairs)(model):
        quantised = prefill(model, tokens(2, LENGTH))
    full, cache = prefill(model, tokens(2, LENGTH)), quantised
    if pairs == "16":
        keep_all(cache, kind == "ragged")
    for each in (full, cache):
        logits.append([ask(model, each, mask, 4), ask(model, copy.deepcopy(full), None, 4)])
    assert (logits[0][0] - logits[0][1]).abs().max() > 0.1, "the mask shows nothing new"
    off, moved = ((logits[i][j] - logits[0][0]).norm() for i, j in ((1, 0), (0, 1)))
    assert off < (1e-4 if pairs == "16" else 0.3) * moved


class Late(Expert):
    """Wants the last positions in the first layer, and the first ones in others if asked."""

    name = "late"
    comparable = True

    def __init__(self, alike: bool) -> None:
        self.alike = alike

    def scores(self, view: LayerView) -> Tensor:
        turned = view.module.layer_idx and not self.alike
        place = view.positions[:, None].float().expand(*view.keys.shape[:3])
        return LENGTH - place if turned else place


@pytest.mark.parametrize("kind", ["uniform", "model", "k8v8", "streaming", "growing", "loaded"])
def test_masks_that_hide_what_only_a_later_layer_stores(kind: str, tmp_path: Path) -> None:
    """transformers makes one mask for all layers, which is checked for the first."""
    model = tiny_model()
    for alike in (True, False):
        cache: Any = DynamicCache()
        options: dict[str, Any] = {"budget": "uniform" if kind == "uniform" else "model"}
        options |= {"fold": False}
        options |= {"pairs": "k8v8"} if kind == "k8v8" else {}
        options |= {"streaming": True} if kind == "streaming" else {}
        options |= {"decoding": DecodingConfig(6, 1)} if kind == "growing" else {}
        expert = {"experts": [Late(alike)], "top_k": 1, "sinks": 0, "recent": 1}
        with torch.no_grad(), MoERouterPress(0.8, **expert, **options)(model):
            model(tokens(2, LENGTH - 2), past_key_values=cache)
            for _ in range(2):
                model(tokens(2, 1), past_key_values=cache)
        if kind == "loaded":
            save_cache(cache, tmp_path / "cache", model)
            cache = load_cache(tmp_path / "cache", model)
        if kind != "uniform":
            forget_positions(cache)
        hides = torch.ones(2, LENGTH + NUM_NEW, dtype=torch.long)
        hides[:, 2] = 0
        if alike:  # nothing is stored there
            shown = ask(model, copy.deepcopy(cache), torch.ones_like(hides))
            torch.testing.assert_close(ask(model, cache, hides), shown)
        else:
            lengths = [layer.get_seq_length() for layer in cache.layers]
            with pytest.raises(ValueError, match="attention mask that shows"):
                ask(model, cache, hides)
            assert [layer.get_seq_length() for layer in cache.layers] == lengths


def hidden_at_random(length: int, count: int, seed: int) -> Tensor:
    """A mask of two rows over positions that shows about half of the first ones."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.rand(2, length + count, generator=generator) < 0.5
    shown[:, length:] = True
    return shown


@pytest.mark.parametrize("pairs", ["16", "k8v8"])
@pytest.mark.parametrize("how", ["at once", "chunks", "streaming", "decoding"])
@pytest.mark.parametrize("padding", [(0, 0), PADDING], ids=["", "padded"])
def test_masks_that_hide_parts_of_a_context(
    pairs: str, how: str, padding: tuple[int, int], tmp_path: Path
) -> None:
    """As the full cache does, in which all that has left is hidden as well, whatever follows."""
    life = Lockstep(padding=padding)
    options: dict[str, Any] = {"budget": "model", "pairs": pairs, "fold": False, "recent": 4}
    options |= {"experts": ["selective"], "top_k": 1, "streaming": how == "streaming"}
    if how == "decoding":
        options["decoding"] = DecodingConfig(9, 2)
    press = MoERouterPress(0.6 if pairs == "16" else 0.8, router=None, **options)
    chunks = [10, 8, LENGTH - 18] if how == "chunks" else [LENGTH]
    with press(life.model, context_length=LENGTH if how == "chunks" else None):
        for serial, count in enumerate(chunks):
            life.feed(tokens(2, count, serial))
        for serial in range(6 * (how == "decoding")):
            life.feed(tokens(2, 1, 10 + serial))

    def ask_all(seed: int) -> None:
        assert all(layer.follows_masks for layer in life.cache.layers)
        for count in (1, NUM_NEW):
            life.feed(tokens(2, count, seed), hidden_at_random(life.length, count, seed + count))

    ask_all(20)
    life.crop(1 + NUM_NEW + 2)  # into the context, too
    ask_all(30)
    life.select([1, 0])
    ask_all(40)
    save_cache(life.cache, tmp_path / "cache", life.model)
    life.cache = copy.deepcopy(load_cache(tmp_path / "cache", life.model))
    ask_all(50)
    life.select([1], "batch_select_indices")
    life.repeat(2)
    ask_all(60)


def test_masks_that_hide_parts_of_what_only_a_later_layer_stores() -> None:
    """One mask is made for all layers: it holds for those that lack what the first one stores."""
    model, logits = tiny_model(), []
    for hidden in ([], [2], [LENGTH - 3]):
        cache: Any = DynamicCache()
        expert = {"experts": [Late(alike=False)], "top_k": 1, "sinks": 0, "recent": 1}
        with torch.no_grad(), MoERouterPress(0.7, budget="model", **expert)(model):
            model(tokens(2, LENGTH), past_key_values=cache)
        mask = torch.ones(2, LENGTH + NUM_NEW, dtype=torch.long)
        mask[:, hidden] = 0
        logits.append(ask(model, cache, mask))
    assert min(float((x - logits[0]).abs().max()) for x in logits[1:]) > 1e-3


@pytest.mark.parametrize("kind", ["folded", "mixed", "few"])
def test_masks_over_pairs_that_hold_more_than_their_own(kind: str) -> None:
    """Or over dense layers behind ragged ones, or over so few that positions are not kept."""
    model, length = tiny_model(), 400 if kind == "few" else LENGTH
    cache: Any = DynamicCache()
    options: dict[str, Any] = {"pairs": "k8v4", "fold": True} if kind == "folded" else {}
    options |= {"sinks": 1, "recent": 1} if kind == "few" else {}
    ratio = {"few": 0.99, "folded": 0.9, "mixed": 0.7}[kind]
    with torch.no_grad(), MoERouterPress(ratio, router=None, budget="model", **options)(model):
        model(tokens(2, length), past_key_values=cache)
    if kind == "mixed":
        cache.layers[1] = compressed(model, "uniform").layers[1]
    else:
        assert not any(layer.follows_masks for layer in cache.layers)
    mask = torch.ones(2, length + 1, dtype=torch.long)
    mask[:, 3] = 0
    with pytest.raises(ValueError, match="attention mask that shows"), torch.no_grad():
        model(tokens(2, 1), past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize("form", ["two dimensions", "four dimensions"])
def test_masks_that_hide_parts_of_a_context_while_compression_goes_on(form: str) -> None:
    """What is hidden would count as padding: that is refused before anything runs."""
    model = tiny_model()
    cache: Any = DynamicCache()
    mask = torch.ones(1, LENGTH + 1, dtype=torch.long)
    mask[:, :3] = 0
    press = MoERouterPress(0.5, router=None, decoding=DecodingConfig(8, 2))
    with torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        given = mask if form == "two dimensions" else four_d(mask, 1)
        with pytest.raises(ValueError, match="while compression goes on"):
            model(tokens(1, 1), past_key_values=cache, attention_mask=given)
        assert cache.get_seq_length() == LENGTH
    with torch.no_grad():
        model(tokens(1, 1), past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ratio", [0.9, 0.5])  # what is held is shorter than the window, or longer
def test_windows_in_caches_that_do_not_know_them(attention: str, ratio: float) -> None:
    """Of them transformers asks the first layer for the size of all masks: it is compressed."""
    model = tiny_model("gemma2")
    model.set_attn_implementation(attention)
    assert model.config.layer_types[:2] == ["full_attention", "sliding_attention"]

    def answers(cache: DynamicCache) -> Tensor:
        with torch.no_grad():
            with MoERouterPress(ratio, router=None, budget="uniform")(model):
                model(tokens(2, 50), past_key_values=cache)
            assert cache.layers[0].evicted
            return torch.cat(
                [model(tokens(2, n, n), past_key_values=cache).logits for n in (1, 3, 1, 20, 1)], 1
            )

    torch.testing.assert_close(
        answers(DynamicCache()), answers(DynamicCache(config=model.config)), atol=1e-4, rtol=1e-4
    )
