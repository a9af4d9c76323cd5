"""The expert ``expected``."""

import math

import torch
from torch import Tensor

from moekv.experts.base import Expert
from moekv.experts.view import LayerView

CROWDED = math.exp(-3)
"""Mean expected attention of a layer's pairs up to which layers are compared as they are, 5 %.

Measured on two models (docs/design.md)."""


def weigh(expected: Tensor, values: Tensor) -> Tensor:
    """Add half of the log of the value's norm to the expected attention [B, H, T]."""
    # Squares are summed up in fp32. The norm itself in fp32 would take three times as long, and
    # rounding it to bf16 moves its log by 1/256 at most.
    size: Tensor = torch.linalg.vector_norm(values, dim=-1).float()
    return expected.add(size.clamp_(1e-6, 1e30).log_(), alpha=0.5)


def crowding(expected: Tensor, view: LayerView) -> Tensor:
    """By how much the mean attention to a layer's pairs exceeds ``CROWDED``.

    Parameters
    ----------
    expected : Tensor [B, H, T], float32
        See ``LayerView.expected``.
    view : LayerView

    Returns
    -------
    Tensor [B, 1, 1], float32
        Of the logs, in nats; 0 where it does not.
    """
    looks = expected.exp()
    if view.start is None:
        mean = looks.mean(-1, keepdim=True)
    else:
        real = view.real[:, None]
        count = real.sum(-1, keepdim=True).clamp(min=1)
        mean = looks.where(real, 0.0).sum(-1, keepdim=True) / count
    mean = view.gathered(mean).mean(1, keepdim=True)
    return (mean / CROWDED).clamp_(min=1.0).log_()


class ExpectedExpert(Expert):
    """Scores a pair by the attention it can expect from later tokens, and by the norm of its value.

    ``log attention + 1/2 log |value|``: see ``moekv.ops.expected_attention`` for the first term.

    There are layers in which nearly every query finds the place that it comes from, whatever is
    there. All their pairs would be retained before any of a layer that looks for few. So the scores
    of a layer whose pairs expect more than ``CROWDED`` in the mean are lowered to that mean.

    Parameters
    ----------
    bounded : bool
        Whether they are. Within a layer the order is the same. A calibrated router has offsets that
        are fitted to scores as they are.
    """

    name = "expected"
    comparable = True
    finite = True
    needs_hidden_states = True
    waits = True

    def __init__(self, *, bounded: bool = True) -> None:
        self.bounded = bounded

    def scores(self, view: LayerView) -> Tensor:
        """Score by attention and value, see the class."""
        expected = view.expected()
        scores = weigh(expected, view.values)
        return scores - crowding(expected, view) if self.bounded else scores
