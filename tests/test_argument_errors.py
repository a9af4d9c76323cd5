"""Arguments in the wrong place, of the wrong kind, or one where several are wanted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from character_tokenizer import character_tokenizer
from peers import HAS_KVPRESS
from tiny_models import tiny_model, tokens
from transformers import DynamicCache

import moekv
from moekv import BaseMoERouter, LayerView, MoERouterPress, ops
from moekv.experts.semantic import SemanticExpert

MODEL, TOKENIZER, PRESS = tiny_model(), character_tokenizer(), MoERouterPress()
IDS = tokens(1, 40)
NO_MODEL, NO_TOKENIZER = "a model of transformers, got", "a tokenizer of transformers, got"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moekv.compress(TOKENIZER, MODEL, "text"), NO_MODEL),
        (lambda: moekv.compress("text", MODEL, TOKENIZER), NO_MODEL),
        (lambda: moekv.compress(MODEL, "text", TOKENIZER), NO_TOKENIZER),
        (lambda: moekv.load_context("file", TOKENIZER, MODEL), NO_MODEL),
        (lambda: moekv.load_cache(MODEL, "file"), "the path of a file, got Llama"),
        (lambda: moekv.calibrate(TOKENIZER, MODEL, ["text"]), NO_MODEL),
        (lambda: moekv.calibrate(MODEL, ["text"], TOKENIZER), NO_TOKENIZER),
        (lambda: PRESS(TOKENIZER).__enter__(), NO_MODEL),
        (lambda: moekv.prefill_in_chunks(MODEL, PRESS, IDS, chunk_size=8), "a MoERouterPress, got"),
    ],
)
def test_swapped_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"expected {message}"):
        call()


class Around(torch.nn.Module):
    """A module of one's own around a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model


@pytest.mark.parametrize("wrapper", [Around, torch.nn.DataParallel])
def test_a_wrapper_around_a_model(wrapper: Any) -> None:
    wrapped = wrapper(MODEL)
    for call in (
        lambda: PRESS(wrapped).__enter__(),
        lambda: moekv.compress(wrapped, TOKENIZER, "text"),
        lambda: moekv.calibrate(wrapped, TOKENIZER, ["text"]),
    ):
        with pytest.raises(TypeError, match=f"got {wrapper.__name__}, which has no config; pass"):
            call()


def scores_in_numpy(view: LayerView) -> Any:
    return view.values.norm(dim=-1).numpy()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PRESS(type(MODEL)).__enter__(), "a model of transformers"),
        (lambda: moekv.compress(MODEL, type(TOKENIZER), "text"), "a tokenizer of transformers"),
        (lambda: moekv.compress(MODEL, TOKENIZER, "text", press=type(PRESS)), "a MoERouterPress"),
        (lambda: moekv.prefill_in_chunks(type(PRESS), MODEL, IDS, chunk_size=8), "MoERouterPress"),
        (lambda: MoERouterPress(router=moekv.CalibratedRouter), "router a moekv.CalibratedRouter"),
        (lambda: MoERouterPress(decoding=moekv.DecodingConfig), "decoding a moekv.DecodingConfig"),
    ],
)
def test_classes_where_instances_are_wanted(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=rf"expected .*{message}.*got the class \w+, no instance"):
        call()


def test_ids_that_are_none() -> None:
    for ids in (IDS[0], IDS.float()):
        with pytest.raises(ValueError, match=r"expected input_ids \[B, T\] as integers, got"):
            moekv.prefill_in_chunks(PRESS, MODEL, ids, chunk_size=8)


def test_one_text_where_a_list_is_wanted() -> None:
    with pytest.raises(TypeError, match="expected a list of texts, got one str"):
        moekv.calibrate(MODEL, TOKENIZER, "one text")


def test_the_class_of_a_router() -> None:
    with pytest.raises(TypeError, match=r"got the class: BaseMoERouter\(hidden_size, "):
        MoERouterPress(router_type=BaseMoERouter)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [8.0, "8", True])
def test_counts_that_are_no_integers(size: Any) -> None:
    with pytest.raises(ValueError, match="expected chunk_size an integer >= 1, got"):
        moekv.prefill_in_chunks(PRESS, MODEL, IDS, chunk_size=size)
    context = moekv.compress(MODEL, TOKENIZER, "text")
    with pytest.raises(ValueError, match="expected max_new_tokens an integer >= 1, got"):
        context.ask("Which?", max_new_tokens=size)


def test_arrays_where_tensors_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Any = None
    with pytest.raises(TypeError, match=r"expected input_ids as a tensor \[1, T\], got ndarray"):
        moekv.CompressedContext(MODEL, TOKENIZER, cache, IDS.numpy())  # type: ignore[arg-type]
    press = MoERouterPress(experts=["semantic"])
    monkeypatch.setattr(SemanticExpert, "scores", lambda self, view: scores_in_numpy(view))
    with press(MODEL), pytest.raises(ValueError, match="from expert 'semantic', got ndarray"):
        MODEL(IDS)
    with pytest.raises(TypeError, match=r"expected input_ids as a tensor \[B, T\], got ndarray"):
        moekv.prefill_in_chunks(PRESS, MODEL, IDS.numpy(), chunk_size=8)  # type: ignore[arg-type]
    scores: Any = np.zeros((1, 2, 8), dtype=np.float32)
    with pytest.raises(TypeError, match=r"expected a tensor, got ndarray; torch\.from_numpy"):
        ops.select_kept(scores, total=4)
    for no_tensor in (scores, [0.5], None, 0.5):
        pairs: Any = no_tensor
        for call in (
            lambda x=pairs: ops.expected_attention(x, x, scaling=1.0),
            lambda x=pairs: ops.expert_scores(x, x, x, kinds=[0], scaling=1.0),
            lambda x=pairs: ops.fold_pairs(x, x, x, x, x, scaling=1.0),
            lambda x=pairs: ops.quantize_pairs(x, x, pairs="k8v8"),
            lambda x=pairs: ops.ragged_attention(x, x, x, x, x, scaling=1.0),
        ):
            with pytest.raises(TypeError, match="expected a tensor, got"):
                call()
    with pytest.raises(RuntimeError, match=r"expected queries \[.*\], got \[\]"):
        ops.expected_attention(torch.tensor(1.0), torch.tensor(1.0), scaling=1.0)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    context = moekv.compress(MODEL, TOKENIZER, "The tide covers it.")
    with pytest.raises(FileNotFoundError, match="expected a file in a folder that is there, got"):
        context.save(tmp_path / "missing" / "context.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not HAS_KVPRESS, reason="needs kvpress")
def test_ragged_around_a_press_that_frees_by_itself() -> None:
    with pytest.raises(TypeError, match="got moekv's own, which frees it: use it as it is"):
        moekv.ragged(MoERouterPress())


@pytest.mark.skipif(not HAS_KVPRESS, reason="needs kvpress")
def test_ragged_folding_that_cannot_be() -> None:
    from kvpress import KeyRerotationPress, KnormPress

    with pytest.raises(ValueError, match="expected quantised pairs .* with fold, got '16'"):
        moekv.ragged(KnormPress(0.5), fold=True)
    with pytest.raises(TypeError, match="expected fold True or False, got 'auto'"):
        moekv.ragged(KnormPress(0.5), pairs="k8v8", fold="auto")
    press = moekv.ragged(KeyRerotationPress(KnormPress(0.5)), pairs="k8v8", fold=True)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="leaves pairs of the prompt as they are with fold"),
        press(MODEL),
    ):
        MODEL(tokens(1, 40), past_key_values=DynamicCache())
    assert not any(module._forward_hooks for module in MODEL.modules())


def test_a_total_that_is_no_count() -> None:
    total: Any = 4.0
    with pytest.raises(TypeError, match=r"select_kept: expected total as an int or ints, got 4\.0"):
        ops.select_kept(IDS.new_zeros(1, 2, 8, dtype=torch.float32), total=total)
