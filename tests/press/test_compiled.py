"""A model that has been compiled, whole or in parts, is compressed as it is without."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from growth_cases import EXPERTS, decode
from tiny_models import prefill, tiny_model, tokens
from transformers import DynamicCache, PreTrainedModel

from moekv import DecodingConfig, MoERouterPress

LENGTH = 30

PRESSES: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"budget": "uniform"},
    "streaming": {"budget": "model", "streaming": True},
    "decoding": {"experts": EXPERTS, "decoding": DecodingConfig(14, 2)},
}


def layers(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile(backend="eager")


WAYS: dict[str, Callable[[Any], None]] = {
    "forward": lambda m: setattr(m, "forward", torch.compile(m.forward, backend="eager")),
    "model": lambda m: m.compile(backend="eager"),
    "decoder": lambda m: m.model.compile(backend="eager"),
    "layers": layers,
}


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def live(model: PreTrainedModel, press: MoERouterPress) -> tuple[torch.Tensor, Any]:
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
        logits = [decode(model, cache, LENGTH + step) for step in range(3)]
    return torch.cat(logits), press.get_stats()["compression"]


def thorough(*case: str) -> Any:
    return pytest.param(*case, marks=pytest.mark.thorough)


# Each is traced anew, for a quarter of a minute.
CASES = [
    ("model", "decoding"),
    ("layers", "default"),
    thorough("model", "default"),
    thorough("forward", "default"),
    thorough("decoder", "default"),
    thorough("model", "uniform"),
    thorough("model", "streaming"),
]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_compiled_models_are_compressed(way: str, name: str) -> None:
    model = tiny_model()
    expected, counts = live(model, MoERouterPress(0.5, **PRESSES[name]))
    WAYS[way](model)
    for _ in range(2):  # the second block meets the graphs of the first
        got, compression = live(model, MoERouterPress(0.5, **PRESSES[name]))
        assert compression == counts and counts["ratio"] >= 0.5
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_what_is_refused_is_refused() -> None:
    model = tiny_model()
    cache = prefill(model, tokens(1, LENGTH))
    model.compile(backend="eager")
    with MoERouterPress(0.5)(model), pytest.raises(RuntimeError, match="compressed nothing"):
        decode(model, cache, LENGTH)
    with MoERouterPress(0.5)(model), pytest.raises(RuntimeError, match="use_cache=True"):
        model(tokens(1, LENGTH), use_cache=False)


def test_a_graph_that_may_not_be_broken_says_so() -> None:
    model = tiny_model()
    compiled, cache = torch.compile(model.__call__, fullgraph=True, backend="eager"), DynamicCache()
    message = "a press acts"
    with MoERouterPress(0.5)(model), torch.no_grad(), pytest.raises(Exception, match=message):
        compiled(tokens(1, LENGTH), past_key_values=cache, use_cache=True)
