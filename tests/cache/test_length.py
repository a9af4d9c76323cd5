"""One notion of length: whatever the budget, a compressed cache counts what it was fed."""

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from moekv import DecodingConfig, MoERouterPress, load_cache, save_cache
from moekv.cache.growing import GrowingLayer
from moekv.cache.ragged import RaggedLayer

LENGTH, ANSWER = 60, 8
PRESSES: dict[str, dict[str, Any]] = {
    "uniform": {"budget": "uniform"},
    "layer": {"budget": "layer"},
    "head": {"budget": "head"},
    "model": {"budget": "model"},
    "routed": {"num_experts": 4},
    "dominant": {"num_experts": 4, "policy": "dominant"},
    "streaming": {"budget": "model", "streaming": True},
}
GREEDY = {"do_sample": False, "max_new_tokens": ANSWER, "pad_token_id": 0, "eos_token_id": 999}


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    """Greedy answer; no token is padding, also where the answer before had such ones."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | options)


@pytest.fixture(params=PRESSES)
def press(request: pytest.FixtureRequest) -> MoERouterPress:
    return MoERouterPress(0.5, **PRESSES[request.param])


def compressed(press: MoERouterPress, model: Any, ids: Tensor) -> DynamicCache:
    with press(model), torch.no_grad():
        return prefill(model, ids)


def one_by_one(model: Any, cache: Cache, ids: Tensor) -> Tensor:
    """Greedy answer to what follows the cache's tokens, each fed alone at its true position."""
    answer: list[Tensor] = []
    first = cache.get_seq_length()
    asked = ids.shape[1] - first
    with torch.no_grad():
        for step in range(asked + ANSWER - 1):
            at = torch.tensor([first + step])
            token = ids[:, first + step : first + step + 1] if step < asked else answer[-1]
            out = model(token, past_key_values=cache, position_ids=at[None], cache_position=at)
            answer.append(out.logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(answer[asked - 1 :], 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_goes_on_with_the_whole_text(press: MoERouterPress, attention: str) -> None:
    model = tiny_model(attention=attention)
    text = tokens(1, LENGTH + 9)
    if attention == "eager" and press.budget in ("head", "model"):
        pytest.skip("eager attention reads dense caches")
    if attention == "eager" and press.policy == "dominant":
        pytest.skip("its layers may differ in length")
    cache = compressed(press, model, text[:, :LENGTH])
    assert cache.get_seq_length() == LENGTH
    expected = one_by_one(model, copy.deepcopy(cache), text)
    got = generate(model, text, past_key_values=cache)[:, text.shape[1] :]
    assert torch.equal(got, expected)
    assert cache.get_seq_length() == text.shape[1] + ANSWER - 1


@pytest.mark.parametrize("reload", [False, True])
def test_a_chat_of_several_turns(press: MoERouterPress, reload: bool, tmp_path: Any) -> None:
    """Every turn feeds what is new, and answers as if each token had come alone."""
    model, text = tiny_model(), tokens(1, LENGTH)
    cache = compressed(press, model, text)
    fed: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for turn in range(3):
        text = torch.cat([text, tokens(1, 7 + turn, seed=turn)], 1)
        new = text.shape[1] - cache.get_seq_length()
        expected = one_by_one(model, copy.deepcopy(cache), text)
        if reload:
            save_cache(cache, tmp_path / "cache", model)
            cache = load_cache(tmp_path / "cache", model)
        fed.clear()
        out = generate(model, text, past_key_values=cache)
        assert fed[0] == new
        assert torch.equal(out[:, text.shape[1] :], expected)
        text = out
    hook.remove()


def test_a_question_of_several_tokens_is_causal(press: MoERouterPress) -> None:
    """At once or one after another: the same logits for every token."""
    model, text = tiny_model(), tokens(1, LENGTH + 6)
    cache = compressed(press, model, text[:, :LENGTH])
    other = copy.deepcopy(cache)
    with torch.no_grad():
        at_once = model(text[:, LENGTH:], past_key_values=cache).logits
        single = [
            model(text[:, LENGTH + i : LENGTH + i + 1], past_key_values=other).logits
            for i in range(6)
        ]
    torch.testing.assert_close(at_once, torch.cat(single, 1), atol=1e-4, rtol=1e-4)


def test_crop_forgets_a_question(press: MoERouterPress) -> None:
    model, text = tiny_model(), tokens(1, LENGTH)
    cache = compressed(press, model, text)
    questions = [tokens(1, 5, seed=seed) for seed in (1, 2)]
    expected = [
        model(question, past_key_values=copy.deepcopy(cache)).logits for question in questions
    ]
    for how in (LENGTH, -5):
        for question, logits in zip(questions, expected, strict=True):
            got = model(question, past_key_values=cache).logits
            torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-5)
            assert cache.get_seq_length() == LENGTH + 5
            cache.crop(how)
            assert cache.get_seq_length() == LENGTH


def test_slices_that_are_assigned_back_count_true_positions() -> None:
    """As kvpress's pipeline takes an answer off, by what ``get_seq_length`` said before."""
    model, text = tiny_model(), tokens(1, LENGTH)
    for budget in ("uniform", "layer", "model"):
        cache = compressed(MoERouterPress(0.5, budget=budget), model, text)
        lengths = [layer.get_seq_length() for layer in cache.layers]
        for count in (3, 40):
            model(tokens(1, count), past_key_values=cache)
            for layer, length in zip(cache.layers, lengths, strict=True):
                layer.keys = layer.keys[:, :, :length]
                layer.values = layer.values[:, :, :length]
                assert layer.get_seq_length() == LENGTH


def test_a_crop_reaches_as_far_as_every_head_does(press: MoERouterPress) -> None:
    model, text = tiny_model(), tokens(2, LENGTH)
    cache = compressed(press, model, text)
    layers = [layer for layer in cache.layers if isinstance(layer, GrowingLayer | RaggedLayer)]
    reach = 0 if press.policy == "dominant" else press.recent
    assert {layer.run for layer in layers} == {reach}
    before = [layer.nbytes for layer in layers]
    with pytest.raises(ValueError, match=f"cannot crop to {LENGTH - reach - 1} positions"):
        cache.crop(LENGTH - reach - 1)
    assert cache.get_seq_length() == LENGTH and [x.nbytes for x in layers] == before
    if not reach:
        return
    full = prefill(model, text)
    cache.crop(LENGTH - 5)
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        dense = layer.to_dense()[0] if isinstance(layer, RaggedLayer) else layer.keys
        assert torch.equal(dense[:, :, -11:], whole.keys[:, :, LENGTH - 16 : LENGTH - 5])
    ids = torch.cat([text[:, : LENGTH - 5], tokens(2, 4, seed=3)], 1)
    expected = one_by_one(model, copy.deepcopy(cache), ids)
    got = generate(model, ids, past_key_values=cache)[:, ids.shape[1] :]
    assert torch.equal(got, expected)


HELPERS = {
    "assistant": lambda: {"assistant_model": tiny_model("mistral")},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 4},
    "early exit": lambda: {"assistant_early_exit": 1},
}
CAN_EXIT = Version(transformers.__version__) > Version("5.3")  # 5.2 fails by itself


def skip_unless_served(how: str) -> None:
    if how == "early exit" and not CAN_EXIT:
        pytest.skip("generate(assistant_early_exit=...) of this transformers fails by itself")


def looping(length: int) -> Tensor:
    """A text that repeats itself, so that prompt lookup finds something to guess."""
    return tokens(1, 12).repeat(1, length // 12 + 1)[:, :length]


@pytest.mark.parametrize("how", HELPERS)
def test_guesses_behind_a_compressed_context(press: MoERouterPress, how: str) -> None:
    """Assisted decoding over a cache answers as greedy decoding does."""
    skip_unless_served(how)
    model = tiny_model()
    text = looping(LENGTH + 9)
    cache = compressed(press, model, text[:, :LENGTH])
    expected = one_by_one(model, copy.deepcopy(cache), text)
    whole = prefill(model, text[:, :LENGTH])
    plain = generate(model, text, past_key_values=whole, **HELPERS[how]())
    if not torch.equal(plain, generate(model, text)):
        pytest.skip("this transformers feeds the text again, whatever the cache holds")
    got = generate(model, text, past_key_values=cache, **HELPERS[how]())
    assert torch.equal(got[:, text.shape[1] :], expected)


@pytest.mark.parametrize("how", HELPERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_guesses_in_the_block(press: MoERouterPress, how: str, attention: str) -> None:
    """What was guessed wrongly leaves the cache, also where it was compressed with the prompt."""
    skip_unless_served(how)
    model = tiny_model(attention=attention)
    if attention == "eager" and (press.budget in ("head", "model") or press.policy == "dominant"):
        pytest.skip("eager attention reads dense caches of one length")
    if press.policy == "dominant":
        press.policy, press.recent = "mixture", 0  # the guesses alone stay in any case
    for seed in range(6):
        text = torch.cat([looping(LENGTH), tokens(1, 3, seed=seed)], 1)
        with press(model):
            out = generate(model, text, return_dict_in_generate=True, **HELPERS[how]())
        cache = out.past_key_values
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        check_pairs(model, out)
        layer = cache.layers[0]
        # Behind what was compressed, right guesses included, greedy decoding says the same.
        end = layer.context_length
        assert text.shape[1] <= end
        cache.crop(end)
        rest = out.sequences[:, end + 1 :]
        expected = one_by_one(model, cache, out.sequences[:, : end + 1])
        assert torch.equal(expected[:, : rest.shape[1]], rest)


def check_pairs(model: PreTrainedModel, out: Any) -> float:
    """Check that each pair of the first layer is of the text; return how many a head holds.

    Its keys are of tokens and positions alone.
    """
    full = prefill(model, out.sequences[:, :-1]).layers[0].keys
    layer = out.past_key_values.layers[0]
    keys, *_, lengths = (
        layer.to_dense()
        if isinstance(layer, RaggedLayer)
        else (layer.keys, torch.full(layer.keys.shape[:2], layer.keys.shape[2]))
    )
    for row, head in torch.cartesian_prod(*map(torch.arange, lengths.shape)).tolist():
        count = int(lengths[row, head])
        distance = torch.cdist(keys[row, head, keys.shape[2] - count :], full[row, head])
        assert (distance.amin(-1) < 1e-2).all()
    return float(lengths.float().mean())


@pytest.mark.parametrize("how", [*HELPERS, "samples"])
@pytest.mark.parametrize("budget", ["uniform", "model"])
def test_guesses_while_compression_goes_on(how: str, budget: str) -> None:
    skip_unless_served(how)
    model, config = tiny_model(), DecodingConfig(30, 8)
    options = {"num_return_sequences": 3, "do_sample": True}
    for seed in range(3):
        text = torch.cat([looping(LENGTH), tokens(1, 3, seed=seed)], 1)
        press = MoERouterPress(0.5, budget=budget, num_experts=4, recent=4, decoding=config)
        with press(model), torch.random.fork_rng():
            torch.manual_seed(seed)
            given = HELPERS[how]() if how in HELPERS else options
            given |= {"return_dict_in_generate": True, "max_new_tokens": 20}
            out = generate(model, text, **given)
        assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
        guesses = 0 if how == "samples" else 5
        assert check_pairs(model, out) <= config.target + config.interval + guesses
        assert press.get_stats()["forward_count"] >= 1


def test_a_chat_in_a_block_that_goes_on_compressing() -> None:
    model, text, cache = tiny_model(), tokens(1, LENGTH), DynamicCache()
    press = MoERouterPress(0.5, budget="uniform", num_experts=6, decoding=DecodingConfig(30, 8))
    with press(model):
        for turn in range(4):
            out = generate(model, text, past_key_values=cache)
            assert cache.get_seq_length() == out.shape[1] - 1
            assert all(layer.keys.shape[2] < 38 + 11 for layer in cache.layers)
            text = torch.cat([out, tokens(1, 10, seed=turn)], 1)


def test_beams_and_copies_go_on(press: MoERouterPress) -> None:
    model, text = tiny_model(), tokens(1, LENGTH + 4)
    cache = compressed(press, model, text[:, :LENGTH])
    cache.batch_repeat_interleave(3)
    got = generate(model, text, past_key_values=cache, num_beams=3, num_return_sequences=3)
    assert got.shape == (3, text.shape[1] + ANSWER)
    assert cache.get_seq_length() == got.shape[1] - 1
