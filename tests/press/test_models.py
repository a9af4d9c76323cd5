"""The press on every attention of transformers that it supports."""

import copy

import pytest
import torch
from model_sweep import try_press
from tiny_models import TINY_MODELS, prefill, tiny_model, tokens
from transformers import DynamicCache, Phi3ForCausalLM, PreTrainedModel

from moekv import Expert, LayerView, MoERouterPress
from moekv.models import habits
from moekv.ops import ScoreKind

LENGTH = 90
PRESS = {
    "experts": ["conservative", "selective", "semantic", "temporal"],
    "budget": "uniform",
}


class Spy(Expert):
    """Remembers the views."""

    name = "spy"
    kinds = (ScoreKind.MASS,)

    def __init__(self) -> None:
        self.views: list[LayerView] = []

    def scores(self, view: LayerView) -> torch.Tensor:
        self.views.append(view)
        return view.scores_of(ScoreKind.MASS)


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_mass_is_the_attention_that_the_model_pays(name: str) -> None:
    """Queries, rotary embedding, norms, scaling and softcap are those of the model."""
    model = tiny_model(name, "eager")
    spy = Spy()
    with MoERouterPress(experts=[spy], top_k=1, window=13)(model):
        prefill(model, tokens(2, LENGTH))
    assert len(spy.views) == len(full_attention_layers(model))
    for view in spy.views:
        batch, num_heads = view.keys.shape[:2]
        window = view.attentions[:, :, -13:].unflatten(1, (num_heads, -1))
        assert window.shape == (batch, num_heads, window.shape[2], 13, LENGTH)
        mass = view.scores_of(ScoreKind.MASS)
        torch.testing.assert_close(mass, window.mean((2, 3)), atol=1e-5, rtol=1e-4)
        assert mass.std() > 1e-3  # else any query would do


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generates_as_from_a_cache_cut_by_hand(name: str, attention: str) -> None:
    model = tiny_model(name, attention)
    input_ids = tokens(2, LENGTH)
    press = MoERouterPress(0.7, **PRESS)
    with press(model):
        out = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    compressed = prefill_with(MoERouterPress(0.7, **PRESS), model, input_ids)
    full = prefill(model, input_ids)
    for i in full_attention_layers(model):
        assert compressed.layers[i].keys.shape[2] == int(LENGTH * 0.3)
        cut_as(compressed, full, i)
        assert torch.equal(full.layers[i].keys, compressed.layers[i].keys)
        assert torch.equal(full.layers[i].values, compressed.layers[i].values)
    # Decode from the full prefill's pairs, at the true positions.
    token = out.logits[0].argmax(-1)
    for step, logits in enumerate(out.logits[1:]):
        position = torch.tensor([LENGTH + step])
        # Versions that make masks by a cache's length are told the true one.
        full.get_seq_length = lambda *_, length=LENGTH + step, **__: length
        with torch.no_grad():
            by_hand = model(
                token[:, None],
                past_key_values=full,
                position_ids=position[None],
                cache_position=position,
            ).logits[:, -1]
        torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=1e-4)
        token = logits.argmax(-1)
    assert torch.equal(out.sequences[:, -1], token)


def prefill_with(
    press: MoERouterPress, model: PreTrainedModel, input_ids: torch.Tensor
) -> DynamicCache:
    with press(model):
        return prefill(model, input_ids)


def cut_as(compressed: DynamicCache, full: DynamicCache, index: int) -> None:
    """Leave in a layer of the full cache the pairs whose keys the compressed one has, in order."""
    kept, layer = compressed.layers[index].keys, full.layers[index]
    same = (kept[:, :, :, None] == layer.keys[:, :, None]).all(-1)
    assert (same.sum(-1) == 1).all()
    positions = same.int().argmax(-1)
    assert (positions.diff(dim=-1) > 0).all()
    expanded = positions[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
    layer.keys = layer.keys.gather(2, expanded)
    layer.values = layer.values.gather(2, expanded)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_sliding_layers_stay_as_they_are(name: str) -> None:
    model = tiny_model(name)
    input_ids = tokens(1, LENGTH)
    compressed = prefill_with(MoERouterPress(**PRESS), model, input_ids)
    full = prefill(model, input_ids)
    config = model.config.get_text_config()
    sliding = set(range(config.num_hidden_layers)) - set(full_attention_layers(model))
    assert bool(sliding) == name.startswith("gemma")
    for i in sliding:
        assert torch.equal(compressed.layers[i].keys, full.layers[i].keys)


@pytest.mark.parametrize("window", [64, 512, 1024])
def test_windows_that_never_fill_hide_nothing(window: int) -> None:
    """Phi-3.5 and Phi-4 have windows longer than the context; one that is shorter is no such."""
    plain = tiny_model("phi3")
    config = copy.deepcopy(plain.config)
    config.sliding_window, config.max_position_embeddings = window, 512
    model = Phi3ForCausalLM(config).eval()
    model.load_state_dict(plain.state_dict())
    if window < 512:
        with pytest.raises(ValueError, match="got none: sliding windows"), MoERouterPress()(model):
            pass
        return
    found = []
    for one in (plain, model):
        press = MoERouterPress(0.5)
        with press(one):
            out = one.generate(
                tokens(1, LENGTH),
                max_new_tokens=4,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        assert press.get_stats()["compression"]["ratio"] == 0.5
        found.append(torch.stack(out.logits))
    assert torch.equal(*found)


def test_beams_share_the_compressed_prompt() -> None:
    model, press = tiny_model(), MoERouterPress(**PRESS)
    with press(model):
        out = model.generate(
            tokens(2, LENGTH),
            num_beams=3,
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
        )
    assert out.sequences.shape == (2, LENGTH + 5)
    assert out.past_key_values.layers[0].keys.shape[:3] == (6, 2, LENGTH // 2 + 4)


def test_rows_of_a_batch_keep_what_each_keeps_alone() -> None:
    model = tiny_model()
    input_ids = tokens(3, LENGTH)
    together = prefill_with(MoERouterPress(**PRESS), model, input_ids)
    for row in range(3):
        alone = prefill_with(MoERouterPress(**PRESS), model, input_ids[row : row + 1])
        for i in range(2):
            torch.testing.assert_close(
                together.layers[i].keys[row], alone.layers[i].keys[0], atol=1e-5, rtol=1e-5
            )


def test_learned_sinks_in_ragged_layers() -> None:
    """Eager attention is all that such a model has; it is served, as over masked pairs."""
    model, press = tiny_model("gpt_oss"), MoERouterPress(0.5)
    assert try_press(model) == "works: 1 of 2 layers"
    cache = prefill_with(press, model, tokens(1, LENGTH))
    assert press.get_stats()["budget"] == {"asked": "auto", "used": "model"}
    with pytest.raises(NotImplementedError, match="output_attentions=False"), torch.no_grad():
        model(tokens(1, 1), past_key_values=cache, output_attentions=True)


def test_learned_sinks_have_no_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt_oss")
    monkeypatch.setattr(habits, "_has_kernel_with_sinks", lambda _: False)
    with (
        pytest.raises(ValueError, match="without learned attention sinks for budget 'model'"),
        MoERouterPress(0.5, budget="model")(model),
    ):
        pass
    press = MoERouterPress(0.5)
    prefill_with(press, model, tokens(1, LENGTH))
    assert press.get_stats()["budget"] == {"asked": "auto", "used": "layer"}
