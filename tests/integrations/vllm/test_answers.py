"""What vLLM's engine answers with moekv on, and which blocks it frees."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_engine import (
    Chosen,
    answers,
    blocks_in_use,
    engine,
    near_reference,
    params,
    tokens,
    watch_choices,
    write_model,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def running(folder: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """An engine with a budget, a dtype, and so many tokens in a step at most."""
    budget, dtype, step = request.param
    options = {"compression_ratio": 0.75, "budget": budget}
    with engine(folder, options, dtype=dtype, max_num_batched_tokens=step) as compressed:
        yield compressed


@pytest.fixture
def compressed(running: Any) -> Iterator[Any]:
    """The engine, which nothing is left in."""
    assert running.reset_prefix_cache()
    yield running
    assert blocks_in_use(running) == 0


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    return watch_choices(monkeypatch)


def engines(*given: tuple[str, str, int]) -> pytest.MarkDecorator:
    """Run a test in some engines. Tests share those that they name at the same place."""
    names = ["-".join(map(str, each)) for each in given]
    return pytest.mark.parametrize("running", given, indirect=True, ids=names)


@engines(
    ("uniform", "float32", 1024),
    ("model", "float32", 1024),
    ("uniform", "float32", 70),
    ("model", "float32", 70),
)
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_answers_are_those_of_transformers_with_the_same_pairs(
    folder: Path, chosen: Chosen, compressed: Any, ratio: float, request: pytest.FixtureRequest
) -> None:
    # Beside others, which come and go.
    prompt, *others = tokens(300), tokens(20, seed=1), tokens(97, seed=2)
    own = None if ratio == 0.75 else {"moekv": {"compression_ratio": ratio}}
    (answer, *_) = answers(compressed, [prompt, *others], 40, logprobs=5, extra_args=own)
    chosen_of_it = chosen.of(prompt)
    budget, *_ = request.node.callspec.params["running"]
    assert (len(set(chosen_of_it[0]["counts"].tolist())) > 1) == (budget == "model")
    near_reference(folder, prompt, answer, chosen_of_it)


@engines(("uniform", "float32", 1024), ("model", "float32", 1024))
def test_a_preempted_request_goes_on_as_though_it_had_not_been(
    folder: Path, chosen: Chosen, compressed: Any
) -> None:
    """Its answer is computed anew behind the pairs that its prompt keeps, not beside all of it."""
    prompt = tokens(300)
    compressed.add_request("0", {"prompt_token_ids": prompt}, params(60, logprobs=5))
    for _ in range(45):
        compressed.step()
    (request,) = compressed.engine_core.engine_core.scheduler.running
    before = blocks_in_use(compressed)
    assert compressed.reset_prefix_cache(reset_running_requests=True)
    assert (request.num_preemptions, request.num_computed_tokens) == (1, 0)
    compressed.step()
    assert (request.num_computed_tokens, request.num_output_tokens) == (300, 45)
    compressed.step()
    assert blocks_in_use(compressed) == before
    while not (done := [x for x in compressed.step() if x.finished]):
        pass
    first, later = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    for one, other in zip(first, later, strict=True):
        assert torch.equal(one["indices"], other["indices"])
    near_reference(folder, prompt, done[0].outputs[0], chosen.of(prompt))


@engines(("uniform", "float32", 1024), ("model", "float32", 1024))
def test_heads_keep_different_numbers_of_blocks(chosen: Chosen, compressed: Any) -> None:
    answers(compressed, [tokens(600)], 2)
    # 150 pairs stay, 24 of which are in the block that is not full.
    assert {each["gap"] for each in chosen} == {(14, 18)}
    counts = torch.cat([each["counts"] for each in chosen]).tolist()
    assert sum(counts) == 4 * 6 and min(counts) >= 1
    assert (len(set(counts)) > 1) == (len(chosen) == 1)  # in one go, over the model


@engines(
    ("uniform", "float32", 1024),
    ("model", "float32", 1024),
    ("uniform", "bfloat16", 1024),
    ("model", "bfloat16", 1024),
)
def test_blocks_are_freed_at_the_first_step_behind_the_prompt(compressed: Any) -> None:
    compressed.add_request("a", {"prompt_token_ids": tokens(600)}, params(50))
    compressed.step()
    assert blocks_in_use(compressed) == 19
    compressed.step()
    assert blocks_in_use(compressed) == 4 + 1
    for _ in range(8):  # the block behind is full then
        compressed.step()
    assert blocks_in_use(compressed) == 4 + 2
    while compressed.has_unfinished_requests():
        compressed.step()
