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
    unrated : int
        The last of them whose pairs are still to be rated.
    queries : dict of list of Tensor [n, Hq, D]
        By layer, rotated to their positions.
    """

    end: int
    unrated: int = 0
    queries: dict[int, list[Tensor]] = field(default_factory=dict)


def rate(
    queries: Tensor,
    count: int,
    keys: Tensor,
    values: Tensor,
    ahead: int,
    rotation: Rotation,
    *,
    scaling: float,
    softcap: float,
) -> Tensor:
    """Rate the last pairs that have come.

    Every query is rotated to the position after the prompt's last token, whatever the number of
    parts; it attends to the keys that are held so far. Layers are not bounded by their mean, as
    ``ExpectedExpert`` does: a part's is not the prompt's.

    Parameters
    ----------
    queries : Tensor [n, Hq, D]
        Of the last tokens, rotated to their positions: of those that are rated, and some before
        them, if there are any.
    count : int
        N, how many are rated.
    keys, values : Tensor [H, T, D]
        Of all pairs that are held, the last N of which are these.
    ahead : int
        Tokens of the prompt that are still to come.
    rotation : Rotation
    scaling, softcap : float
        Of the layer's logits.

    Returns
    -------
    Tensor [H, N], float32
    """
    num_asking, num_keys = len(queries), keys.shape[1]
    asked = rotation.turn(queries, ahead + torch.arange(num_asking, 0, -1))
    if num_asking < num_keys:
        nobody = asked.new_zeros(asked.shape[0], num_keys - num_asking, asked.shape[2])
        asked = torch.cat([nobody, asked], 1)
    expected = ops.expected_attention(
        asked[None].contiguous(), keys[None].contiguous(), scaling=scaling, softcap=softcap
    )
    return weigh(expected[..., -count:], values[None, :, -count:])[0]


class Scores:
    """Scores of the pairs in vLLM's pages, which lie beside them.

    What one request computes, others may find in the prefix cache, with its scores.

    Parameters
    ----------
    num_pages, block_size : int
    """

    def __init__(self, num_pages: int, block_size: int) -> None:
        self._pages = torch.empty(num_pages, block_size, dtype=torch.float32)

    def write(self, pages: Tensor, begin: int, scores: Tensor) -> None:
        """Keep scores [H, N] of the pairs from the ``begin``-th on in pages [H, n] of a request."""
        places = torch.arange(begin, begin + scores.shape[1])
        size = self._pages.shape[1]
        self._pages[pages[:, places // size], places % size] = scores

    def read(self, pages: Tensor) -> Tensor:
        """Return the scores of the pairs in pages [R, n]: [R, n * block_size]."""
        return self._pages[pages].flatten(1)

    def move(self, pages: Tensor, places: Tensor, to: Tensor) -> None:
        """Fill pages ``to`` [n] with the scores of pairs [n * block_size], each of a page."""
        self._pages[to] = self._pages[pages, places].view(len(to), -1)
