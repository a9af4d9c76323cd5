"""The op ``gating_topk``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekv.ops import checks, reference
from moekv.ops.backends import implementation
from moekv.ops.registration import exportable, register


class GatingTopk(NamedTuple):
    """Result of :func:`gating_topk`."""

    weights: Tensor
    experts: Tensor
    prob_sum: Tensor
    load: Tensor
    entropy: Tensor


exportable(GatingTopk)


def gating_topk(
    logits: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    k: int,
    temperature: float = 1.0,
    backend: str = "auto",
) -> GatingTopk:
    """Choose the k best experts of every token, and count what each expert got.

    Probabilities are the softmax of ``logits / temperature`` over the experts. The k experts with
    the highest probability + ``bias`` are chosen, ties to the lower expert. The bias moves the
    choice and never the weights, as in auxiliary-loss-free balancing [3]_.

    Parameters
    ----------
    logits : Tensor [..., num_experts], float32, float16 or bfloat16
        Up to 256 experts. NaN counts as -inf, +inf as the largest finite float; a token with no
        finite logit is uniform over the experts.
    bias : Tensor [num_experts], float32, optional
        Added to the probabilities for the choice alone. NaN counts as -inf.
    mask : Tensor [...], bool, optional
        True: a real token. Others get weights 0 and experts 0 to k - 1, and count nowhere.
    importance : Tensor [...], float32, optional
        Slot j of a token counts with ``clamp(k * importance - j, 0, 1)``, the first one with 1:
        in [0, 1], so many of the k experts are consulted. NaN counts as 0. None: all count with 1.
    k : int
        Experts per token, 1 to num_experts.
    temperature : float
        Above 0.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``logits``.

    Returns
    -------
    GatingTopk
        ``weights [..., k]`` float32: probabilities of the chosen, as far as their slots
        count, over their sum, best first;
        ``experts [..., k]`` int32; ``prob_sum [num_experts]`` float32: sum of the probabilities
        over the real tokens; ``load [num_experts]`` int64: how often each expert got a slot that
        counts; ``entropy``, a scalar: sum of the probabilities' entropies over the real tokens, in
        nats. ``weights`` and ``prob_sum`` are differentiable with respect to ``logits``,
        ``weights`` also with respect to ``importance``.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``logits`` are elsewhere, or ``mask`` has another shape.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype, device or value.

    References
    ----------
    .. [1] Lepikhin et al., "GShard", arXiv:2006.16668.
    .. [2] Fedus et al., "Switch Transformers", arXiv:2101.03961.
    .. [3] Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
       arXiv:2408.15664.
    """
    op = implementation("gating_topk", logits, backend)
    if logits.dim() == 2:
        return GatingTopk(*op(logits, bias, mask, importance, k=k, temperature=temperature))
    leading = logits.shape[:-1]
    flat: list[Tensor | None] = []
    for name, tensor in (("mask", mask), ("importance", importance)):
        if tensor is not None and tensor.shape != leading:
            raise ValueError(
                f"moekv::gating_topk: expected {name} {list(leading)}, got {list(tensor.shape)}"
            )
        flat.append(None if tensor is None else tensor.reshape(-1))
    rows = logits.flatten(0, -2) if logits.dim() > 2 else logits[None]
    weights, experts, *sums = op(rows, bias, *flat, k=k, temperature=temperature)
    shape = (*leading, k)
    return GatingTopk(weights.view(shape), experts.view(shape), *sums)


def _fake(
    logits: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    k: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.native("gating_topk", "logits", logits)
    checks.gating_topk(logits, bias, mask, importance, k, temperature)
    num_tokens, num_experts = logits.shape
    return (
        logits.new_empty(num_tokens, k, dtype=torch.float32),
        logits.new_empty(num_tokens, k, dtype=torch.int32),
        logits.new_empty(num_experts, dtype=torch.float32),
        logits.new_empty(num_experts, dtype=torch.int64),
        logits.new_empty((), dtype=torch.float32),
    )


def _setup_context(
    ctx: Any,
    inputs: Sequence[Tensor | None],
    options: dict[str, Any],
    output: Sequence[Tensor],
) -> None:
    logits, _, mask, importance = (*inputs, None, None, None)[:4]
    weights, experts, _, *statistics = output
    ctx.mark_non_differentiable(experts, *statistics)
    ctx.save_for_backward(logits, mask, importance, weights, experts)
    ctx.temperature = options.get("temperature", 1.0)


def _backward(
    ctx: Any,
    grad_weights: Tensor,
    grad_experts: None,
    grad_prob_sum: Tensor,
    grad_load: None,
    grad_entropy: None,
) -> tuple[Tensor, None, None, Tensor | None]:
    """Sum of the gradients of two softmaxes: over the chosen (weights), over all (prob_sum)."""
    logits, mask, importance, weights, experts = ctx.saved_tensors
    experts = experts.long()
    k = weights.shape[1]
    probs = reference.gate_probs(logits, ctx.temperature)
    chosen = probs.gather(-1, experts)
    counts = None if importance is None else reference.slot_counts(importance, k)
    total = (chosen if counts is None else chosen * counts).sum(-1, keepdim=True)
    slope = grad_weights - (weights * grad_weights).sum(-1, keepdim=True)
    # Where no chosen expert has any probability, the weights do not depend on the logits.
    grad_chosen = weights * slope * (total > 0)
    if mask is not None:
        probs = probs.masked_fill(~mask[:, None], 0.0)
    grad = probs * (grad_prob_sum - (probs * grad_prob_sum).sum(-1, keepdim=True))
    grad = grad.scatter_add(-1, experts, grad_chosen) / ctx.temperature
    grad_logits = torch.where(logits.isfinite(), grad, 0.0).to(logits.dtype)
    if importance is None or counts is None:
        return grad_logits, None, None, None
    # A slot grows with the importance where it counts in part; the first one always counts.
    slots = torch.arange(k, device=weights.device)
    extent = k * importance[:, None] - slots
    partly = (extent >= 0) & (extent <= 1) & (slots > 0)
    share = torch.where(total > 0, chosen / torch.where(total > 0, total, 1.0), 1.0)
    share = torch.where(total > 0, share, 1 / counts.sum(-1, keepdim=True))
    grad_importance = (k * partly * share * slope).sum(-1)
    if mask is not None:
        grad_importance = grad_importance.masked_fill(~mask, 0.0)
    return grad_logits, None, None, grad_importance


register("gating_topk", _fake, backward=_backward, setup_context=_setup_context)
