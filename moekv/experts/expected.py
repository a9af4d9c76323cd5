"""The expert ``expected``."""

import torch
from torch import Tensor

from moekv.experts.base import Expert
from moekv.experts.view import LayerView


def weigh(expected: Tensor, values: Tensor) -> Tensor:
    """Add half of the log of the value's norm to the expected attention [B, H, T]."""
    # Squares are summed up in fp32. The norm itself in fp32 would take three times as long, and
    # rounding it to bf16 moves its log by 1/256 at most.
    size: Tensor = torch.linalg.vector_norm(values, dim=-1).float()
    return expected.add(size.clamp_(1e-6, 1e30).log_(), alpha=0.5)


class ExpectedExpert(Expert):
    """Scores a pair by the attention it can expect from later tokens, and by the norm of its value.

    ``log attention + 1/2 log |value|``: see ``moekv.ops.expected_attention`` for the first term.
    """

    name = "expected"
    comparable = True
    finite = True
    needs_hidden_states = True
    waits = True

    def scores(self, view: LayerView) -> Tensor:
        """Score by attention and value, see the class."""
        return weigh(view.expected(), view.values)
