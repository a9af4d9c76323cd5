"""What an engine answers, against transformers with the same pairs at their true positions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "moekv_kept_pairs"
_kept: list[Tensor] = []  # of each layer, the pairs [H, P] of the prompt that are seen behind it


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attend to the whole text in a prompt, and behind it to the pairs that stayed of it."""
    count, length = query.shape[2], key.shape[2]
    seen = torch.ones(count, length).tril(length - count).bool()
    if length > count:  # behind the prompt
        kept = _kept[module.layer_idx]
        behind = torch.ones(len(kept), length - kept.shape[1]).bool()
        groups = query.shape[1] // key.shape[1]
        kept = torch.cat([kept, behind], 1).repeat_interleave(groups, 0)
        seen = seen & kept[:, None]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query.float() @ key.float().mT) * options["scaling"]
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return (weights @ value.float()).to(query.dtype).transpose(1, 2), None


def measure(run: Any, folder: Path, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """Let an engine answer prompts one by one, and read its answers in transformers.

    Returns
    -------
    dict
        Over all tokens: the mean and the largest difference of the log-probabilities of the five
        likeliest tokens, and how often the likeliest one is the same.
    """
    from moekv.integrations.vllm import worker

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=NAME
    ).eval()
    config = model.config
    rows = config.num_hidden_layers * config.num_key_value_heads
    choose, chosen = worker.choose, []

    def spy(*given: Any) -> Any:
        chosen.append((given[1], *choose(*given)))
        return chosen[-1][1:]

    worker.choose = spy
    differences, same = [], []
    try:
        for prompt in prompts:
            chosen.clear()
            (answer,) = run.feed([prompt], new, logprobs=5)["answers"]
            kept = torch.ones(rows, len(prompt), dtype=torch.bool)
            if chosen:
                block = run.engine.vllm_config.cache_config.block_size
                kept[:, : chosen[0][0].full * block] = False
                counts = torch.cat([counts for _, _, counts in chosen]) * block
                own = torch.arange(rows).repeat_interleave(counts)
                kept[own, torch.cat([indices for _, indices, _ in chosen])] = True
            _kept[:] = kept.view(config.num_hidden_layers, -1, len(prompt))
            with torch.inference_mode():
                cache = DynamicCache(config=config)
                first = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
                later = model(torch.tensor([answer.token_ids[:-1]]), past_key_values=cache)
            logits = torch.cat([first.logits[0], later.logits[0]]).float()
            for said, log_probs in zip(answer.logprobs, logits.log_softmax(-1), strict=True):
                near = sorted(said, key=lambda token: said[token].rank)[:5]
                differences += [abs(said[x].logprob - float(log_probs[x])) for x in near]
                same.append(near[0] == int(log_probs.argmax()))
    finally:
        worker.choose = choose
    return {
        "tokens": len(same),
        "mean_difference": sum(differences) / len(differences),
        "largest_difference": max(differences),
        "same_likeliest": sum(same) / len(same),
    }
