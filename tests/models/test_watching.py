"""Queries taken from a model's attention."""

from typing import Any

import pytest
import torch
from press_probes import make_press
from tiny_models import TINY_MODELS, prefill, tiny_model, tokens
from torch import Tensor

from moekv import Expert, LayerView
from moekv.experts import builder
from moekv.models import watching


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_window_queries_are_those_of_the_model(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken from the attention where it can be watched, the same as computed again elsewhere."""
    compute, computed = builder.window_queries, []

    def count(*args: Any) -> Tensor:
        computed.append(args)
        return compute(*args)

    class Ask(Expert):
        name = "ask"

        def scores(self, view: LayerView) -> Tensor:
            assert view.queries.shape[2] == min(9, view.keys.shape[2])
            expected = compute(view.module, view.hidden_states, view.kwargs, 9, 0).query
            torch.testing.assert_close(view.queries, expected)
            return torch.zeros(view.keys.shape[:3])

    monkeypatch.setattr(builder, "window_queries", count)
    model = tiny_model(name, attention)
    press = make_press(experts=[Ask()], window=9, top_k=1)
    with press(model):
        for length in (1, 5, 30):
            computed.clear()
            prefill(model, tokens(2, length))
            watched = True
            assert len(computed) == (0 if watched else len(press._statistics.layers))
    assert not watching._watchers
