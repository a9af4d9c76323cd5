"""Tensor parallelism: each process has some of the heads, and shares blocks out among these."""

from pathlib import Path

import pytest
import torch
from vllm_engine import (
    HEADS,
    LAYERS,
    Chosen,
    answers,
    engine,
    near_reference,
    tokens,
    watch_choices,
    write_model,
)

from moekv.integrations.vllm.compaction import choose
from moekv.integrations.vllm.options import ServingOptions

PROMPTS = [tokens(300), tokens(20, seed=1), tokens(97, seed=2)]


@pytest.mark.parametrize("budget", ["model", pytest.param("uniform", marks=pytest.mark.thorough)])
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str) -> None:
    """Each keeps what it would choose of its own head's scores."""
    folder = write_model(tmp_path)
    options = {"compression_ratio": 0.5, "budget": budget}
    chosen = watch_choices(monkeypatch)
    with engine(folder, options) as alone:
        answers(alone, PROMPTS[:1], 1)
    scores = torch.cat([each["scores"] for each in chosen]).view(LAYERS, HEADS, -1)
    gap, rest = chosen[0]["gap"], len(PROMPTS[0]) - chosen[0]["gap"].full * 32
    own = [choose(scores[:, head], gap, 32, rest, ServingOptions(**options)) for head in range(2)]
    counts = torch.stack([counts for _, counts in own], 1).flatten()
    # Seen together, the heads would be given other numbers of blocks.
    whole = torch.cat([each["counts"] for each in chosen])
    assert torch.equal(counts, whole) == (budget == "uniform")
    assert all(each.sum() == LAYERS * gap.kept for _, each in own)
    parts = [indices.split((each * 32).tolist()) for indices, each in own]
    indices = torch.cat([part[layer] for layer in range(LAYERS) for part in parts])
    both = Chosen([{"scores": scores, "gap": gap, "indices": indices, "counts": counts}])
    with engine(
        folder, options, tensor_parallel_size=2, distributed_executor_backend="mp"
    ) as parallel:
        answer, *_ = answers(parallel, PROMPTS, 24, logprobs=5)
    near_reference(folder, PROMPTS[0], answer, both)
