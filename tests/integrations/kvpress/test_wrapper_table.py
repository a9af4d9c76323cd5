"""docs/kvpress.md says what every wrapper makes of every option."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import padded
from tiny_models import tiny_model, tokens
from torch import nn
from transformers import DynamicCache
from wrapping import WRAPPERS

from moekv import DecodingConfig, MoERouterPress

PAGE = Path(__file__).parents[3] / "docs/kvpress.md"
LENGTH = 80

# A few values of each option that are not its default.
OPTIONS: dict[str, list[Any]] = {
    "compression_ratio": [0.3, 0.8],
    "experts": [["semantic"], ["temporal"]],
    "policy": ["dominant"],
    "sinks": [0, 12],
    "recent": [0, 8],
    "window": [2, 30],
    "budget": ["uniform", "model"],
    "decoding": [DecodingConfig(16, 4)],
    "streaming": [True],
    "pairs": ["k8v8", "k4v4"],
}

# Others that they act beside: only some experts look at the last queries.
BESIDE: dict[str, dict[str, Any]] = {"window": {"experts": ["selective"]}}


def run(model: nn.Module, name: str, options: dict[str, Any]) -> list[Any]:
    """What is left, and where, of a prefill and four steps."""
    if list(options) == ["experts"]:
        options = options | {"top_k": 1}
    cache = DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    with torch.no_grad(), WRAPPERS[name](MoERouterPress(**options))(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        for _ in range(4):
            model(tokens(1, 1), past_key_values=cache)
    left = []
    for layer, module in zip(cache.layers, model.model.layers, strict=True):
        masked = module.self_attn.masked_key_indices
        left += [layer.keys.tolist(), None if masked is None else [x.tolist() for x in masked]]
    return left


def cells(model: nn.Module, name: str) -> Iterator[str]:
    plain = run(model, name, {})
    for option, values in OPTIONS.items():
        try:
            given = BESIDE.get(option, {})
            found = [run(model, name, {option: value} | given) for value in values]
        except ValueError as error:
            assert f"expected {option}=" in str(error) and f"inside {name}" in str(error)
            yield "refused"
            continue
        without = run(model, name, given) if given else plain
        yield "acts" if any(x != without for x in found) else "the wrapper's"
    with pytest.raises(TypeError, match="context_length"):
        WRAPPERS[name](MoERouterPress())(model, context_length=LENGTH)
    yield "refused"
    with pytest.raises(ValueError, match="without padding"):
        run_padded(model, name)
    yield "refused"


def run_padded(model: nn.Module, name: str) -> None:
    cache, mask = DynamicCache(), padded(LENGTH)
    with torch.no_grad(), WRAPPERS[name](MoERouterPress())(model):
        model(tokens(2, LENGTH), attention_mask=mask, past_key_values=cache)
        for _ in range(4):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            model(tokens(2, 1), attention_mask=mask, past_key_values=cache)


def table() -> str:
    heads = [*(f"`{name}`" for name in OPTIONS), "`context_length`", "padded rows"]
    rows = [["wrapper", *heads], ["---"] * (1 + len(heads))]
    model = tiny_model()
    rows += [[f"`{name}`", *cells(model, name)] for name in WRAPPERS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_page_says_what_wrappers_make_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they differ, the page has to say what pytest prints here."""
    monkeypatch.setattr("kvpress.attention_patch.search_hyperplane", lambda x: x.mean(1) * -1e5)
    found = table()
    print(found)
    assert found in PAGE.read_text()
