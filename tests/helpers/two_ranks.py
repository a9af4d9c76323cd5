"""A tiny model spread over two processes, and what presses do to it there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing
from transformers import AutoModelForCausalLM

from moekv import MoERouterPress
from moekv.models.ranks import Ranks

SIZE = 2


def generated(model: Any, case: Mapping[str, Any]) -> dict[str, Any]:
    """Press and generate: what this process's heads hold then, the tokens, the statistics.

    ``case``: ``options`` of the press, arguments of ``generate``, and ``prompts``.
    """
    options, prompts, given = case["options"], case["prompts"], case.get("given", {})
    press = MoERouterPress(**options)
    for input_ids, mask in prompts:
        with press(model):
            out = model.generate(
                input_ids,
                attention_mask=mask,
                do_sample=False,
                return_dict_in_generate=True,
                **{"max_new_tokens": 20} | given,
            )
    cache = out.past_key_values
    return {
        "held": [_heads(layer) for layer in cache.layers],
        "tokens": out.sequences,
        "stats": press.get_stats(),
    }


def _heads(layer: Any) -> list[list[tuple[Tensor, Tensor]]]:
    """Keys and values of each head of each row."""
    if hasattr(layer, "head_lengths"):
        lengths = layer.head_lengths([0] * layer.batch_size)
        keys, values = layer.held_pairs()
    else:
        keys, values = layer.keys, layer.values
        filled = int(layer.get_seq_length())
        lengths = [[min(filled, keys.shape[2])] * keys.shape[1]] * len(keys)
    return [
        [
            tuple(x[b, h, x.shape[2] - n :].clone() for x in (keys, values))
            for h, n in enumerate(row)
        ]
        for b, row in enumerate(lengths)
    ]


def _work(rank: int, folder: str, cases: Mapping[str, Mapping[str, Any]]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE)}
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/processes",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=60),
    )
    sent: list[int] = []
    gather = Ranks.gather

    def counted(self: Ranks, part: Tensor, dim: int) -> Tensor:
        sent.append(part.nbytes)
        return gather(self, part, dim)

    Ranks.gather = counted  # type: ignore[method-assign]
    found: dict[str, dict[str, Any]] = {}
    for family, each in cases.items():
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{family}", tp_plan="auto")
        attention, config = model.model.layers[0].self_attn, model.config
        heads = attention.k_proj(torch.ones(1, 64)).shape[-1] // config.head_dim
        assert heads * SIZE == config.num_key_value_heads
        found[family] = {}
        for name, case in each.items():
            sent.clear()
            with torch.no_grad():
                found[family][name] = generated(model, case) | {"sent": list(sent)}
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def in_two_ranks(
    models: Mapping[str, Any], folder: Path, cases: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Spread models over two processes, and return what each finds in each case of a model."""
    for family, model in models.items():
        model.save_pretrained(folder / family)
    multiprocessing.spawn(_work, (str(folder), cases), nprocs=SIZE)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]
    return {family: [rank[family] for rank in ranks] for family in models}


def joined(parts: list[dict[str, Any]]) -> list[list[list[tuple[Tensor, Tensor]]]]:
    """What the heads of all processes hold: by layer, row and head."""
    return [
        [sum(row, []) for row in zip(*layer, strict=True)]
        for layer in zip(*(part["held"] for part in parts), strict=True)
    ]
