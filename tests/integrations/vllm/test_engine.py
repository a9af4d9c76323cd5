"""vLLM's engine with moekv on: what it answers, and which blocks it frees."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
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

from moekv import MoERouterPress
from moekv.experts import expected

PROMPTS = [tokens(300), tokens(20, seed=1), tokens(97, seed=2), tokens(65, seed=3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    return watch_choices(monkeypatch)


def test_nothing_to_remove_is_plain_vllm(folder: Path) -> None:
    with engine(folder) as plain:
        expected = [each.token_ids for each in answers(plain, PROMPTS)]
    for budget in ("model", "uniform"):
        with engine(folder, {"compression_ratio": 0.0, "budget": budget}) as compressed:
            assert [each.token_ids for each in answers(compressed, PROMPTS)] == expected


@pytest.mark.parametrize("chunk", [1024, 70])
@pytest.mark.parametrize("budget", ["uniform", "model"])
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_answers_are_those_of_transformers_with_the_same_pairs(
    folder: Path, chosen: Chosen, budget: str, ratio: float, chunk: int
) -> None:
    prompt = tokens(300)
    with engine(
        folder, {"compression_ratio": ratio, "budget": budget}, max_num_batched_tokens=chunk
    ) as compressed:
        # Beside others, which come and go.
        (answer, *_) = answers(compressed, [prompt, *PROMPTS[1:3]], 40, logprobs=5)
    own = chosen.of(prompt)
    assert (len(set(own[0]["counts"].tolist())) > 1) == (budget == "model")
    near_reference(folder, prompt, answer, own)


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3"])
def test_other_models(tmp_path: Path, chosen: Chosen, name: str) -> None:
    folder, prompt = write_model(tmp_path, name), tokens(200)
    with engine(folder, {"compression_ratio": 0.6}) as compressed:
        (answer,) = answers(compressed, [prompt], 8, logprobs=5)
    near_reference(folder, prompt, answer, chosen)
    torch.testing.assert_close(
        chosen[0]["scores"], scores_of_the_press(folder, prompt)[:, :192], atol=1e-3, rtol=1e-3
    )


def scores_of_the_press(folder: Path, prompt: list[int]) -> Tensor:
    """What the press's expert says of the pairs, for the heads of all layers: [L * H, T]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    said = []
    weigh = expected.weigh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expected, "weigh", lambda *given: said.append(weigh(*given)) or said[-1])
        with torch.no_grad(), MoERouterPress(experts=["expected"], router=None)(model):
            model(torch.tensor([prompt]))
    return torch.cat([scores[0] for scores in said])


def test_heads_keep_different_numbers_of_blocks(folder: Path, chosen: Chosen) -> None:
    with engine(folder, {"compression_ratio": 0.75}) as compressed:
        answers(compressed, [tokens(600)], 2)
    (one,) = chosen
    assert one["gap"] == (14, 18)  # 150 pairs stay, 24 of which are in the block that is not full
    assert one["counts"].sum() == 4 * 6 and one["counts"].min() >= 1
    assert len(set(one["counts"].tolist())) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", ["uniform", "model"])
def test_blocks_are_freed_at_the_first_step_behind_the_prompt(
    folder: Path, budget: str, dtype: str
) -> None:
    with engine(folder, {"compression_ratio": 0.75, "budget": budget}, dtype=dtype) as compressed:
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
        assert blocks_in_use(compressed) == 0


def test_smaller_requests_run_together(folder: Path) -> None:
    """40 blocks hold two prompts of 19 blocks, or four of 4 and 1, and one that is computed."""
    prompts = [tokens(600, seed=i) for i in range(6)]
    most = {}
    for ratio in (0.0, 0.75):
        with engine(folder, {"compression_ratio": ratio}, num_gpu_blocks_override=41) as compressed:
            scheduler = compressed.engine_core.engine_core.scheduler
            for i, prompt in enumerate(prompts):
                compressed.add_request(str(i), {"prompt_token_ids": prompt}, params(40))
            running = []
            while compressed.has_unfinished_requests():
                compressed.step()
                running.append(len(scheduler.running))
            most[ratio] = max(running)
    assert most == {0.0: 2, 0.75: 5}
