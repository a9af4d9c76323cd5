"""What a press thinks of a layer: view → router → experts → votes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekv.cache.rows import gain, storable
from moekv.calibration.router import CalibratedGate, CalibratedRouter, shipped_router
from moekv.experts.base import Expert, scores_by
from moekv.experts.expected import ExpectedExpert
from moekv.experts.registry import build_experts, expert_names
from moekv.experts.scorer import PressExpert
from moekv.experts.view import LayerView
from moekv.models.fingerprint import TOLERANCE, short
from moekv.models.hooks import index_of, option
from moekv.ops import ScoreKind
from moekv.press import mixture
from moekv.press.hits import hit_rates, kept_alone
from moekv.press.later import packed
from moekv.press.memory import Routers
from moekv.press.mixture import Part
from moekv.press.options import Options, Routing
from moekv.press.rating import Look, Rating, protected
from moekv.press.stats import Observation
from moekv.routing.base import BaseMoERouter, RouterOutput
from moekv.routing.evidence import is_silent, standardise, together
from moekv.routing.mixing import Votes
from moekv.routing.registry import make_router


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
    def shared(self) -> Sequence[Expert]:
        """Those that every token consults: one, or those of a calibrated router, or none."""
        if self.calibrated is not None:
            return self.calibrated.experts
        shared = self.routing.shared
        return () if shared is None else (shared,)

    @property
    def routed(self) -> Sequence[Expert]:
        """Those that are routed: none beside a calibrated router that nobody asked more of."""
        return () if self.calibrated is not None and not self.routing.own_choice else self._own

    @property
    def experts(self) -> Sequence[Expert]:
        """Those that rate: the shared ones first."""
        return (*self.shared, *self.routed)

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
    def compares(self) -> bool:
        """Whether what is said of different heads differs by more than their picks."""
        voters = len(self.routed) + bool(self.shared)
        return voters > 1 or self.calibrated is not None or self.experts[0].comparable

    def history(self) -> dict[int, dict[str, float]]:
        """By how much history moves the choice of each routed expert, in units of probability.

        By layer, for routers that have one. Waits for the device.
        """
        names = [expert.name for expert in self.routed]
        return {
            index: dict(zip(names, bias.tolist(), strict=True))
            for index, bias in self.routers.biases().items()
        }

    @property
    def kinds(self) -> list[ScoreKind]:
        """What the experts ask of a view."""
        return sorted(set().union(*(expert.kinds for expert in self.experts)))

    @property
    def reader(self) -> str | None:
        """Who notes what it reads of tokens: the calibrated router, if there is one."""
        return None if self.calibrated is None else self.calibrated.reader

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
                "calibrated router reads each when it comes, got one with others, or which another "
                "router has read; pass router=None"
            )
        self.calibrated = None

    # --- Looking ----------------------------------------------------------------------------------

    @torch.no_grad()
    def look(self, view: LayerView) -> Look:
        """Take of a view all that needs its hidden states and queries, and let these go."""
        router = self.routers.of(view.module, lambda: self._make_router(view))
        rated = None
        if self.routed:
            rated = router.rate(view.hidden_states, view.token_mask)
        if self.calibrated is not None:
            view.read = self.calibrated.project(index_of(view.module), view.hidden_states)
        scores = [None if expert.waits else scores_by(expert, view) for expert in self.experts]
        if view.aligned and self.expects:
            view.expected()
        view.observed()
        return Look(view.released(), router, rated, scores)

    def _gate(self, view: LayerView, like: Tensor | None) -> CalibratedGate:
        assert self.calibrated is not None and like is not None
        index, backend = index_of(view.module), self.routing.backend
        return self.calibrated.gate(index, like, backend=backend)

    def _make_router(self, view: LayerView) -> BaseMoERouter:
        states, routing = view.hidden_states, self.routing
        if not self.routed:
            return self._gate(view, states)
        router: BaseMoERouter
        if isinstance(routing.router_type, BaseMoERouter):
            router = copy.deepcopy(routing.router_type)
            router.backend = routing.backend
        else:
            aware = {"cache_aware": routing.cache_aware} if routing.router_type == "pikv" else {}
            router = make_router(
                routing.router_type,
                states.shape[-1],
                len(self._own),
                routing.top_k,
                backend=routing.backend,
                **aware,
            )
        return router.to(states.device, states.dtype).eval().requires_grad_(False)

    # --- Rating -----------------------------------------------------------------------------------

    @torch.no_grad()
    def rate(
        self,
        looks: Sequence[Look],
        options: Options,
        alone: Sequence[int] | None = None,
        *,
        goes_on: bool = False,
    ) -> list[Rating]:
        """Rate layers, those that are alike at once.

        In each row an expert alone would keep as many pairs as `alone` says, or its own number.
        Texts that go on have been rated before.
        """
        ratings: list[Rating] = []
        for _, alike in groupby(looks, key=lambda look: look.alike):
            ratings += self._rate_alike(list(alike), options, alone, goes_on=goes_on)
        return ratings

    def _rate_alike(
        self, looks: list[Look], options: Options, alone: Sequence[int] | None, *, goes_on: bool
    ) -> list[Rating]:
        views = [look.view for look in looks]
        view, num_layers = views[0], len(looks)
        num_experts = len(self.experts)
        batch, num_heads, num_keys = view.keys.shape[:3]
        by_expert = [
            scores_by(expert, look.view) if (known := look.scores[e]) is None else known
            for e, expert in enumerate(self.experts)
            for look in looks
        ]
        # The layers are further rows of the batch, so that each step is one operation for all.
        scores = torch.cat(by_expert).view(num_experts, num_layers * batch, num_heads, num_keys)
        del by_expert
        if options.quantises:
            able = together([storable(view.keys, view.values) for view in views])
            scores = scores.masked_fill(~able, torch.nan)
        stored = gain(options.pairs, view.keys, view.values)
        totals = [
            alone or kept_alone(expert, view.lengths, options, stored) for expert in self.experts
        ]
        sinks, recent = protected(view, options)
        rates, alone_kept = hit_rates(
            views, scores, totals, sinks=sinks, recent=recent, backend=self.routing.backend
        )
        num_real = max(sum(view.lengths), 1)
        shares = [min(sum(rows) / num_real, 1.0) for rows in totals]
        real = None if view.start is None else view.real.repeat(num_layers, 1)
        alike = standardise(scores[len(self.shared) :], real)
        part, given = self._mix(looks, scores, alike, rates, shares, goes_on=goes_on)
        votes: list[Votes] = _votes(part, num_layers)
        ruling: Sequence[Tensor | None] = [None] * num_layers
        if options.policy == "dominant":
            votes, part.weights, ruling = _rule(views, scores, given)
        weights = part.weights.view(num_layers, batch, num_keys, num_experts)
        seen = Observation(
            num_tokens=sum(
                min(n, view.hidden_states.shape[1]) for n in view.lengths[:: view.folded]
            ),
            load=part.load,
            entropy=part.entropy,
            aux_loss=part.aux_loss,
            shares=weights,
            hit_rates=rates.mean(-1).mT,
            silent=torch.cat([self._silent_shared(scores, real), is_silent(alike)]),
        )
        wanted: Sequence[Tensor | None] = [None] * num_layers
        if self.routed and any(look.router.history is not None for look in looks):
            bits = packed(alone_kept.mask().view(num_experts, -1, num_heads, num_keys))
            wanted = wanted if bits is None else bits.chunk(num_layers)
        row = view.start, view.lengths, view.begins, view.ends, seen, stored
        return [
            Rating(index_of(look.view.module), said, ruler, *row, wants)
            for look, said, ruler, wants in zip(looks, votes, ruling, wanted, strict=True)
        ]

    def _silent_shared(self, scores: Tensor, real: Tensor | None) -> Tensor:
        """Say whether shared experts say nothing: one of the user's own may."""
        if self.calibrated is None and not all(expert.finite for expert in self.shared):
            return is_silent(standardise(scores[: len(self.shared)], real))
        return torch.zeros(len(self.shared), dtype=torch.bool, device=scores.device)

    def _mix(
        self,
        looks: Sequence[Look],
        scores: Tensor,
        alike: Tensor,
        rates: Tensor,
        kept_shares: Sequence[float],
        *,
        goes_on: bool,
    ) -> tuple[Part, Sequence[RouterOutput]]:
        """Make one part of what all experts [E, L * B, H, T] say; and what the routers said.

        `alike` are the standardised scores of the routed ones.
        """
        views, backend = [look.view for look in looks], self.routing.backend
        num_shared = len(self.shared)
        parts: list[Part] = []
        given: list[RouterOutput] = []
        if self.calibrated is not None:
            gates = [self._gate(look.view, look.view.read) for look in looks]
            parts.append(
                mixture.calibrated(views, self.calibrated, gates, scores[:num_shared], backend)
            )
        elif self.shared and self.shared[0].can_rate(views[0]):
            parts.append(mixture.one_for_all(views, self.shared[0], scores[:1]))
        if self.routed:
            rated = [look.rated for look in looks if look.rated is not None]
            given = mixture.route(
                views, self.routed, [x.router for x in looks], rated, alike,
                rates[num_shared:], kept_shares[num_shared:], goes_on=goes_on,
            )  # fmt: skip
            parts.append(mixture.routed(self.routed, given, scores[num_shared:], alike))
        if len(parts) == 2:
            return mixture.beside(*parts), given
        (part,) = parts
        if num_shared and self.routed:
            part = mixture.after_silent(num_shared, part)
        return part, given


def name_router(
    routing: Routing, calibrated: CalibratedRouter | None, distance: float = 0.0
) -> str:
    """Say which kind of router is at work, for which model, and how far its weights were."""
    name = f"{routing.router_name}, not calibrated"
    if calibrated is None:
        return name
    found = f"calibrated for {calibrated.recipe.get('model_name', short(calibrated.model))}"
    if distance:
        found += f", whose weights are at a distance of {distance:.2g} ({TOLERANCE:g} allowed)"
    return f"{found}; beside it {name}" if routing.own_choice else found


def _experts_for(routing: Routing, config: Any) -> Sequence[Expert]:
    if routing.experts is not None:
        return routing.experts
    depth = option(config, "num_hidden_layers") or 0  # not known: as few as may be
    heads = option(config, "num_key_value_heads") or option(config, "num_attention_heads") or 0
    wanted = int(sum(heads) if isinstance(heads, list) else depth * heads).bit_length() - 1
    names = [name for name in expert_names() if name != getattr(routing.shared, "name", None)]
    return build_experts(names[: max(wanted, routing.top_k)])


def _votes(part: Part, num_layers: int) -> list[Votes]:
    """Split what is said of several layers."""
    scores = part.scores.chunk(num_layers, 1)
    shares = part.shares.chunk(num_layers, 1)
    return [
        Votes(*pair, part.comparable, part.has_shared) for pair in zip(scores, shares, strict=True)
    ]


def _rule(
    views: Sequence[LayerView], scores: Tensor, given: Sequence[RouterOutput]
) -> tuple[list[Votes], Tensor, list[Tensor]]:
    """Votes of each layer's dominant expert, weights [L * B, T, E], and the expert's number."""
    view = views[0]
    rulers = [each.probs.sum((0, 1)).argmax() for each in given]
    layers = torch.split(scores, len(view.keys), dim=1)
    numbers = torch.arange(len(scores), device=scores.device)
    share = scores.new_ones(1, len(view.keys))
    return (
        [
            Votes(said.index_select(0, ruler[None]), share, (False,))
            for said, ruler in zip(layers, rulers, strict=True)
        ],
        torch.cat([(view.real[..., None] & (numbers == ruler)).float() for ruler in rulers]),
        rulers,
    )
