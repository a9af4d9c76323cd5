"""What pairs are worth while a prompt comes, against formulas written out."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from moekv.integrations.vllm.rating import Rotation, Scores, rate
from moekv.integrations.vllm.refusals import ROPE_TYPES
from moekv.ops.reference.expected_attention import REACH

_LONG = {"rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 256}
_ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 10000.0},
    "linear": {"rope_theta": 10000.0, "factor": 4.0},
    "yarn": _LONG,
    "llama3": _LONG | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def config(kind: str = "default") -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": kind, **_ROPE[kind]},
    )


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_queries_are_turned_behind_the_prompt(kind: str) -> None:
    """As though they had been rotated to that position in the first place."""
    rotary = LlamaRotaryEmbedding(config(kind))
    plain = torch.randn(1, 4, 50, 32, generator=torch.Generator().manual_seed(0))
    there = torch.arange(100, 150)

    def rotated(positions: torch.Tensor) -> torch.Tensor:
        cos, sin = rotary(plain, positions[None])
        return apply_rotary_pos_emb(plain, plain, cos, sin)[0][0]

    turned = Rotation(config(kind)).turn(rotated(there).transpose(0, 1), 700 - there)
    expected = rotated(torch.full((50,), 700))
    torch.testing.assert_close(turned, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [(60,), (20, 40), (7, 3, 50), (1, 1, 2, 56)])
def test_prompts_are_rated_as_they_come(steps: tuple[int, ...]) -> None:
    """Each pair by its own query and the four before it, over the keys that have come."""
    generator = torch.Generator().manual_seed(1)
    length, scaling = 60, 0.3
    queries = torch.randn(length, 4, 32, generator=generator)
    keys, values = torch.randn(2, 2, length, 32, generator=generator)
    rotation, scores = Rotation(config()), Scores(8, 20)
    pages, before = torch.tensor([[3, 0, 2], [5, 7, 1]]), 0
    begin = 0
    expected = torch.empty(2, length)
    behind = rotation.turn(queries, length - torch.arange(length))
    for count in steps:
        end = begin + count
        new = rate(
            queries[before:end],
            count,
            keys[:, :end],
            values[:, :end],
            length - end,
            rotation,
            scaling=scaling,
            softcap=0.0,
        )
        scores.write(pages, begin, new)
        before = max(end - REACH, 0)
        grouped = behind[:, :end].view(2, 2, end, 32).double()
        looks = (scaling * grouped @ keys[:, None, :end].double().mT).softmax(-1).square().mean(1)
        for t in range(begin, end):
            attention = looks[:, max(t - 4, 0) : t + 1, t].sum(-1).log() / 2
            expected[:, t] = attention + values[:, t].double().norm(dim=-1).log() / 2
        begin = end
    torch.testing.assert_close(scores.read(pages), expected, atol=1e-4, rtol=1e-4)
