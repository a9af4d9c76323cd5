"""The attention that pairs can expect."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from press_probes import Fixed
from tiny_models import TINY_MODELS, prefill, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache

from moekv import LayerView, MoERouterPress, prefill_in_chunks
from moekv.cache.ragged import RaggedLayer
from moekv.experts.expected import CROWDED, ExpectedExpert, weigh
from moekv.experts.registry import fitted_experts
from moekv.models.hooks import find_layers
from moekv.models.queries import next_queries, window_queries
from moekv.ops import reference
from moekv.press.prefill import Prefill
from moekv.routing.mixing import order


def rate(model: Any, input_ids: Tensor, **inputs: Any) -> list[tuple[LayerView, Tensor, Tensor]]:
    """For each layer what the expert sees, the attention it expects, and its scores."""
    seen = []

    class Look(ExpectedExpert):
        waits = False  # for the whole view

        def scores(self, view: LayerView) -> Tensor:
            scores = super().scores(view)
            seen.append((view, view.expected(), scores))
            return scores

    with MoERouterPress(0.5, experts=[Look()], top_k=1)(model):
        prefill(model, input_ids, **inputs)
    return seen


@pytest.mark.parametrize("name", ["llama", "phi3", "yarn"])
def test_queries_stand_behind_the_last_token(name: str) -> None:
    """As a forward of the same hidden states at the position behind the text rotates them."""
    model = tiny_model("llama" if name == "yarn" else name)
    if name == "yarn":  # which makes its rotations longer
        config = copy.deepcopy(model.config)
        config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0}
        config.rope_parameters["original_max_position_embeddings"] = 32
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        assert model.model.rotary_emb.attention_scaling > 1.2
    view, scores, _ = rate(model, tokens(1, 90))[1]
    layer = model.model.layers[1].self_attn
    heads = (*view.hidden_states.shape[:2], -1, layer.head_dim)
    if name == "phi3":
        queries = layer.qkv_proj(view.hidden_states)[..., : 4 * layer.head_dim]
    else:
        queries = layer.q_proj(view.hidden_states)
    queries = queries.view(heads).transpose(1, 2)
    cos, sin = model.model.rotary_emb(view.hidden_states, torch.tensor([[90]]))
    turning, rest = queries.split([cos.shape[-1], queries.shape[-1] - cos.shape[-1]], -1)
    left, right = turning.chunk(2, -1)
    turned = turning * cos + torch.cat([-right, left], -1) * sin
    queries = torch.cat([turned, rest], -1)
    wanted = reference.expected_attention(queries, view.keys, scaling=layer.scaling)
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_queries_are_projected_once(name: str) -> None:
    """By the model: what was seen there is turned on, as if the layer were asked again."""
    model = tiny_model(name)
    _, layers = find_layers(model)
    rate(model, tokens(2, 40))  # learns how its layers rotate
    projections = [getattr(layer, "q_proj", None) or layer.qkv_proj for layer in layers]
    calls = []
    for projection in projections:
        projection.register_forward_hook(lambda *_: calls.append(1))
    press = MoERouterPress(0.5, experts=[ExpectedExpert()], top_k=1)
    with press(model):
        calls.clear()  # what was asked before anything ran
        prefill(model, tokens(2, 40))
        assert len(calls) == len(layers)
        assert not press._session._stack
    for view, _, _ in rate(model, tokens(2, 40)):
        assert view.asked is not None
        anew = dataclasses.replace(view, asked=None)
        torch.testing.assert_close(anew.expected(), view.expected(), atol=1e-4, rtol=1e-4)


def test_chunks_leave_no_queries_behind() -> None:
    """Chunks behind the first are not rated, and what their layers projected goes at once."""
    model = tiny_model()
    press = MoERouterPress(0.5, experts=["expected", "selective"])
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), press(model, context_length=60):
        for chunk in tokens(1, 60).split(30, 1):
            model(chunk, past_key_values=cache)
            assert not press._session._stack


@pytest.mark.parametrize(
    "name", ["cohere", "glm", "olmo2", "qwen3_moe", "smollm3", "phi3", "nemotron", "stablelm"]
)
def test_queries_are_the_layers_own(name: str) -> None:
    """Asked again, those of all tokens are what attention has asked; also behind them."""
    seen = []

    class Look(ExpectedExpert):
        waits = False  # for the whole view

        def scores(self, view: LayerView) -> Tensor:
            given = view.module, view.hidden_states, view.kwargs
            formed = window_queries(*given, 40, None, view.rotary).query
            seen.append((formed[:, :, 7:], view.queries[:, :, 7:]))  # behind the padding
            behind = next_queries(*given, view.rotary)
            wanted = reference.expected_attention(behind, view.keys, view.start, **view.logits)
            torch.testing.assert_close(view.expected()[0], wanted[0], atol=1e-4, rtol=1e-4)
            return super().scores(view)

    model = tiny_model(name)
    with MoERouterPress(0.5, experts=[Look()], top_k=1, window=40)(model):
        mask = (torch.arange(40) >= torch.tensor([[0], [7]])).long()
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        if name == "nemotron":  # which reads dense pairs alone
            prefill(model, tokens(2, 40))
        else:
            prefill(model, tokens(2, 40), attention_mask=mask, position_ids=position_ids)
    assert len(seen) == model.config.num_hidden_layers
    for formed, asked in seen:
        torch.testing.assert_close(formed, asked, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["cohere", "glm", "olmo2", "qwen3_moe"])
def test_eager_attention_is_seen(name: str) -> None:
    asked = rate(tiny_model(name), tokens(2, 40))
    formed = rate(tiny_model(name, attention="eager"), tokens(2, 40))
    for (view, _, _), (other, _, _) in zip(asked, formed, strict=True):
        torch.testing.assert_close(other.queries, view.queries, atol=1e-4, rtol=1e-4)


def test_padded_rows_are_rated_one_by_one() -> None:
    model, padding = tiny_model(), torch.tensor([0, 7, 80])
    ids = tokens(3, 120)
    mask = (torch.arange(120) >= padding[:, None]).long()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = rate(model, ids, attention_mask=mask, position_ids=position_ids)
    for row, start in enumerate(padding.tolist()):
        alone = rate(model, ids[row : row + 1, start:])
        for (_, together, _), (_, single, _) in zip(batch, alone, strict=True):
            assert not together[row, :, :start].any()
            torch.testing.assert_close(together[row, :, start:], single[0], atol=1e-4, rtol=1e-4)


def test_a_row_without_tokens() -> None:
    """As in the first chunk of a batch in which one prompt is much longer."""
    model, ids = tiny_model(), tokens(2, 40)
    mask = (torch.arange(40) >= torch.tensor([[0], [25]])).long()
    press = MoERouterPress(0.5)
    filled = prefill_in_chunks(press, model, ids, attention_mask=mask, chunk_size=10)
    for layer in filled.past_key_values.layers:
        assert isinstance(layer, RaggedLayer)
        assert layer.stored_pairs == [2 * 20, 2 * 7]


def test_values_of_no_size_are_finite() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
    _, attention, scores = rate(model, tokens(1, 40))[0]
    assert scores.isfinite().all()
    over = (attention.exp().mean() / CROWDED).clamp(min=1).log()
    torch.testing.assert_close(scores, attention + 0.5 * math.log(1e-6) - over)


def test_routed_experts_have_their_share() -> None:
    """Of 60 tokens' 4 x 60 pairs, a tenth of half of which are theirs before the shared one's."""
    model, ids = tiny_model(), tokens(1, 60)
    mine = Fixed("mine", torch.arange(60.0))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefill, "_commit", lambda _, rated: seen.extend(rated))
        with MoERouterPress(0.5, experts=[mine], shared="expected")(model):
            prefill(model, ids)
    votes = [each.rating.votes for each in seen]
    assert all(x.comparable == (True, False) and x.has_shared for x in votes)
    torch.testing.assert_close(votes[0].shares, torch.tensor([[0.9], [0.1]]))
    first = (
        torch.stack(order(votes, "model", [None, None]))[:, 0].flatten().argsort(descending=True)
    )
    last = {59 + 60 * head for head in range(4)}  # of each head: what `mine` wants most
    assert last <= set(first[: 40 + 4].tolist())  # ranks 1 x 4 heads / .1


def test_one_threshold_over_the_model_where_scores_are_comparable() -> None:
    def budget_of(**options: Any) -> str:
        model, press = (
            tiny_model(attention=options.pop("attention", "sdpa")),
            MoERouterPress(0.5, **options),
        )
        with press(model):
            layers = prefill(model, tokens(1, 60)).layers
        ragged = {isinstance(layer, RaggedLayer) for layer in layers}
        assert press.get_stats()["compression"]["ratio"] == 0.5
        used: str = press.get_stats()["budget"]["used"]
        assert ragged == {used == "model"}
        return used

    assert budget_of() == "model"
    assert budget_of(experts=["expected"], top_k=1) == "model"
    assert budget_of(experts=["expected", "semantic"]) == "model"
    assert budget_of(experts=["temporal", "semantic"]) == "model"
    assert budget_of(experts=["semantic"]) == "uniform"  # heads are not compared
    assert budget_of(experts=["expected"], top_k=1, policy="dominant") == "uniform"
    assert budget_of(num_experts=4) == "model"
    assert budget_of(attention="eager") == "layer"


def test_layers_that_look_everywhere_are_not_retained_before_all_others() -> None:
    """Their mean is lowered to the bound, within a layer the order is the same; padding is none."""
    model = tiny_model()
    with torch.no_grad():
        layer = model.model.layers[0].self_attn
        layer.q_proj.weight.mul_(40)  # sharp looks
    ids, mask = tokens(2, 240), (torch.arange(240) >= torch.tensor([[0], [50]])).long()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for view, attention, scores in rate(model, ids, attention_mask=mask, position_ids=position_ids):
        size = view.values.norm(dim=-1).log() / 2
        for row, start in enumerate((0, 50)):
            looks = attention[row, :, start:].double().exp()
            over = (looks.mean() / CROWDED).clamp(min=1).log()
            wanted = looks.log() + size[row, :, start:] - over
            torch.testing.assert_close(
                scores[row, :, start:].double(), wanted, atol=1e-5, rtol=1e-5
            )
            found.append(bool(over > 0))
    assert any(found) and not all(found)


def test_fitted_experts_score_as_they_were_fitted() -> None:
    bounded, fitted = ExpectedExpert(), fitted_experts(["expected", "semantic"])
    assert [expert.name for expert in fitted] == ["expected", "semantic"]
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(40)
    (view, attention, scores), *_ = rate(model, tokens(1, 90))
    plain = fitted[0].scores(view)
    torch.testing.assert_close(plain, weigh(attention, view.values))
    assert (scores < plain - 0.1).any()
    torch.testing.assert_close(bounded.scores(view), scores)
