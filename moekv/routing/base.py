"""The base class of routers, and the output of a router.

A router is called on one layer's hidden states and returns a `RouterOutput`, in two steps: `rate`
computes logits from the hidden states, and `decide` adds evidence (`moekv.routing.evidence`) and
chooses experts. Parameters start at zero, so an untrained router chooses by evidence and history
alone, never at random and never by the order of a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekv import ops
from moekv.ops.reference import gate_probs
from moekv.routing.losses import switch_loss

MAX_EXPERTS = 256


@dataclass
class RouterOutput:
    """The routing of one layer's tokens.

    Attributes
    ----------
    logits : Tensor
        `[B, T, E]`, of the gate, evidence included.
    weights : Tensor
        `[B, T, k]` fp32, the gate weights. Rows sum to 1, and to 0 on padding. Slots that a router
        leaves unused have weight 0.
    experts : Tensor
        `[B, T, k]` int32, the expert of each slot, distinct within a token.
    aux_loss : Tensor
        Scalar fp32, already multiplied by `aux_loss_weight`.
    load : Tensor
        `[E]` int64, how many slots with a weight each expert got from real tokens.
    entropy : Tensor
        Scalar fp32, the sum of the entropies of `probs` over the real tokens, in nats.
    importance : Tensor or None
        `[B, T]` fp32 in [0, 1], 0 on padding, from routers that estimate it.
    mask : Tensor or None
        `[B, T]` bool, True for real tokens; None: all are.
    temperature : float
        Of the gate.
    probs : Tensor
        `[B, T, E]` fp32, the softmax over the experts; 0 on padding. Computed when first read.
    shares : Tensor
        `[B, T, E]` fp32, `weights` by expert; 0 where it was not chosen. Computed when first read.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor
    aux_loss: Tensor
    load: Tensor
    entropy: Tensor
    importance: Tensor | None = None
    mask: Tensor | None = None
    temperature: float = 1.0

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities of the experts, see the class."""
        return probabilities(self.logits, self.temperature, self.mask)

    @cached_property
    def shares(self) -> Tensor:
        """Weights of the experts, see the class."""
        shares = self.weights.new_zeros(*self.weights.shape[:2], len(self.load))
        return shares.scatter_(-1, self.experts.long(), self.weights)


class Gate(NamedTuple):
    """The choice of experts for one call, before losses."""

    weights: Tensor  # [B, T, k] fp32
    experts: Tensor  # [B, T, k] int32
    load: Tensor  # [E] int64
    entropy: Tensor  # scalar fp32, of the probabilities
    balance_loss: Tensor  # scalar fp32, unweighted


def probabilities(logits: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """Probabilities `[B, T, E]` in fp32, NaN and infinities treated as in `gating_topk`."""
    probs = gate_probs(logits.float(), temperature)
    return probs if mask is None else probs.masked_fill(~mask[..., None], 0)


class ZeroLinear(nn.Linear):
    """A linear layer of zeros, made without drawing random numbers."""

    def reset_parameters(self) -> None:
        """Set weights and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class BaseMoERouter(nn.Module):
    """Top-k gating: `softmax((h W + b + prior) / temperature)`, the k best, renormalised.

    The projection reads the dtype of the hidden states, everything after it is fp32. W and b
    start at zero. The auxiliary loss is the Switch Transformer's load-balancing loss.

    Parameters
    ----------
    hidden_size : int
        Size of the hidden states.
    num_experts : int
        E, 1 to 256.
    top_k : int
        Experts per token, 1 to `num_experts`.
    prior : sequence of float, optional
        `[E]`, added to the logits: log-preferences before any training.
    temperature : float
        Divides the logits; > 0.
    aux_loss_weight : float
        Multiplies the auxiliary loss; >= 0.
    choices : int
        Experts of the model itself, 0 or more: their weights for each token
        (``LayerView.expert_choice``) follow the hidden state, and the projection reads both.
    backend : str
        `"auto"`, `"cpu"`, `"cuda"` or `"torch"`, as in `moekv.ops`.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    RuntimeError
        If the backend is not available.
    """

    prior: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        prior: Sequence[float] | None = None,
        temperature: float = 1.0,
        aux_loss_weight: float = 0.01,
        choices: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"expected hidden_size >= 1, got {hidden_size}")
        if choices < 0:
            raise ValueError(f"expected choices >= 0, got {choices}")
        if not 1 <= num_experts <= MAX_EXPERTS:
            raise ValueError(f"expected num_experts between 1 and {MAX_EXPERTS}, got {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"expected top_k between 1 and num_experts = {num_experts}, got {top_k}"
            )
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"expected a finite temperature > 0, got {temperature}")
        if not (aux_loss_weight >= 0 and math.isfinite(aux_loss_weight)):
            raise ValueError(f"expected a finite aux_loss_weight >= 0, got {aux_loss_weight}")
        prior = [0.0] * num_experts if prior is None else [float(p) for p in prior]
        if len(prior) != num_experts or not all(map(math.isfinite, prior)):
            raise ValueError(f"expected a prior of {num_experts} finite numbers, got {prior}")
        ops.check_backend(backend)
        self.hidden_size = hidden_size
        self.choices = choices
        self.num_experts = num_experts
        self.top_k = top_k
        self.temperature = temperature
        self.aux_loss_weight = aux_loss_weight
        self.backend = backend
        self.gate = ZeroLinear(self.width, num_experts)
        self.register_buffer("prior", torch.tensor(prior))
        self._reads_nothing = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseMoERouter:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Buffers stay fp32 when the router is cast to its layer's dtype: a bf16 moving average
        # stops moving, and gating_topk takes its bias in fp32.
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()
        return self

    @property
    def width(self) -> int:
        """Numbers that the gate reads of a token: its hidden state, and the model's choice."""
        return self.hidden_size + self.choices

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> RouterOutput:
        """Route every token.

        Parameters
        ----------
        hidden_states : Tensor
            `[B, T, hidden_size + choices]`, floating.
        mask : Tensor, optional
            `[B, T]` bool, True for real tokens. All tokens are real without it.

        Returns
        -------
        RouterOutput

        Raises
        ------
        ValueError
            If a shape is not the one above, or there is no token.
        TypeError
            If the mask is not boolean.
        """
        return self.decide(*self.rate(hidden_states, mask), mask)

    def rate(
        self, hidden_states: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the logits of every token: the part of :meth:`forward` that needs hidden states.

        Parameters
        ----------
        hidden_states, mask
            As in :meth:`forward`.

        Returns
        -------
        logits : Tensor
            `[B, T, E]`.
        importance : Tensor or None
            `[B, T]` fp32, from routers that estimate it.
        """
        self._check_inputs(hidden_states, mask)
        if self._reads_nothing:
            logits = (self.gate.bias + self.prior).expand(*hidden_states.shape[:2], -1)
            return logits, None
        if mask is not None:
            # Padding, NaN included, must reach neither results nor gradients.
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        return self._rate(hidden_states, mask)

    def decide(
        self,
        logits: Tensor,
        importance: Tensor | None = None,
        mask: Tensor | None = None,
        evidence: Tensor | None = None,
        hit_rates: Tensor | None = None,
        *,
        goes_on: bool = False,
    ) -> RouterOutput:
        """Choose experts from the logits of :meth:`rate`.

        Parameters
        ----------
        logits, importance
            See :meth:`rate`.
        mask : Tensor, optional
            As in :meth:`forward`.
        evidence : Tensor, optional
            `[B, T, E]` fp32, added to the logits, see `moekv.routing.evidence`. -inf for an expert
            that cannot score.
        hit_rates : Tensor, optional
            `[B, E]`, each in [0, 1], measured on the same rows, for routers with a history:
            :meth:`update_history` will get their mean.
        goes_on : bool
            Whether these texts have been routed before. The history then has the hit rates of all
            rows, so each row uses its own hit rates alone.

        Returns
        -------
        RouterOutput
        """
        bias = self._own_bias(hit_rates) if goes_on else self._history_bias(hit_rates)
        if evidence is not None:
            logits = logits + evidence
            # Neither history nor balancing may choose an expert that cannot score.
            none = logits.new_zeros(()).float() if bias is None else bias
            bias = none.masked_fill((evidence == -torch.inf).all(1), -torch.inf)
        gate = self._choose(logits, mask, importance, bias)
        return RouterOutput(
            logits=logits,
            weights=gate.weights,
            experts=gate.experts,
            aux_loss=self.aux_loss_weight * gate.balance_loss,
            load=gate.load,
            entropy=gate.entropy,
            importance=importance,
            mask=mask,
            temperature=self.temperature,
        )

    def freeze(self) -> BaseMoERouter:
        """Make the parameters constant, for inference; waits for the device.

        A gate whose weights are zero then no longer reads the hidden states.

        Returns
        -------
        BaseMoERouter
            This router.
        """
        self.eval().requires_grad_(False)
        rates = type(self)._rate is BaseMoERouter._rate
        self._reads_nothing = rates and not self.gate.weight.any()
        return self

    def update_history(self, hit_rates: Tensor) -> None:
        """Update the history with measured hit rates `[E]` in [0, 1]; this router has none.

        A history is held in buffers. They are replaced, not written to: other threads begin with
        the tensors that were there when a block began.
        """

    def update_later(self, hit_rates: Tensor) -> None:
        """Update the history with hit rates `[E]` of later queries; this router has none."""

    @property
    def history(self) -> Tensor | None:
        """Selection bias `[E]` from measured hit rates; None: no history."""
        return None

    def _rate(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, T, E]` and, where a router estimates it, importance `[B, T]` of the tokens.

        Hidden states are 0 at padding.
        """
        dtype = hidden_states.dtype
        bias = (self.gate.bias + self.prior).to(dtype)
        return F.linear(hidden_states, self.gate.weight.to(dtype), bias), None

    def _choose(
        self, logits: Tensor, mask: Tensor | None, importance: Tensor | None, bias: Tensor | None
    ) -> Gate:
        """Choose experts; `bias` [E] or [B, E] comes from the history, in units of probability."""
        gate = self._gate(logits, mask, self.top_k, bias, importance)
        balance_loss = self._balance_loss(mean_over_tokens(gate.prob_sum, mask, logits), gate.load)
        return Gate(gate.weights, gate.experts, gate.load, gate.entropy, balance_loss)

    def _history_bias(self, hit_rates: Tensor | None) -> Tensor | None:
        """Return the selection bias of the history with `hit_rates`: [E] or [B, E]; or None."""
        return None

    def _own_bias(self, hit_rates: Tensor | None) -> Tensor | None:
        """Return the selection bias of hit rates alone, without a history: [B, E]; or None."""
        return None

    def _gate(
        self,
        logits: Tensor,
        mask: Tensor | None,
        k: int,
        bias: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> ops.GatingTopk:
        if bias is not None and bias.dim() == 2:  # a row's routing must not depend on its batch
            rows = [
                self._gate(x, of(mask, row), k, bias[row].contiguous(), of(importance, row))
                for row, x in enumerate(torch.split(logits, 1))
            ]
            weights, experts, *sums = zip(*rows, strict=True)
            total = (torch.stack(parts).sum(0) for parts in sums)
            return ops.GatingTopk(torch.cat(weights), torch.cat(experts), *total)
        return ops.gating_topk(
            logits,
            bias,
            mask,
            importance,
            k=k,
            temperature=self.temperature,
            backend=self.backend,
        )

    def _balance_loss(self, mean_probs: Tensor, load: Tensor) -> Tensor:
        return switch_loss(mean_probs, load)

    def _check_inputs(self, hidden_states: Tensor, mask: Tensor | None) -> None:
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.width:
            raise ValueError(
                f"expected hidden_states [batch, tokens, {self.width}], "
                f"got {list(hidden_states.shape)}"
            )
        if 0 in hidden_states.shape:
            raise ValueError(f"expected at least one token, got {list(hidden_states.shape)}")
        if mask is None:
            return
        if mask.dtype != torch.bool:
            raise TypeError(f"expected a bool mask, got {mask.dtype}")
        if mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"expected mask {list(hidden_states.shape[:2])}, got {list(mask.shape)}"
            )

    def extra_repr(self) -> str:
        """Describe the router in `print(press)`."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, temperature={self.temperature}"


def of(numbers: Tensor | None, row: int) -> Tensor | None:
    """Return one row, as a batch."""
    return None if numbers is None else numbers[row : row + 1]


def mean_over_tokens(prob_sum: Tensor, mask: Tensor | None, logits: Tensor) -> Tensor:
    """Divide `[E]` sums by the number of real tokens, without waiting for the device."""
    if mask is None:
        return prob_sum / max(logits.shape[0] * logits.shape[1], 1)
    return prob_sum / mask.sum().clamp(min=1)
