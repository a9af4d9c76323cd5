"""Rates layers: view → router → experts → votes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekv.cache.rows import gain, storable
from moekv.calibration.router import CalibratedGate, CalibratedRouter, shipped_router
from moekv.devices import send
from moekv.experts.base import Expert, scores_by
from moekv.experts.expected import ExpectedExpert
from moekv.experts.learned import LearnedExpert
from moekv.experts.registry import build_experts, expert_names
from moekv.experts.scorer import PressExpert
from moekv.experts.view import LayerView
from moekv.models.fingerprint import TOLERANCE, short
from moekv.models.hooks import experts_in, index_of, option, with_choice
from moekv.press import mixture
from moekv.press.hits import hit_rates, kept_alone
from moekv.press.later import packed
from moekv.press.memory import Routers
from moekv.press.mixture import Part
from moekv.press.options import Options
from moekv.press.rating import Rating, Unrated, protected
from moekv.press.routing import Routing
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
        Of the model's weights from those that the calibrated router was fitted to.
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
        """Return copies of the routers."""
        return self.__dict__ | {"routers": copy.copy(self.routers)}

    @classmethod
    def of_model(cls, routing: Routing, model: PreTrainedModel, config: Any) -> Rater:
        """Make one for a model, with its calibrated router if it has one.

        Raises
        ------
        ValueError
            The calibrated router in the options was fitted to another model, or a router reads the
            choice of other experts than the model has.
        """
        calibrated, distance = routing.calibrated, 0.0
        if calibrated == "auto":
            calibrated, distance = shipped_router(model)
        elif isinstance(calibrated, CalibratedRouter):
            distance = calibrated.check(model)
        assert not isinstance(calibrated, str)
        rater = cls(routing, config, calibrated, distance)
        if rater.choices and rater.choices != (found := experts_in(model)):
            raise ValueError(
                f"expected a model that is a mixture of {rater.choices} experts, whose choice the "
                f"router of the press reads, got one of {found}"
            )
        for expert in rater.experts:
            if isinstance(expert, PressExpert) and hasattr(expert.press, "post_init_from_model"):
                expert.press.post_init_from_model(model)
        return rater

    @property
    def shared(self) -> Sequence[Expert]:
        """The shared experts: one, or those of a calibrated router, or none."""
        if self.calibrated is not None:
            return self.calibrated.experts
        shared = self.routing.shared
        return () if shared is None else (shared,)

    @property
    def routed(self) -> Sequence[Expert]:
        """The routed experts: none beside a calibrated router, unless options choose some."""
        return () if self.calibrated is not None and not self.routing.own_choice else self._own

    @property
    def experts(self) -> Sequence[Expert]:
        """All experts: the shared ones first."""
        return (*self.shared, *self.routed)

    @property
    def stands_in(self) -> bool:
        """Whether the routed experts act only where the shared one cannot score.

        So it is where no option asks for routing: beside ``expected`` they are not worth their cost
        (docs/results-routers.md).
        """
        return bool(self.shared) and self.calibrated is None and not self.routing.own_choice

    def acting(self, view: LayerView) -> Sequence[Expert]:
        """Return the experts that rate a layer: all, or the shared one."""
        alone = self.stands_in and self.shared[0].can_rate(view)
        return self.shared if alone else self.experts

    @property
    def names(self) -> list[str]:
        """Names of the experts."""
        return [expert.name for expert in self.experts]

    @property
    def router_name(self) -> str:
        """The router in use, and the model it was calibrated for."""
        return name_router(self.routing, self.calibrated, self.distance)

    @property
    def observes(self) -> bool:
        """Whether what is retained after a prefill depends on the window's queries."""
        alone = self.stands_in or not self.routed
        blind = ExpectedExpert, LearnedExpert
        return not alone or any(type(expert) not in blind for expert in self.shared)

    @property
    def expects(self) -> bool:
        """Whether an expert needs the queries of all tokens (``expected``)."""
        return any(isinstance(expert, ExpectedExpert) for expert in self.experts)

    @property
    def reads_choice(self) -> bool:
        """Whether an expert or a gate reads the choice of the model's own routers."""
        return self.choices > 0 or any(expert.reads_choice for expert in self.experts)

    @property
    def choices(self) -> int:
        """Experts of the model whose weights a gate reads; 0: none does."""
        given = self.routing.router_type
        own = given.choices if self.routed and isinstance(given, BaseMoERouter) else 0
        return own or (0 if self.calibrated is None else self.calibrated.choices)

    @property
    def borrows(self) -> bool:
        """Whether an expert is a kvpress scorer, which reads attributes of attention layers."""
        return any(isinstance(expert, PressExpert) for expert in self.experts)

    @property
    def compares(self) -> bool:
        """Whether scores can be compared between heads."""
        voters = bool(self.shared) + (0 if self.stands_in else len(self.routed))
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
    def reader(self) -> str | None:
        """Digest of the calibrated router whose notes a growing cache holds; None: no router."""
        return None if self.calibrated is None else self.calibrated.reader

    def see_unknown_tokens(self) -> None:
        """Drop the package's calibrated router, which has not read some tokens of the cache.

        Raises
        ------
        RuntimeError
            The router was given as an option, or has scored before.
        """
        if self.calibrated is None:
            return
        if self.routing.calibrated != "auto" or self.routers:
            raise RuntimeError(
                "expected a cache whose tokens have all been fed in a block of this press, as a "
                "calibrated router reads each when it is fed, got one with other tokens, or of "
                "another router; pass router=None"
            )
        self.calibrated = None

    # --- Preparing --------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, view: LayerView) -> Unrated:
        """Compute all that needs hidden states and queries, so that these can be freed."""
        index = index_of(view.module)
        self.routers.meet(view.module, view.hidden_states.shape[-1])
        acting, router, rated = self.acting(view), None, None
        view.kinds = sorted(set().union(*(expert.kinds for expert in acting)))
        if len(acting) > len(self.shared):
            router = self.routers.of(index, lambda: self._make_router(view))
            states = with_choice(view.hidden_states, view.expert_choice, router.choices)
            rated = router.rate(states, view.token_mask)
        if self.calibrated is not None:
            view.read = self.calibrated.project(index, view.hidden_states, view.expert_choice)
        scores = [None if expert.waits else scores_by(expert, view) for expert in acting]
        if view.aligned and self.expects:
            view.expected()
        view.observed()
        return Unrated(view.released(), router, rated, scores)

    def _gate(self, view: LayerView, like: Tensor | None) -> CalibratedGate:
        assert self.calibrated is not None and like is not None
        index, backend = index_of(view.module), self.routing.backend
        return self.calibrated.gate(index, like, backend=backend)

    def _make_router(self, view: LayerView) -> BaseMoERouter:
        states, routing = view.hidden_states, self.routing
        router: BaseMoERouter
        if isinstance(routing.router_type, BaseMoERouter):
            router = copy.deepcopy(routing.router_type)
            router.backend = routing.backend
        else:
            aware = {"cache_aware": routing.cache_aware} if routing.router_type == "pikv" else {}
            with torch.device("cpu"):  # whatever the caller's default is
                router = make_router(
                    routing.router_type,
                    states.shape[-1],
                    len(self._own),
                    routing.top_k,
                    backend=routing.backend,
                    **aware,
                )
        router = router.to(states.dtype).eval().requires_grad_(False)
        first = next(router.parameters(), None)  # a user's router may have none
        if first is None or first.device == states.device:
            return router
        return router._apply(lambda number: send(number, states.device))

    # --- Rating -----------------------------------------------------------------------------------

    @torch.no_grad()
    def rate(
        self,
        unrated: Sequence[Unrated],
        options: Options,
        alone: Sequence[int] | None = None,
        *,
        goes_on: bool = False,
    ) -> list[Rating]:
        """Rate layers, those of equal sizes at once.

        `alone`: pairs that an expert alone would retain in each row, by default its own number.
        `goes_on`: the texts have been rated before.
        """
        ratings: list[Rating] = []
        for _, alike in groupby(unrated, key=lambda layer: layer.alike):
            ratings += self._rate_alike(list(alike), options, alone, goes_on=goes_on)
        return ratings

    def _rate_alike(
        self,
        unrated: list[Unrated],
        options: Options,
        alone: Sequence[int] | None,
        *,
        goes_on: bool,
    ) -> list[Rating]:
        views = [layer.view for layer in unrated]
        view, num_layers = views[0], len(unrated)
        experts = self.acting(view)
        num_experts = len(experts)
        batch, num_heads, num_keys = view.keys.shape[:3]
        by_expert = [
            scores_by(expert, layer.view) if (known := layer.scores[e]) is None else known
            for e, expert in enumerate(experts)
            for layer in unrated
        ]
        # The layers are further rows of the batch, so that each step is one operation for all.
        scores = torch.cat(by_expert).view(num_experts, num_layers * batch, num_heads, num_keys)
        del by_expert
        storables: Sequence[Tensor | None] = [None] * num_layers
        if options.quantises:
            able = together([storable(view.keys, view.values) for view in views])
            scores = scores.masked_fill(~able, torch.nan)
            storables = able.view(num_layers, -1).all(1).unbind()
        mass, ranks = together([view.observed() for view in views]), view.ranks
        if ranks.size > 1:  # from here on every process decides for all heads, and so alike
            joined = view.gathered(torch.cat([scores, mass[None]]))
            scores, mass = joined[:-1], joined[-1]
            parts = mass.chunk(num_layers)
            views = [own.of_all_heads(part) for own, part in zip(views, parts, strict=True)]
            view = views[0]
            unrated = [replace(one, view=whole) for one, whole in zip(unrated, views, strict=True)]
            batch, num_heads, num_keys = view.keys.shape[:3]
        stored = gain(options.pairs, view.keys, view.values, biased=options.folds)
        totals = [alone or kept_alone(expert, view.lengths, options, stored) for expert in experts]
        sinks, recent = protected(view, options)
        rates, alone_kept = hit_rates(
            views, scores, mass, totals, sinks=sinks, recent=recent, backend=self.routing.backend
        )
        num_real = max(sum(view.lengths), 1)
        shares = [min(sum(rows) / num_real, 1.0) for rows in totals]
        real = None if view.start is None else view.real.repeat(num_layers, 1)
        alike = standardise(scores[len(self.shared) :], real)
        part, given = self._mix(unrated, scores, alike, rates, shares, goes_on=goes_on)
        votes: list[Votes] = _votes(part, num_layers)
        dominant: Sequence[Tensor | None] = [None] * num_layers
        if options.policy == "dominant":
            votes, part.weights, dominant = _dominant_votes(views, scores, given)
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
        if len(alike) and any(layer.remembers for layer in unrated):
            bits = packed(alone_kept.mask().view(num_experts, -1, num_heads, num_keys))
            wanted = wanted if bits is None else bits.chunk(num_layers)
        row = view.start, view.lengths, view.begins, view.ends, seen, stored
        return [
            Rating(index_of(layer.view.module), each, number, *row, able, wants, ranks)
            for layer, each, number, able, wants in zip(
                unrated, votes, dominant, storables, wanted, strict=True
            )
        ]

    def _silent_shared(self, scores: Tensor, real: Tensor | None) -> Tensor:
        """Find shared experts whose scores are constant, NaN or infinite: a user's own may be."""
        if self.calibrated is None and not all(expert.finite for expert in self.shared):
            return is_silent(standardise(scores[: len(self.shared)], real))
        return torch.zeros(len(self.shared), dtype=torch.bool, device=scores.device)

    def _mix(
        self,
        unrated: Sequence[Unrated],
        scores: Tensor,
        alike: Tensor,
        rates: Tensor,
        kept_shares: Sequence[float],
        *,
        goes_on: bool,
    ) -> tuple[Part, Sequence[RouterOutput]]:
        """Make one part of the scores [E, L * B, H, T] of all experts; return it and the gates.

        `alike` are the standardised scores of the routed ones.
        """
        views, backend = [layer.view for layer in unrated], self.routing.backend
        num_shared = len(self.shared)
        parts: list[Part] = []
        given: list[RouterOutput] = []
        if self.calibrated is not None:
            gates = [self._gate(layer.view, layer.view.read) for layer in unrated]
            parts.append(
                mixture.calibrated(views, self.calibrated, gates, scores[:num_shared], backend)
            )
        elif self.shared and self.shared[0].can_rate(views[0]):
            parts.append(mixture.one_for_all(views, self.shared[0], scores[:1]))
        if len(alike):
            rated = [layer.rated for layer in unrated if layer.rated is not None]
            routers = [layer.router for layer in unrated if layer.router is not None]
            given = mixture.route(
                views, self.routed, routers, rated, alike,
                rates[num_shared:], kept_shares[num_shared:], goes_on=goes_on,
            )  # fmt: skip
            parts.append(mixture.routed(self.routed, given, scores[num_shared:], alike))
        if len(parts) == 2:
            return mixture.beside(*parts), given
        (part,) = parts
        if num_shared and given:
            part = mixture.after_silent(num_shared, part)
        return part, given


def name_router(
    routing: Routing, calibrated: CalibratedRouter | None, distance: float = 0.0
) -> str:
    """Name the router in use, the model it was calibrated for, and the distance of the weights."""
    name = f"{routing.router_name}, not calibrated"
    if calibrated is None:
        asks = routing.shared is None or routing.own_choice
        return name if asks else "none, not calibrated"
    found = f"calibrated for {calibrated.recipe.get('model_name', short(calibrated.model))}"
    if distance:
        found += f", whose weights are at a distance of {distance:.2g} ({TOLERANCE:g} allowed)"
    return f"{found}; beside it {name}" if routing.own_choice else found


def _experts_for(routing: Routing, config: Any) -> Sequence[Expert]:
    if routing.experts is not None:
        return routing.experts
    depth = option(config, "num_hidden_layers") or 0  # unknown: the fewest
    heads = option(config, "num_key_value_heads") or option(config, "num_attention_heads") or 0
    wanted = int(sum(heads) if isinstance(heads, list) else depth * heads).bit_length() - 1
    names = [name for name in expert_names() if name != getattr(routing.shared, "name", None)]
    return build_experts(names[: max(wanted, routing.top_k)])


def _votes(part: Part, num_layers: int) -> list[Votes]:
    """Split the votes of several layers."""
    scores = part.scores.chunk(num_layers, 1)
    shares = part.shares.chunk(num_layers, 1)
    return [
        Votes(*pair, part.comparable, part.has_shared) for pair in zip(scores, shares, strict=True)
    ]


def _dominant_votes(
    views: Sequence[LayerView], scores: Tensor, given: Sequence[RouterOutput]
) -> tuple[list[Votes], Tensor, list[Tensor]]:
    """Votes of each layer's dominant expert, weights [L * B, T, E], and the expert's number."""
    view = views[0]
    dominant = [each.probs.sum((0, 1)).argmax() for each in given]
    layers = torch.split(scores, len(view.keys), dim=1)
    numbers = torch.arange(len(scores), device=scores.device)
    share = scores.new_ones(1, len(view.keys))
    return (
        [
            Votes(part.index_select(0, number[None]), share, (False,))
            for part, number in zip(layers, dominant, strict=True)
        ],
        torch.cat([(view.real[..., None] & (numbers == number)).float() for number in dominant]),
        dominant,
    )
