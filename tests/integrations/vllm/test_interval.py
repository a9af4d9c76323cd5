"""Requests that are compressed after every so many tokens of a prompt, and of an answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from masked_reference import show
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from vllm_engine import (
    BLOCK,
    HEADS,
    LAYERS,
    Chosen,
    answers,
    blocks_in_use,
    engine,
    params,
    tokens,
    watch_choices,
    write_model,
)

from moekv.integrations.vllm.options import ServingOptions

INTERVAL = 64
OPTIONS = {"compression_ratio": 0.75, "interval": INTERVAL}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


def log_probs_of_transformers(
    folder: Path, prompt: list[int], answer: list[int], chosen: Chosen
) -> Tensor:
    """The text is fed in the same parts; each head sees what it has been left with."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="masked_reference"
    )
    options, text = ServingOptions(**OPTIONS), [*prompt, *answer[:-1]]
    held = [torch.arange(0)] * (LAYERS * HEADS)  # positions in whole blocks that were compressed
    full, begin, logits, cache = 0, 0, [], DynamicCache(config=model.config)
    choices = iter(chosen)
    while begin < len(text):
        point = options.next_point(len(prompt), begin)
        end = min(point, len(text))
        seen = torch.zeros(LAYERS * HEADS, end, dtype=torch.bool)
        seen[:, full * BLOCK :] = True
        for row, own in enumerate(held):
            seen[row, own] = True
        for layer, own in enumerate(seen.view(LAYERS, HEADS, end)):
            show(layer, own[None])
        with torch.no_grad():
            logits.append(model(torch.tensor([text[begin:end]]), past_key_values=cache).logits[0])
        begin = end
        gap = options.gap(len(prompt), BLOCK, None, end)
        if end < point or gap is None:
            continue
        made: list[dict[str, Any]] = []
        while sum(len(each["counts"]) for each in made) < LAYERS * HEADS:
            made.append(next(choices))
        assert all(each["gap"] == gap for each in made)
        counts = torch.cat([each["counts"] for each in made])
        assert counts.sum() == LAYERS * HEADS * gap.kept
        parts = torch.cat([each["indices"] for each in made]).split((counts * BLOCK).tolist())
        starts = [
            torch.zeros(len(each["counts"])).long() if each["start"] is None else each["start"]
            for each in made
        ]
        new = torch.arange(full * BLOCK, gap.full * BLOCK)
        for row, (indices, start) in enumerate(zip(parts, torch.cat(starts), strict=True)):
            held[row] = torch.cat([held[row], new])[indices - start]
        full = gap.full
    assert next(choices, None) is None
    return torch.cat(logits)[len(prompt) - 1 :].log_softmax(-1)


@pytest.mark.parametrize("budget", ["model", "uniform"])
@pytest.mark.parametrize("step", [1024, 50])
def test_answers_are_those_of_transformers_with_the_same_pairs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, budget: str, step: int
) -> None:
    """Also of a request that is preempted in the middle of an interval of its answer."""
    prompt, chosen = tokens(300), watch_choices(monkeypatch)
    options = {**OPTIONS, "budget": budget}
    with engine(
        folder, options, max_num_batched_tokens=step, enable_prefix_caching=False
    ) as compressed:
        (answer,) = answers(compressed, [prompt], 160, logprobs=5)
        first = Chosen(chosen)
        chosen.clear()
        compressed.add_request("0", {"prompt_token_ids": prompt}, params(160))
        scheduler, most = compressed.engine_core.engine_core.scheduler, 0
        while not scheduler.running or scheduler.running[0].num_output_tokens < 100:
            compressed.step()
            most = max(most, blocks_in_use(compressed))
        assert compressed.reset_prefix_cache(reset_running_requests=True)
        chosen.clear()
        while not (done := [x for x in compressed.step() if x.finished]):
            most = max(most, blocks_in_use(compressed))
        assert blocks_in_use(compressed) == 0
    assert done[0].outputs[0].token_ids == answer.token_ids
    for one, other in zip(first, chosen, strict=True):
        assert torch.equal(one["indices"], other["indices"])
    # Of 460 tokens, 115 stay at last, in 4 blocks, and an interval and a block in part before them.
    assert most <= 4 + INTERVAL // BLOCK + 1
    expected = log_probs_of_transformers(folder, prompt, list(answer.token_ids), first)
    for i, top in enumerate(answer.logprobs):
        for token, said in top.items():
            assert abs(expected[i, token].item() - said.logprob) < 1e-3, (i, token)


def test_requests_are_admitted_by_what_they_hold(folder: Path) -> None:
    """Prompts of 19 blocks that hold 7 at once, in a pool of 40."""
    prompts, most = [tokens(600, seed=i) for i in range(6)], {}
    for interval in (None, 64):
        options = {"compression_ratio": 0.75, "interval": interval}
        with engine(
            folder,
            options,
            num_gpu_blocks_override=41,
            max_num_batched_tokens=384,
            enable_prefix_caching=False,
        ) as compressed:
            scheduler, running = compressed.engine_core.engine_core.scheduler, []
            for i, prompt in enumerate(prompts):
                compressed.add_request(str(i), {"prompt_token_ids": prompt}, params(30))
            while compressed.has_unfinished_requests():
                compressed.step()
                running.append(len(scheduler.running))
            assert blocks_in_use(compressed) == 0
            assert not any(r.num_preemptions for r in scheduler.waiting)
        most[interval] = max(running)
    assert most[64] > most[None], most


@settings(max_examples=30)
@given(
    prompt=strategies.integers(1, 900),
    interval=strategies.sampled_from([None, 32, 50, 256]),
    ratio=strategies.floats(0, 0.99),
)
def test_gaps_only_grow(prompt: int, interval: int | None, ratio: float) -> None:
    options = ServingOptions(compression_ratio=ratio, interval=interval)
    start, point = 0, 0
    for computed in range(prompt + 300):
        if options.last_point(prompt, computed) == computed > 0:
            assert options.next_point(prompt, point) == computed
            point = computed
        assert options.last_point(prompt, computed) == point
        gap = options.gap(prompt, BLOCK, None, computed)
        if gap is None:
            assert start == 0
            continue
        assert start <= gap.start < gap.full == point // BLOCK
        start = gap.start
    assert (point > prompt) == (interval is not None and interval < 300)
