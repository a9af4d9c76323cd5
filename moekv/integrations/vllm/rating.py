"""Scores of prompts' pairs by moekv's expert ``expected``, part by part as prompts arrive."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from moekv import ops
from moekv.experts.expected import weigh
from moekv.models.queries import rotate


class Rotation:
    """Rotates queries to other positions.

    Parameters
    ----------
    config : PretrainedConfig
        Of the text model.
    """

    def __init__(self, config: Any) -> None:
        self._step = LlamaRotaryEmbedding(config).inv_freq.float()

    def turn(self, queries: Tensor, by: Tensor) -> Tensor:
        """Rotate queries [N, Hq, D] by numbers of positions [N]: [Hq, N, D]."""
        angle = (by[:, None].float() * self._step).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
        return rotate(queries.transpose(0, 1)[None], cos[None], sin[None])[0]


@dataclass
class LastQueries:
    """The last queries of a part of a prompt, which attend to pairs of the next part.

    Attributes
    ----------
    end : int
        Tokens up to there.
    queries : dict of Tensor [n, Hq, D]
        By layer, rotated to their positions.
    """

    end: int
    queries: dict[int, Tensor] = field(default_factory=dict)


def rate(
    queries: Tensor,
    before: Tensor | None,
    keys: Tensor,
    values: Tensor,
    length: int,
    rotation: Rotation,
    *,
    scaling: float,
    softcap: float,
) -> Tensor:
    """Score the pairs of a prompt, or of a part of it.

    Every query is rotated to the position after the prompt's last token, whatever the number of
    parts; it attends to the keys that have come so far.

    Parameters
    ----------
    queries : Tensor [N, Hq, D]
        Of the part's tokens, rotated to their positions.
    before : Tensor [n, Hq, D] or None
        The last ones of the tokens before them. None: the part is scored like a text's beginning.
    keys, values : Tensor [H, T, D]
        Of all tokens that have come, the last N of which are these.
    length : int
        Tokens of the prompt.
    rotation : Rotation
    scaling, softcap : float
        Of the layer's logits.

    Returns
    -------
    Tensor [H, N], float32
    """
    count, num_keys = queries.shape[0], keys.shape[1]
    asking = queries if before is None else torch.cat([before, queries])
    positions = torch.arange(num_keys - len(asking), num_keys)
    asked = rotation.turn(asking, length - positions)
    if len(asking) < num_keys:
        nobody = asked.new_zeros(asked.shape[0], num_keys - len(asking), asked.shape[2])
        asked = torch.cat([nobody, asked], 1)
    expected = ops.expected_attention(
        asked[None].contiguous(), keys[None].contiguous(), scaling=scaling, softcap=softcap
    )
    return weigh(expected[..., -count:], values[None, :, -count:])[0]


class Scores:
    """Scores of the pairs in vLLM's blocks, which lie beside them.

    What one request computes, others may find in the prefix cache, with its scores.

    Parameters
    ----------
    shape : tuple of int
        Layers, blocks, KV heads, tokens of a block.

    Attributes
    ----------
    last : dict of LastQueries
        By the block in which a part of a prompt ends.
    """

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self._pages = torch.empty(shape, dtype=torch.float32)
        self.last: dict[int, LastQueries] = {}

    def write(self, layer: int, blocks: Tensor, begin: int, scores: Tensor) -> None:
        """Keep scores [H, N] of a layer's pairs, from the ``begin``-th of a request on."""
        places = torch.arange(begin, begin + scores.shape[1])
        size = self._pages.shape[3]
        self._pages[layer][blocks[places // size].long(), :, places % size] = scores.T

    def read(self, layers: slice, blocks: Tensor) -> Tensor:
        """Give the scores of some layers' pairs in blocks [n]: [L * H, n * block_size]."""
        found = self._pages[layers, blocks.long()]  # [L, n, H, block_size]
        return found.transpose(1, 2).flatten(2).flatten(0, 1)

    def before(self, block: int, begin: int) -> dict[int, Tensor]:
        """Return the last queries before a part of a prompt by layer; empty if not known."""
        last = self.last.get(block)
        return last.queries if last is not None and last.end == begin else {}
