"""How often the host waits for a pretended GPU does not depend on the number of layers."""

from collections import Counter
from types import ModuleType
from typing import Any

import pretended
import pytest
import torch
from tiny_models import tiny_model, tokens
from transformers import DynamicCache, LlamaForCausalLM

from moekv import DecodingConfig, MoERouterPress, ops
from moekv.devices import send
from moekv.ops import backends

DECODING = DecodingConfig(target=20, interval=2)
OPTIONS: dict[str, dict[str, Any]] = {
    "once": {},
    "experts": {"num_experts": 4, "policy": "dominant"},
    "decoding": {"decoding": DECODING},
    "decoding, dense layers": {"decoding": DECODING, "budget": "uniform"},
    "decoding, heads": {"decoding": DECODING, "budget": "head"},
    "decoding, layers": {"decoding": DECODING, "budget": "layer"},
    "decoding, history": {"decoding": DECODING, "num_experts": 4, "router_type": "pikv"},
    "decoding, chunks": {"decoding": DECODING, "chunks": 2},
}
# Of a forward that compresses what has grown, by whether rows are padded. Most of it is of the
# masks: transformers reads them, and moekv what they hide of the context.
MOST_IN_A_STEP = {True: 9, False: 6}


@pytest.fixture
def gpu(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> pretended.PretendedGpu:
    """With the CPU's kernels for its own, which take no time; they wait for nothing either."""
    monkeypatch.setattr(backends, "available_backends", lambda: dict.fromkeys(ops.BACKENDS))
    monkeypatch.setattr(backends, "_native", frozenset(("cpu", "cuda")))
    gpu = pretended.PretendedGpu(kernels)
    monkeypatch.setattr(gpu.device, "op", lambda name: getattr(torch.ops.moekv, name))
    return gpu


@torch.no_grad()
def waits(
    gpu: pretended.PretendedGpu, layers: int, options: dict[str, Any], *, padded: bool
) -> list[Counter[str]]:
    """Count what waits in a prefill, and in each of two steps, all for the second time.

    What a press learns of a model, it learns once. Models have 16 bits where pairs are quantised.
    """
    options = {"backend": "cuda"} | options
    dtype = torch.bfloat16 if "pairs" in options else torch.float32
    chunks = options.pop("chunks", 1)
    counted = []
    with gpu:
        config = tiny_model().config
        config.num_hidden_layers = layers
        model, ids = LlamaForCausalLM(config).eval().to("cuda", dtype), tokens(2, 40).to("cuda")
        mask = torch.ones_like(ids)
        mask[0, : 7 * padded] = 0
        press = MoERouterPress(0.5, **options)
        for _ in range(2):
            cache, seen = DynamicCache(), mask
            counted.clear()
            with press(model, context_length=40 if chunks > 1 else None):
                gpu.waits.clear()
                for part in ids.chunk(chunks, 1):
                    fed = seen[:, : cache.get_seq_length() + part.shape[1]]
                    model(part, attention_mask=fed, past_key_values=cache)
                counted.append(Counter(gpu.waits))
                for _ in range(2):
                    seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
                    gpu.waits.clear()
                    model(ids[:, :1], attention_mask=seen, past_key_values=cache)
                    counted.append(Counter(gpu.waits))
    return counted


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_more_layers_do_not_mean_more_waiting(
    gpu: pretended.PretendedGpu, name: str, padded: bool
) -> None:
    few, many = (waits(gpu, n, OPTIONS[name], padded=padded) for n in (2, 4))
    assert few == many
    assert "tensor" not in sum(few, Counter())  # numbers of the host are sent, see below
    assert max(map(Counter.total, few[1:])) <= MOST_IN_A_STEP[padded]


@pytest.mark.parametrize("padded", [False, True])
def test_quantised_pairs_are_waited_for_once(gpu: pretended.PretendedGpu, padded: bool) -> None:
    # To see whether they can be stored: of all layers before the first one's 16 bits are freed.
    plain, few, many = (
        waits(gpu, n, {"decoding": DECODING, "pairs": pairs}, padded=padded)
        for n, pairs in ((4, "16"), (2, "k8v4"), (4, "k8v4"))
    )
    assert few == many
    prefill, step, compressing = range(3)
    assert many[step] == plain[step]
    for compresses in (prefill, compressing):
        assert many[compresses] - plain[compresses] == Counter({"tolist": 1})


def test_what_is_sent_is_not_waited_for(gpu: pretended.PretendedGpu) -> None:
    with gpu:
        sent = send([[1, 2], [3, 4]], torch.device("cuda"), torch.int32)
        assert sent.device == pretended.GPU and not gpu.waits
        assert sent.dtype == torch.int32 and sent.tolist() == [[1, 2], [3, 4]]
        torch.ones(3).to("cuda", non_blocking=True)  # as it is not pinned
    assert gpu.waits == ["tolist", "to"]
    assert send((1, 2), "cpu").tolist() == [1, 2]
