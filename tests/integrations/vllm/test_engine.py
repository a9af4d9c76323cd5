"""vLLM's engine with moekv on, in engines that differ."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm_engine import (
    Chosen,
    answers,
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
    """What the press's expert says of the pairs, for the heads of all layers: [L * H, T].

    Before layers whose queries look everywhere are bounded, which needs the whole prompt.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    said = []
    weigh = expected.weigh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expected, "weigh", lambda *given: said.append(weigh(*given)) or said[-1])
        with torch.no_grad(), MoERouterPress(experts=["expected"], router=None)(model):
            model(torch.tensor([prompt]))
    return torch.cat([scores[0] for scores in said])


def test_smaller_requests_run_together(folder: Path) -> None:
    """40 blocks hold two prompts of 19 blocks, or four of 4 and 1, and one that is computed."""
    prompts = [tokens(600, seed=i) for i in range(6)]
    most = {}
    with engine(folder, {}, num_gpu_blocks_override=41) as compressed:
        scheduler = compressed.engine_core.engine_core.scheduler
        for ratio in (0.0, 0.75):
            own = {"moekv": {"compression_ratio": ratio}}
            for i, prompt in enumerate(prompts):
                asked = params(40, extra_args=own)
                compressed.add_request(str(i), {"prompt_token_ids": prompt}, asked)
            running = []
            while compressed.has_unfinished_requests():
                compressed.step()
                running.append(len(scheduler.running))
            most[ratio] = max(running)
    assert most == {0.0: 2, 0.75: 5}
