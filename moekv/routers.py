"""Routers: which experts score a token's key-value pairs, and with what weight.

A router is called on one layer's hidden states and returns a `RouterOutput`. Its parameters start
at zero, so a router that nobody calibrated gates by its prior and its history alone, never at
random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekv import ops

__all__ = [
    "ROUTERS",
    "AdaptiveRouter",
    "BaseMoERouter",
    "EPLBRouter",
    "HierarchicalRouter",
    "PiKVMoERouter",
    "RouterOutput",
    "SharedExpertRouter",
    "TopKBalancedRouter",
    "make_router",
]

MAX_EXPERTS = 256


@dataclass
class RouterOutput:
    """What a router decides for the tokens of one layer.

    Attributes
    ----------
    logits : Tensor
        `[B, T, E]`, of the gate.
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
        return _probabilities(self.logits, self.temperature, self.mask)

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


def switch_loss(mean_probs: Tensor, load: Tensor) -> Tensor:
    """Load-balancing loss of the Switch Transformer, `E * sum_e f_e P_e`; 1 at perfect balance.

    Parameters
    ----------
    mean_probs : Tensor
        `[E]`, P: the mean router probability of each expert.
    load : Tensor
        `[E]`, how often each expert was chosen; f is its share of the choices.

    References
    ----------
    Fedus et al., Switch Transformers, JMLR 2022, equation 4.
    """
    share = load / load.sum().clamp(min=1)
    return load.numel() * (share * mean_probs).sum()


def entropy_loss(mean_probs: Tensor) -> Tensor:
    """`log E` minus the entropy of the mean probabilities `[E]`: 0 at balance, at most `log E`."""
    entropy = -(mean_probs * mean_probs.clamp(min=torch.finfo(torch.float32).tiny).log()).sum()
    return math.log(mean_probs.numel()) - entropy


def variance_loss(mean_probs: Tensor) -> Tensor:
    """Squared coefficient of variation of the mean probabilities `[E]`: 0 at balance, below E.

    References
    ----------
    Shazeer et al., Outrageously Large Neural Networks, ICLR 2017, the importance loss.
    """
    num_experts = mean_probs.numel()
    return num_experts * (mean_probs - 1 / num_experts).square().sum()


def gini_loss(mean_probs: Tensor) -> Tensor:
    """Gini coefficient of the mean probabilities `[E]`: 0 at balance, at most `1 - 1 / E`."""
    differences = (mean_probs[:, None] - mean_probs[None, :]).abs()
    return differences.sum() / (2 * mean_probs.numel())


BALANCE_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": entropy_loss,
    "variance": variance_loss,
    "gini": gini_loss,
}


def _probabilities(logits: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """Probabilities `[B, T, E]` in fp32, NaN and infinities treated as in `gating_topk`."""
    scaled = logits.float() / temperature
    scaled = scaled.nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max)
    no_finite = (scaled == -torch.inf).all(-1, keepdim=True)
    probs = scaled.masked_fill(no_finite, 0).softmax(-1)
    return probs if mask is None else probs.masked_fill(~mask[..., None], 0)


def _count(experts: Tensor, used: Tensor, num_experts: int) -> Tensor:
    """Count the used slots `[B, T, k]` of each expert; `[E]` int64."""
    load = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    return load.scatter_add_(0, experts.flatten().long(), used.flatten().long())


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
        `[E]`, added to the logits: the log-preferences that hold where nothing was learned.
    temperature : float
        Divides the logits; > 0.
    aux_loss_weight : float
        Multiplies the auxiliary loss; >= 0.
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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"expected hidden_size >= 1, got {hidden_size}")
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
        self.num_experts = num_experts
        self.top_k = top_k
        self.temperature = temperature
        self.aux_loss_weight = aux_loss_weight
        self.backend = backend
        self.gate = nn.Linear(hidden_size, num_experts)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.register_buffer("prior", torch.tensor(prior))
        self._reads_nothing = False
        self._routed_alike: RouterOutput | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseMoERouter:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._routed_alike = None
        # Buffers stay fp32 when the router is cast to its layer's dtype: a bf16 moving average
        # stops moving, and gating_topk takes its bias in fp32.
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()
        return self

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> RouterOutput:
        """Route every token.

        Parameters
        ----------
        hidden_states : Tensor
            `[B, T, hidden_size]`, floating.
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
        self._check_inputs(hidden_states, mask)
        if self._reads_nothing and mask is None:
            return self._route_alike(hidden_states)
        return self._route(hidden_states, mask)

    def freeze(self) -> BaseMoERouter:
        """Make the parameters constant, for inference; waits for the device.

        A gate whose weights are zero then no longer reads the hidden states: all tokens are routed
        alike.

        Returns
        -------
        BaseMoERouter
            This router.
        """
        self.eval().requires_grad_(False)
        rates = type(self)._rate is BaseMoERouter._rate
        chooses = type(self)._choose is BaseMoERouter._choose
        self._reads_nothing = rates and chooses and not self.gate.weight.any()
        self._routed_alike = None
        return self

    def _route_alike(self, hidden_states: Tensor) -> RouterOutput:
        """Route one token, which stands for all of them."""
        shape = hidden_states.shape[:2]
        if self._routed_alike is not None and self._routed_alike.weights.shape[:2] == shape:
            return self._routed_alike
        one = self._route(torch.zeros_like(hidden_states[:1, :1]), None)
        self._routed_alike = replace(
            one,
            logits=one.logits.expand(*shape, -1),
            weights=one.weights.expand(*shape, -1),
            experts=one.experts.expand(*shape, -1),
            load=one.load * shape.numel(),
            entropy=one.entropy * shape.numel(),
        )
        self._routed_alike.shares = one.shares.expand(*shape, -1)
        return self._routed_alike

    def _route(self, hidden_states: Tensor, mask: Tensor | None) -> RouterOutput:
        if mask is not None:
            # Whatever stands at padding, NaN included, must reach neither results nor gradients.
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        logits, importance = self._rate(hidden_states, mask)
        return self._decide(logits, importance, mask)

    def _decide(
        self, logits: Tensor, importance: Tensor | None, mask: Tensor | None
    ) -> RouterOutput:
        gate = self._choose(logits, mask, importance)
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

    def update_history(self, hit_rates: Tensor) -> None:
        """Take the measured cache hit rates `[E]`, each in [0, 1]; this router keeps none."""

    def _rate(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, T, E]` and, where a router estimates it, importance `[B, T]` of the tokens.

        Hidden states are 0 at padding.
        """
        dtype = hidden_states.dtype
        bias = (self.gate.bias + self.prior).to(dtype)
        return F.linear(hidden_states, self.gate.weight.to(dtype), bias), None

    def _choose(self, logits: Tensor, mask: Tensor | None, importance: Tensor | None) -> Gate:
        gate = self._gate(logits, mask, self.top_k, self._history_bias(), importance)
        balance_loss = self._balance_loss(_mean(gate.prob_sum, mask, logits), gate.load)
        return Gate(gate.weights, gate.experts, gate.load, gate.entropy, balance_loss)

    def _history_bias(self) -> Tensor | None:
        return None

    def _gate(
        self,
        logits: Tensor,
        mask: Tensor | None,
        k: int,
        bias: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> ops.GatingTopk:
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
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"expected hidden_states [batch, tokens, {self.hidden_size}], "
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


def _mean(prob_sum: Tensor, mask: Tensor | None, logits: Tensor) -> Tensor:
    """Divide `[E]` sums by the number of real tokens, without asking the device for it."""
    if mask is None:
        return prob_sum / max(logits.shape[0] * logits.shape[1], 1)
    return prob_sum / mask.sum().clamp(min=1)


class TopKBalancedRouter(BaseMoERouter):
    """Top-k gating whose auxiliary loss sees the mean probabilities alone.

    Parameters
    ----------
    balance_mode : str
        `"entropy"`: `log E - H(P)`; `"variance"`: squared coefficient of variation of P; `"gini"`:
        Gini coefficient of P. Each is 0 where the experts are used alike.
    *args, **options
        As in `BaseMoERouter`.

    Raises
    ------
    ValueError
        If the balance mode is unknown.
    """

    def __init__(self, *args: Any, balance_mode: str = "entropy", **options: Any) -> None:
        super().__init__(*args, **options)
        if balance_mode not in BALANCE_LOSSES:
            raise ValueError(
                f"expected balance_mode among {', '.join(BALANCE_LOSSES)}, got {balance_mode!r}"
            )
        self.balance_mode = balance_mode

    def _balance_loss(self, mean_probs: Tensor, load: Tensor) -> Tensor:
        return BALANCE_LOSSES[self.balance_mode](mean_probs)


class AdaptiveRouter(BaseMoERouter):
    """Top-k gating where important tokens consult more experts.

    A token of importance `i` consults `n = max(1, i * k)` experts; n is a real number, and slot `j`
    counts with `clamp(n - j, 0, 1)` before the weights are renormalised. Nothing jumps when the
    importance changes a little, and gradients reach it. `load` counts slots with a weight.

    The importance is `sigmoid(z + h v + c)`, where v and c (`importance_head`) start at zero and
    `z` is how much the token stands out: its cosine distance from the mean direction of the row's
    real tokens, standardised over the row. `z` needs no training, and scaling the hidden states
    does not change it. A lone token has importance 0.5.

    Parameters
    ----------
    *args, **options
        As in `BaseMoERouter`; `top_k` is the most experts that a token can consult.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.importance_head = nn.Linear(self.hidden_size, 1)
        nn.init.zeros_(self.importance_head.weight)
        nn.init.zeros_(self.importance_head.bias)

    def _rate(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # One op for the gate's projection, that of the importance, and what stands out.
        head, dtype = self.importance_head, hidden_states.dtype
        weight = torch.cat([self.gate.weight, head.weight]).to(dtype)
        projected, standout = ops.project_tokens(hidden_states, weight, mask, backend=self.backend)
        logits = projected[..., :-1] + (self.gate.bias + self.prior)
        importance = standout + (projected[..., -1] + head.bias)
        importance = importance.nan_to_num(nan=0.0).sigmoid()
        return logits, importance if mask is None else importance.masked_fill(~mask, 0.0)


class PiKVMoERouter(AdaptiveRouter):
    """Adaptive gating that prefers the experts whose choices were used.

    The exponential moving average of the measured cache hit rates sets the selection bias: each
    expert's average minus the mean over the experts, times `history_weight`. The bias moves the
    choice of experts, not their weights (as in the auxiliary-loss-free balancing of Wang et al.,
    2024). It changes at every `cache_update_interval`-th update, so that routing is steady in
    between.

    Parameters
    ----------
    cache_aware : bool
        False: the history is neither kept nor used.
    cache_update_interval : int
        Updates of the history per change of the bias; >= 1.
    history_decay : float
        Share of the old average that an update keeps, in [0, 1).
    history_weight : float
        How much probability one unit of hit rate is worth; >= 0.
    *args, **options
        As in `AdaptiveRouter`.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """

    hit_rate_ema: Tensor
    history_bias: Tensor
    num_updates: Tensor

    def __init__(
        self,
        *args: Any,
        cache_aware: bool = True,
        cache_update_interval: int = 4,
        history_decay: float = 0.9,
        history_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if cache_update_interval < 1:
            raise ValueError(f"expected cache_update_interval >= 1, got {cache_update_interval}")
        if not 0 <= history_decay < 1:
            raise ValueError(f"expected history_decay in [0, 1), got {history_decay}")
        if not (history_weight >= 0 and math.isfinite(history_weight)):
            raise ValueError(f"expected a finite history_weight >= 0, got {history_weight}")
        self.cache_aware = cache_aware
        self.cache_update_interval = cache_update_interval
        self.history_decay = history_decay
        self.history_weight = history_weight
        self.register_buffer("hit_rate_ema", torch.zeros(self.num_experts))
        self.register_buffer("history_bias", torch.zeros(self.num_experts))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update_history(self, hit_rates: Tensor) -> None:
        """Take the measured cache hit rates into the moving average; stays on the device.

        Parameters
        ----------
        hit_rates : Tensor
            `[E]`, each in [0, 1] (clamped); NaN for an expert that was not measured, whose average
            stays. The first update sets the average.

        Raises
        ------
        ValueError
            If the shape is not `[E]`.
        """
        if hit_rates.shape != (self.num_experts,):
            raise ValueError(
                f"expected hit_rates [{self.num_experts}], got {list(hit_rates.shape)}"
            )
        if not self.cache_aware:
            return
        ema = self.hit_rate_ema
        rates = hit_rates.to(ema).clamp(0, 1)
        rates = torch.where(rates.isnan(), ema, rates)
        ema.copy_(torch.where(self.num_updates == 0, rates, rates.lerp(ema, self.history_decay)))
        self.num_updates += 1
        bias = self.history_weight * (ema - ema.mean())
        due = self.num_updates % self.cache_update_interval == 0
        self.history_bias.copy_(torch.where(due, bias, self.history_bias))

    def _history_bias(self) -> Tensor | None:
        return self.history_bias if self.cache_aware else None


class EPLBRouter(BaseMoERouter):
    """Gating with exactly balanced loads.

    Guarantee: within each row the loads of any two experts differ by at most 1, whatever the hidden
    states; the experts with the highest total probability (ties to the lower) take the remainder.
    Balance is per row because a row's routing must not depend on its batch.

    Algorithm: balanced top-k is an assignment problem, maximise the total probability of the chosen
    experts with k experts per token and a fixed load per expert. Its dual variables are one
    selection bias per expert. `balance_rounds` sweeps of coordinate descent set each expert's bias
    to where the wanted number of tokens would choose it. A final sweep assigns: expert after expert
    takes exactly its load of tokens, those first that have no other expert left, then those whose
    biased probability exceeds their best alternative by most. Where the biases have converged that
    is the optimum; where they have not, and where tokens are equal, the balance still holds. Equal
    tokens are taken in the order of the golden-ratio sequence of their position, so every expert
    gets tokens from all over the row.

    The bias moves the choice, not the weights. The auxiliary loss is the Switch loss of the choice
    without balancing: the imbalance that balancing had to correct.

    Parameters
    ----------
    balance_rounds : int
        Sweeps of the dual descent, >= 0. More sweeps cost time and gain total probability.
    *args, **options
        As in `BaseMoERouter`.

    Raises
    ------
    ValueError
        If `balance_rounds` is negative.

    References
    ----------
    Lewis et al., BASE Layers, ICML 2021 (balanced assignment); Wang et al., Auxiliary-Loss-Free
    Load Balancing, 2024 (selection bias).
    """

    def __init__(self, *args: Any, balance_rounds: int = 4, **options: Any) -> None:
        super().__init__(*args, **options)
        if balance_rounds < 0:
            raise ValueError(f"expected balance_rounds >= 0, got {balance_rounds}")
        self.balance_rounds = balance_rounds

    def _choose(self, logits: Tensor, mask: Tensor | None, importance: Tensor | None) -> Gate:
        free = self._gate(logits, mask, self.top_k)
        balance_loss = self._balance_loss(_mean(free.prob_sum, mask, logits), free.load)
        probs = _probabilities(logits, self.temperature, mask)
        real = torch.ones_like(probs[..., 0], dtype=torch.bool) if mask is None else mask
        chosen = self._assign(probs.detach(), real)
        # Most probable first, ties to the lower expert; padding gets experts 0 ... k-1.
        ranked = probs.detach().masked_fill(~chosen, -1)
        experts = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        weights = probs.gather(-1, experts)
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / total.where(total > 0, 1), 1 / self.top_k)
        weights = weights * real[..., None]
        load = chosen.sum((0, 1))
        return Gate(weights, experts.int(), load, free.entropy, balance_loss)

    def _assign(self, probs: Tensor, real: Tensor) -> Tensor:
        """Choose k experts for every real token with balanced loads; `[B, T, E]` bool."""
        if self.top_k == self.num_experts:
            return real[..., None].expand_as(probs)
        # In golden-ratio order every prefix of a row is spread over it, so stable sorts break ties
        # evenly: Weyl's sequence in exact integer arithmetic.
        position = real.long().cumsum(1) - 1
        order = (position * 2654435769 % 2**32).argsort(1)[..., None].expand_as(probs)
        probs = probs.gather(1, order)
        real = real.gather(1, order[..., 0])

        num_real = real.sum(1, keepdim=True)
        num_slots = num_real * self.top_k
        demand = probs.sum(1).argsort(dim=-1, descending=True, stable=True)
        takes_remainder = demand.argsort(-1) < num_slots % self.num_experts
        load = num_slots // self.num_experts + takes_remainder  # [B, E]

        bias = torch.zeros_like(probs[:, 0])
        for _ in range(self.balance_rounds):
            for e in range(self.num_experts):
                margin = self._margin(probs + bias[:, None], e).masked_fill(~real, -torch.inf)
                margin = margin.sort(dim=1, descending=True).values
                wanted = load[:, e : e + 1]
                last_in = margin.gather(1, (wanted - 1).clamp(min=0))
                first_out = margin.gather(1, torch.minimum(wanted, num_real - 1).clamp(min=0))
                bias[:, e : e + 1] -= (last_in + first_out) / 2

        biased = probs + bias[:, None]
        missing = self.top_k * real.long()
        rank = torch.arange(real.shape[1], device=real.device)
        chosen = torch.zeros_like(biased, dtype=torch.bool)
        for e in range(self.num_experts):
            # Loads that differ by at most 1 leave room for all tokens without an alternative, and
            # enough tokens that still miss an expert, so the balance cannot fail.
            margin = self._margin(biased, e)
            margin = margin.masked_fill(missing == self.num_experts - e, torch.inf)
            margin = margin.masked_fill(missing == 0, -torch.inf)
            first = margin.argsort(dim=1, descending=True, stable=True)
            takes = torch.zeros_like(real).scatter(1, first, rank < load[:, e : e + 1])
            chosen[..., e] = takes
            missing = missing - takes.long()
        return torch.zeros_like(chosen).scatter(1, order, chosen)

    def _margin(self, biased: Tensor, expert: int) -> Tensor:
        """How far the expert is above (or below) each token's k-th best other expert, `[B, T]`."""
        best = biased.topk(self.top_k + 1, dim=-1).values
        inside, outside = best[..., -2], best[..., -1]
        own = biased[..., expert]
        return own - torch.where(own >= inside, outside, inside)


class HierarchicalRouter(BaseMoERouter):
    """Groups of experts first, then experts inside the chosen groups.

    A group's probability is the sum of its experts'. The `top_groups` best groups are kept, and the
    k best experts inside them are renormalised, ties to the lower group and expert. The
    auxiliary loss is the Switch loss of the groups plus that of the experts.

    Parameters
    ----------
    num_groups : int, optional
        Number of equal groups of neighbouring experts; divides `num_experts`. Default: the largest
        divisor that is not above its square root.
    top_groups : int, optional
        Groups per token. Default: as few as hold `top_k` experts.
    *args, **options
        As in `BaseMoERouter`.

    Raises
    ------
    ValueError
        If `num_groups` does not divide `num_experts`, or `top_groups` groups cannot hold `top_k`
        experts.

    References
    ----------
    DeepSeek-AI, DeepSeek-V2, 2024 (device-limited routing).
    """

    def __init__(
        self,
        *args: Any,
        num_groups: int | None = None,
        top_groups: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if num_groups is None:
            divisors = range(1, math.isqrt(self.num_experts) + 1)
            num_groups = max(n for n in divisors if self.num_experts % n == 0)
        if num_groups < 1 or self.num_experts % num_groups:
            raise ValueError(
                f"expected num_groups to divide num_experts = {self.num_experts}, got {num_groups}"
            )
        group_size = self.num_experts // num_groups
        fewest = -(-self.top_k // group_size)
        if top_groups is None:
            top_groups = fewest
        if not fewest <= top_groups <= num_groups:
            raise ValueError(
                f"expected top_groups between {fewest} and {num_groups} for {num_groups} groups of "
                f"{group_size} experts and top_k = {self.top_k}, got {top_groups}"
            )
        self.num_groups = num_groups
        self.top_groups = top_groups

    def _choose(self, logits: Tensor, mask: Tensor | None, importance: Tensor | None) -> Gate:
        grouped = logits.float().view(*logits.shape[:2], self.num_groups, -1)
        # gating_topk divides by the temperature again, so that groups get the sum of probabilities.
        group_logits = self.temperature * (grouped / self.temperature).logsumexp(-1)
        _, groups, group_prob_sum, group_load, _ = self._gate(group_logits, mask, self.top_groups)
        groups = groups.long().sort(-1).values  # ascending, so that ties go to the lower expert
        group_size = self.num_experts // self.num_groups
        members = groups[..., None] * group_size + torch.arange(group_size, device=groups.device)
        members = members.flatten(-2)  # [B, T, top_groups * group_size]
        weights, slots, *_ = self._gate(logits.gather(-1, members), mask, self.top_k)
        experts = members.gather(-1, slots.long())
        used = torch.ones_like(experts) if mask is None else mask[..., None].expand_as(experts)
        load = _count(experts, used, self.num_experts)
        probs = _probabilities(logits, self.temperature, mask)
        balance_loss = switch_loss(_mean(group_prob_sum, mask, logits), group_load) + switch_loss(
            _mean(probs.sum((0, 1)), mask, logits), load
        )
        entropy = torch.special.entr(probs.detach()).sum()
        return Gate(weights, experts.int(), load, entropy, balance_loss)


class SharedExpertRouter(BaseMoERouter):
    """Gating with an expert that every token consults, and others that are routed as usual.

    The shared expert comes first and has half of the weight; the routed ones share the other half
    between them as in `BaseMoERouter`, whose loss is theirs alone.

    Parameters
    ----------
    hidden_size : int
        Size of the hidden states.
    num_experts : int
        E, the routed experts.
    top_k : int
        Routed experts per token.
    **options
        As in `BaseMoERouter`.

    References
    ----------
    Dai et al., DeepSeekMoE, ACL 2024 (shared expert isolation).
    """

    def _route(self, hidden_states: Tensor, mask: Tensor | None) -> RouterOutput:
        # The outputs count 1 + E experts and 1 + k slots.
        routed = super()._route(hidden_states, mask)
        shape = routed.weights.shape[:2]
        say = routed.weights.new_full((*shape, 1), 0.5)
        num_tokens = routed.load.new_full((1,), shape[0] * shape[1])
        if mask is not None:
            say = say * mask[..., None]
            num_tokens = mask.sum().view(1)
        return _SharedOutput(
            logits=routed.logits,
            weights=torch.cat([say, routed.weights / 2], -1),
            experts=F.pad(routed.experts + 1, (1, 0)),
            aux_loss=routed.aux_loss,
            load=torch.cat([num_tokens, routed.load]),
            # Of two halves, and of p in one of them: that of halves, and half of that of p.
            entropy=num_tokens[0] * math.log(2) + routed.entropy / 2,
            importance=routed.importance,
            mask=mask,
            temperature=self.temperature,
        )


class _SharedOutput(RouterOutput):
    """Of a `SharedExpertRouter`, whose logits are those of the routed experts."""

    @cached_property
    def probs(self) -> Tensor:
        routed = _probabilities(self.logits, self.temperature, self.mask) / 2
        return torch.cat([routed.sum(-1, keepdim=True), routed], -1)


ROUTERS: dict[str, type[BaseMoERouter]] = {
    "base": BaseMoERouter,
    "topk_balanced": TopKBalancedRouter,
    "adaptive": AdaptiveRouter,
    "pikv": PiKVMoERouter,
    "eplb": EPLBRouter,
    "hierarchical": HierarchicalRouter,
}


def make_router(
    router_type: str, hidden_size: int, num_experts: int, top_k: int = 2, **options: Any
) -> BaseMoERouter:
    """Build a router by name.

    Parameters
    ----------
    router_type : str
        A key of `ROUTERS`.
    hidden_size, num_experts, top_k
        As in `BaseMoERouter`.
    **options
        Keyword arguments of the router's class.

    Returns
    -------
    BaseMoERouter

    Raises
    ------
    ValueError
        If the name is unknown or an argument is out of its range.
    """
    if router_type not in ROUTERS:
        raise ValueError(f"expected router_type among {', '.join(ROUTERS)}, got {router_type!r}")
    return ROUTERS[router_type](hidden_size, num_experts, top_k, **options)
