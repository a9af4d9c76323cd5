"""Attention over compressed layers: what the op serves, and what is left to the model."""

import copy
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from twins import DIM, GROUP, HEADS, VALUE_DIM, Twin

from moekv import MoERouterPress, ops
from moekv.budget import Kept
from moekv.cache import attention, masks
from moekv.cache.attention import RaggedPairs
from moekv.cache.growing import GrowingLayer
from moekv.cache.ragged import RaggedLayer


def test_masks_of_every_kind_mean_the_same():
    twin = Twin(2, 30, seed=3)
    keys, values = twin.pairs(2, 4)
    pairs, _ = twin.layer.update(keys, values)
    query = torch.randn(2, HEADS * GROUP, 4, DIM)
    seen = torch.ones(2, 34, dtype=torch.bool)
    seen[0, 31] = seen[1, 30] = False
    four_d = (torch.ones(4, 34).tril(30).bool() & seen[:, None])[:, None]
    additive = torch.where(four_d, 0.0, torch.finfo(torch.float32).min)
    results = [
        attention.attend(nn.Identity(), query, pairs, mask)
        for mask in (seen, seen.long(), four_d, additive)
    ]
    for result in results[1:]:
        assert torch.equal(result, results[0])
    assert isinstance(pairs, RaggedPairs)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_scaling_softcap_and_sinks_are_the_models(scaling, softcap, sinks, gradients):
    """Over a ragged layer that has lost nothing, as over all pairs."""
    keys, values = torch.randn(2, 2, HEADS, 20, DIM)
    kept = Kept.from_mask(torch.ones(2, HEADS, 20, dtype=torch.bool))
    layer = RaggedLayer.compress(keys, values, kept)
    new = torch.randn(2, 2, HEADS, 1, DIM)
    pairs, _ = layer.update(*new)
    query = torch.randn(2, HEADS * GROUP, 1, DIM, requires_grad=gradients)
    s_aux = torch.randn(HEADS * GROUP) if sinks else None
    got = attention.attend(
        nn.Identity(), query, pairs, None, scaling=scaling, softcap=softcap, s_aux=s_aux
    ).transpose(1, 2)
    assert got.requires_grad == gradients
    keys, values = (
        torch.cat([old, last], 2).repeat_interleave(GROUP, 1)
        for old, last in zip((keys, values), new, strict=True)
    )
    logits = query @ keys.mT * (DIM**-0.5 if scaling is None else scaling)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(2, -1, 1, 1)], -1)
    weights = logits.softmax(-1)[..., : keys.shape[2]]
    torch.testing.assert_close(got, weights @ values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("form", ["bool", "additive"])
def test_masks_over_the_context_for_each_head_and_query(form, gradients):
    """As over all pairs, of which those that have left are hidden."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, HEADS, 41, DIM, generator=generator)
    stays = torch.rand(2, HEADS, 41, generator=generator) < 0.4
    stays[0, 1] = False
    layer = RaggedLayer.compress(keys, values, Kept.from_mask(stays))
    new = torch.randn(2, 2, HEADS, 3, DIM, generator=generator)
    pairs, _ = layer.update(*new)
    query = torch.randn(2, HEADS * GROUP, 3, DIM, generator=generator, requires_grad=gradients)
    shown = torch.rand(2, HEADS * GROUP, 3, 44, generator=generator) < 0.5
    shown[..., 41:] = torch.ones(3, 3).tril().bool()
    mask = shown if form == "bool" else (~shown).float() * torch.finfo(torch.float32).min
    got = attention.attend(nn.Identity(), query, pairs, mask).transpose(1, 2)
    assert got.requires_grad == gradients
    stays = nn.functional.pad(stays, (0, 3), value=True)
    keys, values, stays = (
        x.repeat_interleave(GROUP, 1)
        for x in (torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2), stays)
    )
    logits = (query @ keys.mT).double() * DIM**-0.5
    weights = logits.masked_fill(~(shown & stays[:, :, None]), -torch.inf).softmax(-1)
    torch.testing.assert_close(got, (weights @ values.double()).float(), atol=1e-5, rtol=1e-5)


def test_functions_of_transformers_are_wrapped_once_and_still_serve_dense_layers():
    attention.install()
    first = dict(ALL_ATTENTION_FUNCTIONS)
    attention.install()
    assert dict(ALL_ATTENTION_FUNCTIONS) == first
    layer = DynamicLayer()
    keys, values = layer.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    query = torch.randn(1, 2, 5, 8)
    got, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Identity(), query, keys, values, None, 0.0)
    expected = nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
    torch.testing.assert_close(got, expected.transpose(1, 2))


@pytest.fixture
def op_calls(monkeypatch):
    """What attention asks of ragged_attention."""
    calls = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["backend"])
        return ops.ragged_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "ops", SimpleNamespace(ragged_attention=spy))
    return calls


def growing_step(batch: int, count: int = 1, backend: str = "auto") -> tuple[Tensor, ...]:
    """Queries, keys and values of a step over a growing layer with room behind its pairs."""
    generator = torch.Generator().manual_seed(batch)
    first, new = (
        [torch.randn(batch, HEADS, n, dim, generator=generator) for dim in (DIM, VALUE_DIM)]
        for n in (90, count)
    )
    layer = GrowingLayer(*first, backend=backend)
    pairs = layer.update(*new)
    return torch.randn(batch, HEADS * GROUP, count, DIM, generator=generator), *pairs


def sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as transformers calls it where no compressed layer is in play."""
    keys, values = (x.repeat_interleave(GROUP, dim=1) for x in (keys, values))
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None].bool()
    attend = nn.functional.scaled_dot_product_attention
    return attend(query, keys, values, mask, is_causal=False).transpose(1, 2)


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "2-D"])
def test_steps_over_a_growing_layer_are_served_by_the_op(kind, op_calls, monkeypatch):
    query, keys, values = growing_step(2)
    seen = torch.ones(2, 91, dtype=torch.bool)
    seen[1, :30] = False
    mask = {
        "none": None,
        "bool": seen[:, None, None],
        "additive": torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None, None],
        "2-D": seen.long(),
    }[kind]
    if kind == "additive":  # as transformers makes them of others
        monkeypatch.setitem(masks._seen_whole, mask, masks.Known())
    name = "flash_attention_2" if kind == "2-D" else "sdpa"
    function = ALL_ATTENTION_FUNCTIONS[name]
    got, weights = function(nn.Identity(), query, keys, values, mask, dropout=0.0, scaling=0.3)
    assert op_calls == ["auto"] and weights is None
    torch.testing.assert_close(got, sdpa(query * 0.3 * DIM**0.5, keys, values, mask))


SOME_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
LEFT_TO_THE_MODEL = {
    "several queries": lambda: (growing_step(1, count=2), {}),
    "backend torch": lambda: (growing_step(1, backend="torch"), {}),
    "plain keys": lambda: (changed(1, torch.clone), {}),
    "gradients": lambda: (changed(0, Tensor.requires_grad_), {}),
    "another dtype": lambda: (changed(0, Tensor.double), {}),
    "mask that may add anything": lambda: (growing_step(1), {"attention_mask": SOME_MASK.float()}),
    "mask of another length": lambda: (growing_step(1), {"attention_mask": SOME_MASK}),
    "dropout": lambda: (growing_step(1), {"dropout": 0.1}),
    "softcap": lambda: (growing_step(1), {"softcap": 30.0}),
    "attention sinks": lambda: (growing_step(1), {"s_aux": torch.zeros(6)}),
    "keys that kvpress masks": lambda: (growing_step(1), {"masked": (torch.zeros(1),) * 3}),
}


def changed(index: int, change: Any) -> list[Tensor]:
    tensors = list(growing_step(1))
    tensors[index] = change(tensors[index])
    return tensors


@pytest.mark.parametrize("name", LEFT_TO_THE_MODEL)
def test_all_else_over_a_growing_layer_goes_to_the_models_attention(name, op_calls):
    tensors, options = LEFT_TO_THE_MODEL[name]()
    module = nn.Identity()
    module.masked_key_indices = options.pop("masked", None)
    mask = options.pop("attention_mask", None)
    answer = object()
    serve = attention._serve_compressed_layers(lambda *_, **__: answer)
    assert serve(module, *tensors, mask, **options) is answer
    assert not op_calls


def test_crops_and_copies_of_a_growing_layer_are_still_served(op_calls):
    _, keys, values = growing_step(1)
    layer = copy.deepcopy(GrowingLayer(keys, values))
    layer.crop(40)
    layer.keys, layer.values = layer.keys[:, :, :30], layer.values[:, :, :30]
    new = [torch.randn(1, HEADS, 1, dim) for dim in (DIM, VALUE_DIM)]
    query = torch.randn(1, HEADS * GROUP, 1, DIM)
    pairs = layer.update(*new)
    got, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Identity(), query, *pairs, None)
    assert len(op_calls) == 1
    expected = [
        torch.cat([a[:, :, :30], b], dim=2) for a, b in zip((keys, values), new, strict=True)
    ]
    torch.testing.assert_close(got, sdpa(query, *expected, None))


@pytest.fixture
def registered() -> Iterator[Callable[[Any], None]]:
    """Registers a user's own attention function under a name."""

    def register(function: Any) -> None:
        AttentionInterface.register("mine", function)
        AttentionMaskInterface.register("mine", sdpa_mask)
        attention.install()

    yield register
    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        functions._global_mapping.pop("mine", None)
        functions._local_mapping.pop("mine", None)


def warmer(module: Any, query: Tensor, key: Any, *args: Any, **kwargs: Any) -> Any:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, 1.5 * query, key, *args, **kwargs)


def own(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    causal = query.shape[2] > 1
    out = functional.scaled_dot_product_attention(1.5 * query, key, value, is_causal=causal)
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("function", [warmer, own, functools.wraps(sdpa_attention_forward)(own)])
@pytest.mark.parametrize("budget", ["auto", "uniform", "layer"])
def test_attention_functions_of_users_attend_themselves(
    function: Any, budget: str, registered: Callable[[Any], None]
) -> None:
    """Whatever they do beside attention is done, behind a context as before."""
    registered(function)
    model = tiny_model()
    model.config._attn_implementation = "mine"
    with torch.no_grad(), MoERouterPress(0.5, budget=budget, router=None)(model):
        cache = model(tokens(1, 40), use_cache=True).past_key_values
    assert not any(isinstance(layer, RaggedLayer) for layer in cache.layers)
    plain = DynamicCache()
    for i, layer in enumerate(cache.layers):
        plain.update(*(x.as_subclass(Tensor).clone() for x in (layer.keys, layer.values)), i)
    with torch.no_grad():
        got, expected = (
            model(tokens(1, 1), past_key_values=x, position_ids=torch.tensor([[40]])).logits
            for x in (cache, plain)
        )
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_attention_functions_of_users_and_ragged_layers(
    registered: Callable[[Any], None],
) -> None:
    """They are refused at the block's start, or say that they hand on what they get."""
    registered(own)
    model = tiny_model()
    model.config._attn_implementation = "mine"
    for options in ({"budget": "head"}, {"pairs": "k8v4"}):
        message = "an attention function of transformers such as 'sdpa' for .*, got 'mine'"
        with pytest.raises(ValueError, match=message), MoERouterPress(**options)(model):
            pass
    model.config._attn_implementation = "sdpa"
    with torch.no_grad(), MoERouterPress(0.5, router=None)(model):
        cache = model(tokens(1, 40), use_cache=True).past_key_values
    model.config._attn_implementation = "mine"
    with torch.no_grad(), pytest.raises(TypeError, match="no dense tensor"):
        model(tokens(1, 1), past_key_values=cache)

    def passes_on(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        fed.append(query.shape[2])
        return warmer(module, query, *args, **kwargs)

    passes_on.serves_compressed_layers = True  # type: ignore[attr-defined]
    fed: list[int] = []
    registered(passes_on)
    with torch.no_grad(), MoERouterPress(0.5, budget="head", router=None)(model):
        cache = model(tokens(1, 40), use_cache=True).past_key_values
        fed.clear()
        model(tokens(1, 1), past_key_values=cache)
    assert fed == [1, 1] and all(isinstance(layer, RaggedLayer) for layer in cache.layers)
