"""The op ``project_tokens``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekv.ops import checks
from moekv.ops.backends import implementation
from moekv.ops.registration import exportable, register


class ProjectTokens(NamedTuple):
    """Result of :func:`project_tokens`."""

    projected: Tensor
    standout: Tensor


exportable(ProjectTokens)


def project_tokens(
    hidden_states: Tensor, weight: Tensor, mask: Tensor | None = None, *, backend: str = "auto"
) -> ProjectTokens:
    """Project hidden states, and measure how much each token stands out from its row.

    What stands out: the cosine distance of the hidden state from the mean direction of the row's
    real tokens, standardised over them (mean 0, standard deviation 1; 1e-4 is added to the
    deviation, far above the rounding noise of equal tokens). Scaling the hidden states does not
    change it. For a few projections: both take two reads of the hidden states.

    Parameters
    ----------
    hidden_states : Tensor [B, T, hidden], float32, float16 or bfloat16
    weight : Tensor [P, hidden], dtype of ``hidden_states``
    mask : Tensor [B, T], bool, optional
        True: a real token. Others are not read.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of
        ``hidden_states``.

    Returns
    -------
    ProjectTokens
        ``projected [B, T, P]`` float32: ``hidden_states @ weight.T``, differentiable with respect
        to both; ``standout [B, T]`` float32. Both are 0 at padding. NaN in a row stays there.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``hidden_states`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype or device.
    """
    op = implementation("project_tokens", hidden_states, backend)
    return ProjectTokens(*op(hidden_states, weight, mask))


def _fake(
    hidden_states: Tensor, weight: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    checks.native("project_tokens", "hidden_states", hidden_states)
    checks.project_tokens(hidden_states, weight, mask)
    shape = hidden_states.shape[:2]
    return (
        hidden_states.new_empty(*shape, len(weight), dtype=torch.float32),
        hidden_states.new_empty(shape, dtype=torch.float32),
    )


def _setup_context(
    ctx: Any, inputs: Sequence[Tensor | None], options: dict[str, Any], output: Sequence[Tensor]
) -> None:
    hidden_states, weight, mask = (*inputs, None)[:3]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden_states, weight, mask)


def _backward(ctx: Any, grad: Tensor, grad_standout: None) -> tuple[Tensor, Tensor, None]:
    hidden_states, weight, mask = ctx.saved_tensors
    wide = hidden_states.float()
    if mask is not None:  # whatever stands at padding, NaN included, has no part in it
        grad = grad.masked_fill(~mask[..., None], 0.0)
        wide = wide.masked_fill(~mask[..., None], 0.0)
    with torch.autocast(grad.device.type, enabled=False):
        grad_hidden = (grad @ weight.float()).to(hidden_states.dtype)
        grad_weight = grad.flatten(0, 1).T @ wide.flatten(0, 1)
    return grad_hidden, grad_weight.to(weight.dtype), None


register("project_tokens", _fake, backward=_backward, setup_context=_setup_context)
