"""What the pairs of a prompt are worth: moekv's expert ``expected``, as the prompt comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from moekv import ops
from moekv.experts.expected import weigh
from moekv.models.queries import rotate
from moekv.ops.reference.expected_attention import REACH


class Rotation:
    """Turns queries on to other positions.

    Parameters
    ----------
    config : PretrainedConfig
        Of the text model.
    """

    def __init__(self, config: Any) -> None:
        self._step = LlamaRotaryEmbedding(config).inv_freq.float()

    def turn(self, queries: Tensor, by: Tensor) -> Tensor:
        """Turn queries [N, Hq, D] by numbers of positions [N]: [Hq, N, D]."""
        angle = (by[:, None].float() * self._step).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
        return rotate(queries.transpose(0, 1)[None], cos[None], sin[None])[0]


@dataclass
class Rated:
    """A prompt that is being computed, in one step or several.

    Attributes
    ----------
    length : int
        Tokens of the prompt.
    scores : dict of Tensor [H, T], float32
        By layer, of the pairs that have come.
    last : dict of Tensor [Hq, n, D]
        By layer, the last queries, which look at pairs that are still to come.
    """

    length: int
    scores: dict[int, Tensor] = field(default_factory=dict)
    last: dict[int, Tensor] = field(default_factory=dict)

    def take(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        rotation: Rotation,
        *,
        scaling: float,
        softcap: float,
    ) -> None:
        """Rate the pairs of some more tokens.

        Every query stands behind the prompt's last token, whatever the number of steps; what it
        looks at are the keys that have come so far.

        Parameters
        ----------
        layer : int
        queries : Tensor [N, Hq, D]
            Of the tokens, rotated to their positions.
        keys, values : Tensor [H, T, D]
            Of all tokens that have come, the last N of which are these.
        rotation : Rotation
        scaling, softcap : float
            Of the layer's logits.
        """
        count, num_keys = queries.shape[0], keys.shape[1]
        begin = num_keys - count
        asked = rotation.turn(queries, self.length - torch.arange(begin, num_keys))
        if begin:
            before = self.last[layer]
            nobody = asked.new_zeros(asked.shape[0], begin - before.shape[1], asked.shape[2])
            asked = torch.cat([nobody, before, asked], 1)
        expected = ops.expected_attention(
            asked[None].contiguous(), keys[None].contiguous(), scaling=scaling, softcap=softcap
        )
        scores = weigh(expected, values[None])[0, :, begin:]
        self.last[layer] = asked[:, -REACH:].clone()
        if begin:
            scores = torch.cat([self.scores[layer], scores], 1)
        self.scores[layer] = scores

    def all_scores(self) -> Tensor:
        """Give the scores of the heads of all layers, in order: [L * H, T]."""
        return torch.cat([self.scores[layer] for layer in sorted(self.scores)])
