"""What a press thinks of a layer: view → router → experts → mixed scores."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekv import ops
from moekv.budget import kept_pairs, select
from moekv.calibration.router import CalibratedGate, CalibratedRouter, shipped_router
from moekv.experts.base import Expert, scores_by
from moekv.experts.expected import ExpectedExpert
from moekv.experts.registry import build_experts, expert_names
from moekv.experts.scorer import PressExpert
from moekv.experts.view import LayerView
from moekv.models.fingerprint import TOLERANCE, short
from moekv.models.hooks import index_of
from moekv.ops import ScoreKind
from moekv.press.memory import Routers
from moekv.press.options import Options, Routing, check_able
from moekv.press.stats import Observation
from moekv.routing.base import BaseMoERouter, RouterOutput
from moekv.routing.mixing import common_scale, together
from moekv.routing.registry import make_router
from moekv.routing.shared import SharedExpertRouter

ROUTED_SAY = 0.4
"""What a standard deviation of a routed expert's scores weighs against a factor e of attention."""


@dataclass
class Look:
    """A layer that is still to be rated, without the tensors that are too large to hold."""

    view: LayerView
    router: BaseMoERouter
    routed: RouterOutput | None  # None: by a calibrated router, from what it has read
    scores: list[Tensor | None]  # [B, H, T] fp32 each, of the experts that do not wait

    @property
    def alike(self) -> tuple[Any, ...]:
        """What layers that are rated together have in common."""
        view = self.view
        keys = view.keys.shape, view.keys.device
        return *keys, view.lengths, view.begins, view.ends, view.hidden_states.shape[:2]


@dataclass
class Rating:
    """One layer's scores, and what it takes to act on them."""

    index: int  # of the layer
    scores: Tensor  # [B, H, T] fp32, those that decide
    ruling: Tensor | None  # scalar, the dominant expert
    start: Tensor | None
    lengths: tuple[int, ...]
    begins: bool
    ends: bool
    seen: Observation  # of all layers that were rated with it

    def for_heads(self, num_heads: int, *, mixes: bool) -> Rating:
        """Give the rating for so many heads of a cache; all alike where their layer mixes them."""
        if not mixes:
            return self
        together = self.scores.mean(1, keepdim=True)
        return replace(self, scores=together.expand(-1, num_heads, -1).contiguous())


class Rater:
    """Rates the layers of one model.

    Parameters
    ----------
    routing : Routing
    config : PreTrainedConfig
        Of the model's text decoder.
    calibrated : CalibratedRouter, optional
        Brings its own experts and gates.
    distance : float
        Of the model's weights from those that it was fitted to.
    """

    def __init__(
        self,
        routing: Routing,
        config: Any,
        calibrated: CalibratedRouter | None = None,
        distance: float = 0.0,
    ) -> None:
        self.routing = routing
        self.calibrated = calibrated
        self.distance = distance
        self.routers = Routers()
        self._own = _experts_for(routing, config)

    def __getstate__(self) -> dict[str, Any]:
        """Take copies of the routers."""
        return self.__dict__ | {"routers": copy.copy(self.routers)}

    @classmethod
    def of_model(cls, routing: Routing, model: PreTrainedModel, config: Any) -> Rater:
        """Make one, with the calibrated router that there is to be for a model.

        Raises
        ------
        ValueError
            The calibrated router that was asked for is another model's.
        """
        calibrated, distance = routing.calibrated, 0.0
        if calibrated == "auto":
            calibrated, distance = shipped_router(model)
        elif isinstance(calibrated, CalibratedRouter):
            distance = calibrated.check(model)
        assert not isinstance(calibrated, str)
        rater = cls(routing, config, calibrated, distance)
        for expert in rater.experts:
            if isinstance(expert, PressExpert) and hasattr(expert.press, "post_init_from_model"):
                expert.press.post_init_from_model(model)
        return rater

    @property
    def experts(self) -> Sequence[Expert]:
        """Those that rate."""
        return self._own if self.calibrated is None else self.calibrated.experts

    @property
    def names(self) -> list[str]:
        """Names of the experts."""
        return [expert.name for expert in self.experts]

    @property
    def router_name(self) -> str:
        """Which kind of router is at work, and for which model it was calibrated."""
        return name_router(self.routing, self.calibrated, self.distance)

    @property
    def expects(self) -> bool:
        """Whether an expert asks the text's own queries again."""
        return any(isinstance(expert, ExpectedExpert) for expert in self.experts)

    @property
    def borrows(self) -> bool:
        """Whether an expert is a kvpress scorer, which looks for things on attention layers."""
        return any(isinstance(expert, PressExpert) for expert in self.experts)

    @property
    def comparable(self) -> bool:
        """Whether mixed scores are on one scale over all heads and layers."""
        if self.calibrated is not None or not self.routing.own_choice:
            return True
        return all(expert.comparable for expert in self.experts)

    @property
    def kinds(self) -> list[ScoreKind]:
        """What the experts ask of a view."""
        return sorted(set().union(*(expert.kinds for expert in self.experts)))

    def see_unknown_tokens(self) -> None:
        """Do without a calibrated router, which cannot rate them, if nobody asked for it.

        Raises
        ------
        RuntimeError
            It was asked for, or has rated before.
        """
        if self.calibrated is None:
            return
        if self.routing.calibrated != "auto" or self.routers:
            raise RuntimeError(
                "expected a cache whose tokens have all been fed in a block of this press, as a "
                "calibrated router reads each when it comes, got one with others; pass router=None"
            )
        self.calibrated = None

    # --- Looking ----------------------------------------------------------------------------------

    @torch.no_grad()
    def look(self, view: LayerView) -> Look:
        """Take of a view all that needs its hidden states and queries, and let these go."""
        router = self.routers.of(view.module, lambda: self._make_router(view))
        routed = None
        if self.calibrated is None:
            routed = router(view.hidden_states, view.token_mask)
        else:
            view.read = self.calibrated.project(index_of(view.module), view.hidden_states)
        scores = [None if expert.waits else scores_by(expert, view) for expert in self.experts]
        if view.aligned and self.expects:
            view.expected()
        view.observed()
        return Look(view.released(), router, routed, scores)

    def _make_router(self, view: LayerView) -> BaseMoERouter:
        states, routing = view.hidden_states, self.routing
        if self.calibrated is not None:
            return self.calibrated.gate(index_of(view.module), states, backend=routing.backend)
        hidden_size = states.shape[-1]
        router: BaseMoERouter
        if not routing.own_choice:
            prior = [expert.prior for expert in self._own[1:]]
            router = SharedExpertRouter(
                hidden_size, len(prior), routing.top_k, prior=prior, backend=routing.backend
            ).freeze()
        elif isinstance(routing.router_type, BaseMoERouter):
            router = copy.deepcopy(routing.router_type)
            router.backend = routing.backend
        else:
            aware = {"cache_aware": routing.cache_aware} if routing.router_type == "pikv" else {}
            router = make_router(
                routing.router_type,
                hidden_size,
                len(self._own),
                routing.top_k,
                prior=[expert.prior for expert in self._own],
                backend=routing.backend,
                **aware,
            )
        router = router.to(states.device, states.dtype).eval()
        return router.requires_grad_(False)

    # --- Rating -----------------------------------------------------------------------------------

    @torch.no_grad()
    def rate(
        self, looks: Sequence[Look], options: Options, alone: Sequence[int] | None = None
    ) -> list[Rating]:
        """Rate layers, those that are alike at once.

        In each row an expert alone would keep as many pairs as `alone` says, or its own number.
        """
        ratings: list[Rating] = []
        for _, alike in groupby(looks, key=lambda look: look.alike):
            ratings += self._rate_alike(list(alike), options, alone)
        return ratings

    def _rate_alike(
        self, looks: list[Look], options: Options, alone: Sequence[int] | None
    ) -> list[Rating]:
        view = looks[0].view
        num_experts, num_layers = len(self.experts), len(looks)
        batch, num_heads, num_keys = view.keys.shape[:3]
        routed = [self._routed(look) for look in looks]
        by_expert = [
            scores_by(expert, look.view) if (known := look.scores[e]) is None else known
            for e, expert in enumerate(self.experts)
            for look in looks
        ]
        # The layers are further rows of the batch, so that each step is one operation for all.
        scores = torch.cat(by_expert).view(num_experts, num_layers * batch, num_heads, num_keys)
        del by_expert
        hit_rates = self._hit_rates(looks, scores, options, alone)
        ruling: Sequence[Tensor | None] = [None] * num_layers
        if options.policy == "dominant":
            decisive, shares, ruling = _rule(view, scores, routed)
        else:
            decisive, shares = self._mix(looks, scores, routed)
        seen = Observation(
            num_tokens=sum(
                min(n, view.hidden_states.shape[1]) for n in view.lengths[:: view.folded]
            ),
            load=torch.stack([r.load for r in routed]),
            entropy=torch.stack([r.entropy for r in routed]),
            aux_loss=torch.stack([r.aux_loss for r in routed]),
            shares=torch.stack(shares),
            hit_rates=hit_rates.mT,
        )
        row = view.start, view.lengths, view.begins, view.ends, seen
        return [
            Rating(index_of(look.view.module), scores_, ruler, *row)
            for look, scores_, ruler in zip(looks, decisive, ruling, strict=True)
        ]

    def _routed(self, look: Look) -> RouterOutput:
        if look.routed is not None:
            return look.routed
        gate, read = look.router, look.view.read
        assert isinstance(gate, CalibratedGate) and read is not None
        return gate.decide(read, look.view.token_mask)

    def _mix(
        self, looks: Sequence[Look], scores: Tensor, routed: Sequence[RouterOutput]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Mixed scores [B, H, T] of each layer, and each expert's share in them [B, T, E]."""
        view = looks[0].view
        weights, chosen, shares = zip(*(self._weights(view, r) for r in routed), strict=True)
        gain, offset = self._scale(looks, scores)
        mixed = ops.mix_scores(
            scores,
            together(weights),
            together(chosen),
            gain,
            offset,
            backend=self.routing.backend,
        )
        return list(torch.split(mixed, len(view.keys))), list(shares)

    def _weights(self, view: LayerView, routed: RouterOutput) -> tuple[Tensor, Tensor, Tensor]:
        """Gate weights and experts [B, T, k] of the pairs, and each expert's share [B, T, E]."""
        weights, chosen, shares = routed.weights, routed.experts, routed.shares
        if view.aligned:
            return weights, chosen, shares
        # Not every pair's token is known: all are mixed as the known ones are on average.
        able = [expert.can_rate(view) for expert in self.experts]
        check_able(self.experts, any(able))
        total = shares.sum(1, keepdim=True).repeat_interleave(view.folded, 0)
        # A little for all that can rate, in case that tokens chose none of them.
        total = total + 1e-6
        for index, can in enumerate(able):
            if not can:
                total[..., index].zero_()
        shares = (total / total.sum(-1, keepdim=True)) * view.real[..., None]
        chosen = torch.arange(len(able), dtype=torch.int32, device=total.device)
        return shares.contiguous(), chosen.expand(shares.shape).contiguous(), shares

    def _scale(self, looks: Sequence[Look], scores: Tensor) -> tuple[Tensor, Tensor]:
        """Affine maps of the experts' scores [E, L * B, H, T] to one scale: gain, offset."""
        view = looks[0].view
        if self.calibrated is None:
            real = None if view.start is None else view.real.repeat(len(looks), 1)
            gain, offset = common_scale([e.comparable for e in self.experts], scores, real)
            if not self.routing.own_choice:
                gain[1:] *= ROUTED_SAY
                offset[1:] *= ROUTED_SAY
            return gain, offset
        indices = [index_of(look.view.module) for look in looks]
        gain, offset = self.calibrated.scale(indices, scores.device)  # [E, L, H]
        if view.folded > 1:
            return gain[:, 0, view.heads], offset[:, 0, view.heads]
        batch = len(view.keys)
        if batch > 1:
            gain, offset = gain.repeat_interleave(batch, 1), offset.repeat_interleave(batch, 1)
        return gain, offset

    def _hit_rates(
        self,
        looks: Sequence[Look],
        scores: Tensor,
        options: Options,
        alone: Sequence[int] | None,
    ) -> Tensor:
        """Share [E, L] of the observed attention on what each expert alone would keep.

        Parameters
        ----------
        looks : sequence of L Look
            Layers that are alike.
        scores : Tensor [E, L * B, H, T], float32
        options : Options
        alone : sequence of B ints, optional
            Pairs that an expert alone keeps in each row.
        """
        first, num_layers = looks[0].view, len(looks)
        num_experts, batch = len(self.experts), len(first.keys)
        num_heads, num_keys = scores.shape[2:]
        sinks, recent = protected(first, options)
        totals = [alone or kept_alone(expert, first.lengths, options) for expert in self.experts]
        (kept,) = select(  # all experts of all layers at once, as further rows of the batch
            [scores.flatten(0, 1)],
            None if first.start is None else first.start.repeat(num_experts * num_layers),
            [total for rows in totals for total in num_layers * list(rows)],
            sinks=sinks,
            recent=recent,
            backend=self.routing.backend,
        )
        mass = together([look.view.observed() for look in looks]).flatten()  # for all experts
        heads = batch * num_heads
        if kept.per_head is not None:
            begin = torch.arange(
                0, num_layers * heads * num_keys, num_keys, dtype=torch.int32, device=mass.device
            )
            rows = kept.indices.view(num_experts, -1, kept.per_head) + begin[:, None]
            hits = mass.index_select(0, rows.flatten()).view(num_experts, num_layers, -1).sum(-1)
        else:
            sizes = [num_heads * sum(rows) for rows in totals for _ in looks]
            parts = torch.split(mass.index_select(0, kept.rows() % len(mass)), sizes)
            hits = torch.stack([part.sum() for part in parts]).view(num_experts, num_layers)
        return (hits / heads).clamp(max=1)


def name_router(
    routing: Routing, calibrated: CalibratedRouter | None, distance: float = 0.0
) -> str:
    """Say which kind of router is at work, for which model, and how far its weights were."""
    if calibrated is None:
        kind = routing.router_name if routing.own_choice else "shared expert"
        return f"{kind}, not calibrated"
    name = f"calibrated for {calibrated.recipe.get('model_name', short(calibrated.model))}"
    if distance == 0:
        return name
    return f"{name}, whose weights are at a distance of {distance:.2g} ({TOLERANCE:g} allowed)"


def kept_alone(expert: Expert, lengths: Sequence[int], options: Options) -> list[int]:
    """Count the pairs that an expert alone keeps in each row."""
    ratio = options.compression_ratio
    if options.policy == "mixture":
        return [kept_pairs(n, ratio) for n in lengths]
    return [min(max(expert.kept(n, ratio), 1), max(n, 1)) for n in lengths]


def protected(view: LayerView | Rating, options: Options) -> tuple[int, int]:
    """Sinks and recent positions that stay in any case; in a chunk those that it really has."""
    if options.policy == "dominant":
        return 0, 0
    return options.sinks if view.begins else 0, options.recent if view.ends else 0


def _experts_for(routing: Routing, config: Any) -> Sequence[Expert]:
    if routing.experts is not None:
        return routing.experts
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    wanted = int(config.num_hidden_layers * heads).bit_length() - 1
    return build_experts(expert_names()[: max(wanted, routing.top_k)])


def _rule(
    view: LayerView, scores: Tensor, routed: Sequence[RouterOutput]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Scores [B, H, T] of each layer's dominant expert, shares [B, T, E], and its number."""
    rulers = [r.probs.sum((0, 1)).argmax() for r in routed]
    layers = torch.split(scores, len(view.keys), dim=1)
    numbers = torch.arange(len(scores), device=scores.device)
    return (
        [s.index_select(0, ruler[None])[0] for s, ruler in zip(layers, rulers, strict=True)],
        [(view.real[..., None] & (numbers == ruler)).float() for ruler in rulers],
        rulers,
    )
