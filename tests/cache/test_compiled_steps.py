"""Steps over compressed caches in models that are compiled: one graph, with the same answers."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache

from moekv import MoERouterPress
from moekv.cache import buffers

LENGTH = 30
PADDING = 4

CASES: dict[str, dict[str, Any]] = {
    "ragged": {},
    "folded": {"compression_ratio": 0.8, "pairs": "k8v4", "fold": True},
    "uniform": {"budget": "uniform"},
    "layer": {"budget": "layer"},
}


def thorough(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.thorough)


# Each takes some seconds for each graph.
STEPS = [("ragged", True), ("layer", True)]
STEPS += [
    thorough(name, mask) for name in CASES for mask in (False, True) if (name, mask) not in STEPS
]


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compressed(model: PreTrainedModel, name: str, rows: int = 1, padding: int = 0) -> Cache:
    mask = torch.ones(rows, LENGTH, dtype=torch.long)
    mask[0, :padding] = 0
    press = MoERouterPress(**{"compression_ratio": 0.5} | CASES[name])
    with press(model), torch.no_grad():
        return model(tokens(rows, LENGTH), attention_mask=mask, use_cache=True).past_key_values


@torch.no_grad()
def ask(forward: Any, cache: Cache, mask: Tensor | None, count: int = 1, seed: int = 0) -> Tensor:
    fed = tokens(cache.layers[0].batch_size, count, seed)
    inputs = {} if mask is None else {"attention_mask": mask}
    logits: Tensor = forward(fed, past_key_values=cache, use_cache=True, **inputs).logits
    return logits


def shown(rows: int, length: int, *hidden: int, padding: int = 0) -> Tensor:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :padding] = 0
    mask[:, list(hidden)] = 0
    return mask


@pytest.mark.parametrize(("name", "with_mask"), STEPS)
def test_steps_are_one_graph_however_long_the_cache_grows(
    name: str, with_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first one, such as find no room left, and those that leave none."""
    monkeypatch.setattr(buffers, "_LEAST_ROOM", 3)
    torch._dynamo.utils.counters.clear()
    padding = PADDING if with_mask and name in ("ragged", "folded") else 0
    model, rows = tiny_model(), 1 + bool(padding)
    cache = compressed(model, name, rows, padding)
    plain = copy.deepcopy(cache)
    forward = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for step in range(14):
        mask = shown(rows, LENGTH + step + 1, padding=padding) if with_mask else None
        got, expected = ask(forward, cache, mask, seed=step), ask(model, plain, mask, seed=step)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert cache.get_seq_length() == LENGTH + 14


@pytest.mark.parametrize("count", [1, thorough(3)])
def test_ragged_layers_follow_masks_in_graphs(count: int) -> None:
    model = tiny_model()
    cache = compressed(model, "ragged", 2, PADDING)
    plain = copy.deepcopy(cache)
    forward = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    length = LENGTH
    for hidden in ((), (17, 18, 22), (25, LENGTH)):
        length += count
        mask = shown(2, length, *hidden, padding=PADDING)
        got, expected = ask(forward, cache, mask, count), ask(model, plain, mask, count)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [thorough("folded"), "uniform"])
def test_graphs_refuse_masks_over_pairs_without_positions(name: str) -> None:
    model = tiny_model()
    cache = compressed(model, name)
    forward = torch.compile(model.forward, dynamic=True, backend="aot_eager")
    ask(forward, copy.deepcopy(cache), shown(1, LENGTH + 1))
    with pytest.raises(ValueError, match="positions that were compressed"):
        ask(forward, cache, shown(1, LENGTH + 1, 12))


def test_graphs_refuse_the_callers_own_masks_over_dense_layers() -> None:
    """In four dimensions, over all positions: attention gets it as it is."""
    model = tiny_model()
    cache = compressed(model, "uniform")
    forward = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    mask = torch.ones(1, 1, 1, LENGTH + 1, dtype=torch.bool)
    expected = ask(model, copy.deepcopy(cache), mask)
    got = ask(forward, copy.deepcopy(cache), mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    mask[..., 7] = False
    with pytest.raises(ValueError, match="positions that were compressed"):
        ask(forward, cache, mask)


def test_graphs_refuse_masks_over_static_caches() -> None:
    model = tiny_model()
    forward = torch.compile(model.forward, dynamic=False, backend="aot_eager")
    place = torch.tensor([LENGTH])

    def step(*hidden: int) -> Tensor:
        cache = StaticCache(model.config, max_cache_len=LENGTH + 9)
        with MoERouterPress(0.5, budget="uniform")(model), torch.no_grad():
            model(tokens(1, LENGTH), past_key_values=cache)
        with torch.no_grad():
            logits: Tensor = forward(
                tokens(1, 1),
                attention_mask=shown(1, LENGTH + 1, *hidden),
                past_key_values=cache,
                position_ids=place[None],
                cache_position=place,
            ).logits
        return logits

    assert step().isfinite().all()
    with pytest.raises(RuntimeError, match="shows all positions that were compressed"):
        step(12)
