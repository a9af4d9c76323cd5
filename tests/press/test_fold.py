"""``fold``: evicted pairs join retained ones, in the same bytes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from growth_cases import decode
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

import moekv
from moekv import DecodingConfig, MoERouterPress, ops
from moekv.cache import attention
from moekv.cache.ragged import RaggedLayer
from moekv.press import prefill as prefills
from moekv.press.options import FOLD_FROM

LENGTH, LAYERS, HEADS, DIM = 60, 2, 2, 16  # of the tiny Llama
QUANTISED = ops.PAIRS[1:]


def compressed(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: Any
) -> tuple[DynamicCache, MoERouterPress]:
    press = MoERouterPress(**{"compression_ratio": 0.9, "router": None, "fold": True, **options})
    inputs = {}
    if mask is not None:
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with press(model):
        return prefill(model, ids, **inputs), press


@pytest.mark.parametrize("pairs", QUANTISED)
@pytest.mark.parametrize("budget", ["model", "head", "layer", "uniform"])
@pytest.mark.parametrize("ratio", [0.8, 0.93])
def test_a_bias_is_part_of_the_bytes(ratio: float, budget: str, pairs: str) -> None:
    """The budget is exact to one pair of two more bytes."""
    cache, press = compressed(
        tiny_model(), tokens(2, LENGTH), compression_ratio=ratio, pairs=pairs, budget=budget
    )
    dense = 2 * LAYERS * HEADS * LENGTH * 2 * DIM * 4
    one = ops.pair_layout(pairs, DIM, DIM).num_bytes + 2
    heads = 2 * LAYERS * HEADS
    per_head = min(LENGTH, int(LENGTH * (1 - ratio) * (2 * DIM * 4) / one))
    assert per_head < LENGTH
    held, stats = sum(layer.nbytes for layer in cache.layers), press.get_stats()
    parts = [x for layer in cache.layers for x in layer.rows.tensors]
    assert held == sum(x.untyped_storage().nbytes() for x in parts) == per_head * one * heads
    assert held + one * heads > (1 - ratio) * dense
    assert stats["compression"]["ratio"] == (dense - held) / dense
    kinds = stats["cache"]["bytes_by_kind"]
    assert kinds is not None and kinds["biases"] == 2 * per_head * heads
    assert sum(kinds.values()) == held
    assert 0.1 < stats["compression"]["folded"] <= 1
    joined = sum(int(layer.num_joined) for layer in cache.layers)
    assert joined == round(stats["compression"]["folded"] * stats["cache"]["evictions"])


def test_who_has_joined_whom_is_what_the_op_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By queries of the text behind it, over the keys of the full cache."""
    model, ids, seen = tiny_model(), tokens(1, LENGTH), []
    fold = prefills.Folding.fold

    def watch(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((self, keys, values, *args))
        return fold(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(prefills.Folding, "fold", watch)
    cache, _ = compressed(model, ids, pairs="k8v8")
    full = prefill(model, ids)
    asked: dict[int, Tensor] = {}
    layers = model.model.layers

    def hear(module: nn.Module, what: Any) -> None:
        asked[module.layer_idx] = what.query

    with torch.no_grad(), attention.watched([layer.self_attn for layer in layers], hear):
        attention.install()
        every = [torch.full((1, 1), LENGTH)] * LENGTH  # each token again, behind the text
        model(ids, past_key_values=copy.deepcopy(full), position_ids=torch.cat(every, 1))
    for i, (folding, keys, values, kept) in enumerate(seen):
        assert torch.equal(keys, full.layers[i].keys)
        assert torch.equal(values, full.layers[i].values)
        if i == 0:  # of later layers the inputs differ
            distance = torch.cdist(folding.queries[0, 1], asked[0][0, 1])  # samples of 60 tokens
            assert distance.amin(1).max() < 0.01 and (distance.amin(0) < 0.01).sum() > 20
        rows = kept.indices, kept.offsets, None
        found = ops.fold_pairs(
            folding.queries, keys, values, *rows, **folding.logits, gate=0.5, least=0.1
        )
        assert torch.equal(cache.layers[i].rows.bias, found.bias)
        read = cache.layers[i].rows.dense()[1]
        assert (read - found.values).abs().max() < 0.02 * found.values.abs().max()
        assert found.bias.max() > 0


@pytest.mark.parametrize("pairs", QUANTISED)
def test_answers_are_nearer_those_of_the_full_cache(pairs: str) -> None:
    """In the same bytes, where queries look at many pairs: the reason for such an option."""
    model, ratios = tiny_model(), []
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 0.2
    for seed in range(6):
        ids, more = tokens(1, 200, seed), tokens(1, 8, seed + 50)
        with torch.no_grad():
            want = model(more, past_key_values=prefill(model, ids)).logits
            away = []
            for fold in (True, False):
                cache, _ = compressed(model, ids, pairs=pairs, fold=fold)
                away.append(float((model(more, past_key_values=cache).logits - want).norm()))
        ratios.append(away[0] / away[1])
    assert sum(ratios) / len(ratios) < 0.8


def test_a_padded_row_is_folded_as_it_is_alone() -> None:
    model, ids = tiny_model(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    options = {"pairs": "k8v8", "budget": "uniform"}
    both, _ = compressed(model, ids, mask, **options)
    alone, _ = compressed(model, ids[1:, 20:], **options)
    for a, b in zip(both.layers, alone.layers, strict=True):
        a = copy.deepcopy(a)
        a.batch_select_indices(torch.tensor([1]))
        assert len(a.rows) == len(b.rows)
        for one, other in zip(a.rows.dense(), b.rows.dense(), strict=True):
            assert (one - other).abs().mean() < 1e-2
        torch.testing.assert_close(a.rows.bias, b.rows.bias, atol=1e-2, rtol=1e-2)


def test_where_all_fits_nothing_joins_and_nothing_is_paid_for_it() -> None:
    cache, press = compressed(tiny_model(), tokens(1, LENGTH), compression_ratio=0.3, pairs="k8v4")
    one = ops.pair_layout("k8v4", DIM, DIM).num_bytes
    assert all(layer.rows.bias is None for layer in cache.layers)
    stats = press.get_stats()
    assert stats["compression"]["folded"] == stats["compression"]["evicted"] == 0
    assert stats["compression"]["ratio"] == 1 - one / (2 * DIM * 4)


@pytest.mark.parametrize("pairs", QUANTISED)
def test_a_saved_cache_goes_on_the_same(pairs: str, tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens(2, LENGTH)
    cache, _ = compressed(model, ids, pairs=pairs)
    for _ in range(2):  # without a tail, then with one
        moekv.save_cache(cache, tmp_path / "x", model)
        loaded = moekv.load_cache(tmp_path / "x", model)
        with torch.no_grad():
            given = [model(tokens(2, 1), past_key_values=x).logits for x in (cache, loaded)]
        assert torch.equal(*given)
    assert all(
        torch.equal(a.rows.bias, b.rows.bias)
        for a, b in zip(cache.layers, loaded.layers, strict=True)
    )


def test_beams_and_generate() -> None:
    model, ids = tiny_model(), tokens(1, LENGTH)
    for options in ({"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        cache, press = DynamicCache(), MoERouterPress(0.8, router=None, pairs="k8v4", fold=True)
        options |= {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        with press(model):
            out = model.generate(ids, past_key_values=cache, **options)
        assert out.shape[1] == LENGTH + 5
        assert all(layer.rows.bias is not None for layer in cache.layers)


def test_gradients_of_later_tokens_see_biases() -> None:
    model = tiny_model()
    cache, _ = compressed(model, tokens(1, LENGTH), pairs="k8v8")
    layer = cache.layers[0]
    assert isinstance(layer, RaggedLayer) and layer.rows.bias.max() > 0
    torch.manual_seed(0)
    query = torch.randn(1, 2 * HEADS, 3, DIM)
    pairs, _ = layer.update(*torch.randn(2, 1, HEADS, 3, DIM))
    plain = attention.attend(nn.Identity(), query, pairs, None)
    query.requires_grad_()
    slow = attention.attend(nn.Identity(), query, pairs, None)
    torch.testing.assert_close(slow, plain, atol=1e-5, rtol=1e-5)
    slow.sum().backward()
    assert query.grad is not None and query.grad.abs().sum() > 0


def test_dense_tensors_have_no_biases_and_say_so() -> None:
    cache, _ = compressed(tiny_model(), tokens(1, LENGTH), pairs="k8v8")
    with pytest.warns(UserWarning, match="evicted pairs have joined some"):
        cache.layers[0].to_dense()


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_later_press_keeps_the_biases_of_what_it_keeps() -> None:
    model = tiny_model()
    cache, _ = compressed(model, tokens(1, LENGTH), compression_ratio=0.85, pairs="k8v4")
    before = [sorted(layer.rows.bias.tolist()) for layer in cache.layers]
    later = MoERouterPress(router=None, pairs="k8v4", decoding=DecodingConfig(20, 4))
    with later(model):
        for step in range(9):
            decode(model, cache, LENGTH + step)
    one = ops.pair_layout("k8v4", DIM, DIM).num_bytes + 2
    for layer, old in zip(cache.layers, before, strict=True):
        assert layer.stored_bytes_per_pair == one
        assert set(layer.rows.bias.tolist()) <= {*old, 0.0}
    stats = later.get_stats()
    assert stats["cache"]["bytes_held"] <= stats["cache"]["bytes_allowed"]


def test_what_cannot_be_stored_spoils_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """An evicted value beyond float16 joins nobody."""
    model, ids = tiny_model(), tokens(1, LENGTH)
    cache = prefill(model, ids)
    for layer in cache.layers:
        layer.values[0, 1, 20, 3] = 1e5
    kept = torch.ones(1, HEADS, LENGTH, dtype=torch.bool)
    kept[..., 5:50] = False
    folding = moekv.cache.folding.Folding(torch.randn(1, 4, 9, DIM), None, {"scaling": 0.25})
    made = RaggedLayer.compress(
        *(cache.layers[0].keys, cache.layers[0].values),
        moekv.budget.Kept.from_mask(kept),
        pairs="k8v4",
        folding=folding,
    )
    assert made.rows.pairs == "k8v4" and not caplog.records
    assert int(made.num_joined) == 2 * 45 - 1


# --- "auto" -------------------------------------------------------------------------------------


def why_not(model: PreTrainedModel, cache: Any = None, **options: Any) -> str | None:
    """Compress a prompt; say why pairs joined no others, and see that none have."""
    options = {"compression_ratio": 0.9, "router": None, "pairs": "auto"} | options
    press = MoERouterPress(**options)
    with press(model):
        if cache is None:
            cache = prefill(model, tokens(1, LENGTH))
        else:
            model(tokens(1, LENGTH), past_key_values=cache)
    stats = press.get_stats()
    reason = stats["fold"]["why_not"]
    biased = any(isinstance(x, RaggedLayer) and x.rows.bias is not None for x in cache.layers)
    folded = stats["compression"]["folded"] > 0
    assert stats["fold"]["used"] == biased == folded == (reason is None)
    return reason


@pytest.mark.parametrize("pairs", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_goes_by_the_share_of_pairs_that_leave(dtype: torch.dtype, pairs: str) -> None:
    """Whatever the format and the dtype are: in float32 the same bytes hold more pairs."""
    model, number = tiny_model().to(dtype), 2 * DIM * dtype.itemsize
    stored = ops.pair_layout(pairs, DIM, DIM).num_bytes + 2
    for evicted, folds in ((FOLD_FROM - 0.02, False), (FOLD_FROM + 0.02, True)):
        ratio = 1 - (1 - evicted) * stored / number
        reason = why_not(model, compression_ratio=ratio, pairs=pairs)
        assert folds == (reason is None), (ratio, reason)
        if reason is not None:
            assert reason == f"{evicted:.0%} of the pairs leave, less than {FOLD_FROM:.0%}"


def test_auto_is_the_default_and_costs_no_pair_where_it_is_off() -> None:
    assert MoERouterPress().fold == "auto"
    default, _ = compressed(tiny_model(), tokens(1, LENGTH), pairs="k8v4", fold="auto")
    folded, _ = compressed(tiny_model(), tokens(1, LENGTH), pairs="k8v4", fold=True)
    for a, b in zip(default.layers, folded.layers, strict=True):
        assert torch.equal(a.rows.bias, b.rows.bias)
    few = {"pairs": "k8v4", "compression_ratio": 0.8}
    default, _ = compressed(tiny_model(), tokens(1, LENGTH), fold="auto", **few)
    plain, _ = compressed(tiny_model(), tokens(1, LENGTH), fold=False, **few)
    assert [len(x.rows) for x in default.layers] == [len(x.rows) for x in plain.layers]


SAID = {
    "16 bits": ({"pairs": "16"}, "pairs are stored in 16 bits"),
    "nothing leaves": ({"pairs": "k8v8", "compression_ratio": 0.0}, "nothing is evicted"),
    "all fit": (
        {"pairs": "k8v8", "compression_ratio": 0.5, "fold": True},
        "all pairs are retained",
    ),
    "off": ({"pairs": "k8v4", "fold": False}, "fold is False"),
    "a stream": ({"streaming": True}, "pairs leave more than once"),
    "decoding": ({"decoding": DecodingConfig(8, 4)}, "pairs leave more than once"),
    "no queries": ({"experts": ["selective"]}, "no expert asks the text's queries again"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_does_not_fold_says_why(case: str) -> None:
    options, reason = SAID[case]
    assert (why_not(tiny_model(), **options) or "").startswith(reason)


@pytest.mark.parametrize("fold", ["auto", True])
def test_attention_and_caches_that_read_no_biases(fold: bool | str) -> None:
    """They leave pairs in 16 bits, with "auto", and say that nothing has joined."""
    reason = "pairs are stored in 16 bits, without biases"
    assert why_not(tiny_model(attention="eager"), fold=fold) == reason
    model = tiny_model()
    static = StaticCache(config=model.config, max_cache_len=LENGTH + 8)
    assert why_not(model, cache=static, fold=fold) == reason


def test_chunks_do_not_fold() -> None:
    press = MoERouterPress(0.9, router=None, pairs="k8v4")
    moekv.prefill_in_chunks(press, tiny_model(), tokens(1, LENGTH), chunk_size=20)
    found = press.get_stats()["fold"]
    assert found == {"asked": "auto", "used": False, "why_not": "pairs leave more than once"}


def test_no_kernel_no_folding() -> None:
    """Where PyTorch would have to do it, "auto" does not."""
    options = MoERouterPress(0.9, pairs="k8v4")._options()
    given = {"sizes": (DIM, DIM, torch.float32), "expects": True}
    assert options.unfolded(**given, device=torch.device("cpu")) is None
    reason = options.unfolded(**given, device=torch.device("cuda"))
    assert reason == "fold_pairs has no kernel for cuda"


def test_the_summary_says_how_much_has_joined(capsys: pytest.CaptureFixture[str]) -> None:
    for options, text in (
        ({"fold": "auto"}, "of which joined others"),
        ({"fold": False}, "which joined no others (fold is False)"),
    ):
        _, press = compressed(tiny_model(), tokens(1, LENGTH), pairs="k8v4", **options)
        press.summary()
        assert text in " ".join(capsys.readouterr().out.split())


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", ["yes", 1, None])
def test_fold_is_a_flag(fold: object) -> None:
    with pytest.raises(TypeError, match="expected fold True or False, got"):
        MoERouterPress(pairs="k8v4", fold=fold)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": "16"}, "expected quantised pairs .* with fold, got '16'"),
        ({"streaming": True}, "expected fold or streaming, got both"),
        ({"decoding": DecodingConfig()}, "expected fold or decoding, got both"),
    ],
)
def test_fold_excludes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoERouterPress(**{"pairs": "k8v4", "fold": True, **options})


def test_fold_and_chunks() -> None:
    press = MoERouterPress(pairs="k8v4", fold=True, router=None)
    with pytest.raises(ValueError, match="expected fold or context_length, got both"):
        moekv.prefill_in_chunks(press, tiny_model(), tokens(1, LENGTH), chunk_size=20)
