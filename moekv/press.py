"""The press: routes every token to experts, mixes their scores, and evicts what ranks last."""

import inspect
import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import transformers
from kvpress import ScorerPress
from kvpress.presses.base_press import is_prefilling
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from moekv import ops
from moekv.attention import last_queries
from moekv.budget import (
    Kept,
    check_ratio,
    kept_pairs,
    protect,
    resolve_budget,
    select,
    without_padding,
)
from moekv.cache import cached_pairs, check_cache, empty_cache, evict, is_static
from moekv.calibrated import CalibratedGate, CalibratedRouter, load_router, shipped_router
from moekv.decoding import DecodingConfig
from moekv.experts import ExpectedExpert, Expert, PressExpert, build_experts, expert_names
from moekv.hooks import (
    check_attention,
    find_layers,
    has_own_attention,
    hook_arguments,
    is_pressed,
    is_sliding,
    lent_rotary,
)
from moekv.keeper import Keeper
from moekv.layers import GrowingLayer, storage_bytes
from moekv.mixing import common_scale, scores_by, together
from moekv.ops import ScoreKind
from moekv.queries import projected_queries
from moekv.routers import (
    BALANCE_LOSSES,
    ROUTERS,
    BaseMoERouter,
    RouterOutput,
    SharedExpertRouter,
    make_router,
)
from moekv.static import compact
from moekv.stats import LayerStats, Observation, record
from moekv.streaming import StreamingBudget
from moekv.view import LayerView, ViewBuilder, read_starts

POLICIES = ("mixture", "dominant")

SHARED_EXPERT, ROUTED_EXPERTS = "expected", ("selective", "semantic")
"""What rates a model that nobody calibrated, unless options choose something else."""

ROUTED_SAY = 0.4
"""What a standard deviation of a routed expert's scores weighs against a factor e of attention."""

TOGETHER = 8
"""Layers of a prefill that are rated at once: a layer's own share is many small operations."""

_busy: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # decoders inside a press's block


class _Layer:
    """What the press remembers of one attention layer."""

    def __init__(self, module: nn.Module, router: BaseMoERouter, stats: LayerStats) -> None:
        self.module = weakref.ref(module)
        self.router = router
        self.stats = stats


@dataclass
class _Rating:
    """One layer's scores, and what it takes to act on them."""

    layer: _Layer
    scores: Tensor  # [B, H, T] fp32, those that decide
    ruling: Tensor | None  # scalar, the dominant expert
    start: Tensor | None
    lengths: tuple[int, ...]
    begins: bool
    ends: bool
    seen: Observation  # of all layers that were rated with it


@dataclass
class _Look:
    """A layer that is still to be rated, without the tensors that are too large to hold."""

    layer: _Layer
    view: LayerView
    routed: RouterOutput | None  # None: by a calibrated router, from what it has read
    scores: list[Tensor | None]  # [B, H, T] fp32 each, of the experts that do not wait

    @property
    def alike(self) -> tuple[Any, ...]:
        """What layers that are rated together have in common."""
        view = self.view
        keys = view.keys.shape, view.keys.device
        return *keys, view.lengths, view.begins, view.ends, view.hidden_states.shape[:2]


@dataclass
class _Rated:
    """A layer of the running prefill, whose cache is not touched before all are rated."""

    cache: Cache
    index: int
    keys: weakref.ref[Tensor]
    states: Tensor | None  # [B, N, hidden], the last inputs, where compression will go on
    read: Tensor | None  # [B, H, T] fp32, what a calibrated router then has to note
    look: _Look | None
    rating: _Rating | None = None

    @property
    def done(self) -> _Rating:
        """Its rating, once it is there."""
        assert self.rating is not None
        return self.rating


@dataclass
class MoERouterPress(ScorerPress):
    """Compress KV caches with a router over experts.

    Every token is routed to a few experts. Each expert scores the cached pairs; scores are brought
    to one scale (mean 0, standard deviation 1 in every head, unless they are comparable as they
    are) and mixed with the tokens' gate weights. The pairs that rank last leave, and their memory
    is freed.

    Inside ``with press(model):`` each prefill is compressed once, when its last layer has run: an
    exception anywhere leaves the cache whole. Until then the full cache is held, so the peak is
    that of a prefill without compression (see `streaming`). Decoding steps compress nothing unless
    `decoding` says so (or ``kvpress.DecodingPress`` does). As a part of a kvpress wrapper the press
    acts on each layer at once.

    Parameters
    ----------
    compression_ratio : float
        Share of the pairs to remove, in [0, 1). A head keeps exactly
        ``max(1, int(T * (1 - compression_ratio)))`` pairs, of the T real ones of its row, on
        average over the heads that share a budget; 0 measures and removes nothing.
    num_experts : int or "auto", optional
        As many experts from the registry, in its order. ``"auto"``:
        ``floor(log2(layers * KV heads))``, at least `top_k`, at most all: the more heads, the more
        kinds of them. If none of `num_experts`, `top_k`, `router_type` and `experts` is given,
        ``expected`` is shared by all tokens, and ``selective`` and ``semantic`` move it a little;
        if only others of them are, it is 4.
    top_k : int, optional
        Experts per token; 2 unless given.
    router_type : str, optional
        A key of ``moekv.routers.ROUTERS``; ``"pikv"`` unless given.
    cache_aware : bool
        Whether a ``"pikv"`` router's choices follow the measured hit rates; other routers have no
        history. Off, as it changed nothing where it was measured (docs/results.md).
    policy : str
        ``"mixture"``: see above. ``"dominant"``: the expert with the highest mean probability over
        a layer's real tokens rules the layer alone, by its own ``Expert.kept``. Layers of
        different lengths result, which eager attention cannot serve.
    budget : str
        ``"uniform"``: each head keeps the same number, in plain dense layers. ``"head"``: pairs
        move between the heads of a layer; ``"model"``: between the heads of all layers. Both give
        ragged layers, which need scores that are comparable across heads (see
        ``Expert.comparable``). ``"auto"``: ``"model"`` where no experts or routers are asked for,
        or comparable ones are, or a calibrated router is, unless static caches or eager attention
        need dense layers; ``"uniform"`` otherwise, and where a cache goes on growing without a
        calibrated router.
    backend : str
        ``"auto"`` (by the device of the tensors), ``"cpu"``, ``"cuda"`` or ``"torch"``.
    experts : sequence, optional
        Names, ``Expert`` instances or kvpress scorers, instead of the registry's first
        `num_experts`.
    balance_mode : str
        Auxiliary loss of the ``"topk_balanced"`` router: ``entropy``, ``variance`` or ``gini``.
    cache_update_interval : int
        Calls between changes of a ``"pikv"`` router's selection bias.
    sinks : int
        First real positions that stay in any case: attention leans on them whatever they
        say (StreamingLLM).
    recent : int
        Last real positions that stay in any case: too few queries have seen them to judge.
    window : int
        Last tokens whose queries are observed.
    decoding : DecodingConfig, optional
        Compress during decoding, too, so that a cache never exceeds its budget.
    context_length : int, optional
        Length of a prompt, padding included, that is fed in several forwards (which
        ``moekv.prefill_in_chunks`` does). Pairs leave after each, as many as it takes to hold no
        more than what stays of the whole prompt: the peak is that and a chunk. Layers become
        ragged, whatever the budget. None: a prefill is one forward.
    streaming : bool
        Trim each layer as it arrives, instead of all after the last. What stays is the same; the
        peak is the budget and one whole layer, and with a budget over the model an eighth of the
        budget more. The price of that budget: a selection over all layers so far for every layer,
        and older ones are copied a few times. An exception halfway leaves the cache empty instead
        of whole.
    router : CalibratedRouter, str or None
        A calibrated router, which brings its own experts and gates; or the folder or hub id of one.
        It has to see every token in a block of its own.
        ``"auto"``: the one that comes with the package for the model, if there is one, unless
        `num_experts`, `top_k`, `router_type`, `experts` or policy ``"dominant"`` ask for something
        else, or the first cache that the press rates holds tokens that it has not seen (as inside
        ``kvpress.DecodingPress``); ``get_stats()["router"]`` says which one is at work. None: none.

    Raises
    ------
    ValueError
        An option is unknown or out of range, or excludes another.
    TypeError
        An expert is none, or `decoding` is no ``DecodingConfig``.
    RuntimeError
        The backend is not available.

    Examples
    --------
    >>> press = MoERouterPress(compression_ratio=0.5)
    >>> with press(model):
    ...     out = model.generate(input_ids, max_new_tokens=100)
    >>> press.get_stats()["compression"]["ratio"]
    0.5

    Notes
    -----
    Same inputs to a new or reset press give the same outputs, bit for bit. The history of a
    ``"pikv"`` router is part of its inputs.
    """

    compression_ratio: float = 0.5
    num_experts: int | str | None = None
    top_k: int | None = None
    router_type: str | None = None
    cache_aware: bool = False
    policy: str = "mixture"
    budget: str = "auto"
    backend: str = "auto"
    experts: Sequence[str | Expert | ScorerPress] | None = None
    balance_mode: str = "entropy"
    cache_update_interval: int = 4
    sinks: int = 4
    recent: int = 16
    window: int = 64
    decoding: DecodingConfig | None = None
    context_length: int | None = None
    streaming: bool = False
    router: CalibratedRouter | str | None = "auto"

    def __post_init__(self) -> None:
        """Check every option before a model is at hand."""
        self._training_free, self._own_choice = self._check_router()
        # The options stay as they were given: dataclasses.replace() makes a press of the same ones.
        num_experts = 4 if self.num_experts is None else self.num_experts
        self._top_k = 2 if self.top_k is None else self.top_k
        self._router_type = "pikv" if self.router_type is None else self.router_type
        check_ratio(self.compression_ratio)
        _check_choice("policy", self.policy, POLICIES)
        _check_choice("router_type", self._router_type, tuple(ROUTERS))
        _check_choice("balance_mode", self.balance_mode, tuple(BALANCE_LOSSES))
        self._budget = resolve_budget(self.budget)
        if self.policy == "dominant" and self._budget != "uniform":
            raise ValueError(
                f"expected budget 'uniform' with policy 'dominant', in which an expert says how "
                f"much each head keeps, got {self.budget!r}"
            )
        if self.streaming and self.policy == "dominant":
            raise ValueError(
                "expected policy 'mixture' with streaming, got 'dominant', whose layers may turn "
                "out to differ in length only when the last has been rated"
            )
        if self.streaming and self.context_length is not None:
            raise ValueError(
                "expected streaming or context_length, got both: a prompt in chunks has pairs of "
                "all layers leave after each chunk, and its peak is bounded by that"
            )
        ops.check_backend(self.backend)
        _check_count("top_k", self._top_k, 1)
        _check_count("cache_update_interval", self.cache_update_interval, 1)
        _check_count("sinks", self.sinks, 0)
        _check_count("recent", self.recent, 0)
        _check_count("window", self.window, 1)
        _check_flag("cache_aware", self.cache_aware)
        _check_flag("streaming", self.streaming)
        if self.decoding is not None and not isinstance(self.decoding, DecodingConfig):
            raise TypeError(f"expected decoding a moekv.DecodingConfig, got {self.decoding!r}")
        if self.context_length is not None:
            _check_count("context_length", self.context_length, 1)
        if self.policy == "dominant" and self._goes_on:
            raise ValueError(
                "expected policy 'mixture' where compression goes on during decoding or between "
                "chunks, got 'dominant', which has no budget to come back to"
            )
        self._experts: list[Expert] | None = None
        if not self._own_choice:
            self._experts = build_experts([SHARED_EXPERT, *ROUTED_EXPERTS])
        elif self.experts is not None:
            self._experts = build_experts(self.experts)
        elif num_experts != "auto":
            names = expert_names()
            if isinstance(num_experts, str):
                raise ValueError(f'expected num_experts a number or "auto", got {num_experts!r}')
            _check_count("num_experts", num_experts, 1)
            if num_experts > len(names):
                raise ValueError(
                    f"expected num_experts <= {len(names)} ({', '.join(names)}), "
                    f"got {num_experts}; register_expert adds more"
                )
            self._experts = build_experts(names[:num_experts])
        most = len(expert_names() if self._experts is None else self._experts)
        if self._top_k > most:
            raise ValueError(f"expected top_k <= num_experts = {most}, got {self._top_k}")
        if self._goes_on and self._experts is not None:
            _check_able(self._experts, not all(e.needs_hidden_states for e in self._experts))
        self._own_experts = self._experts
        self._calibrated: CalibratedRouter | None = None
        self._layers: dict[int, _Layer] = {}
        self._bytes = [0, 0]
        self._pairs = [0, 0]
        self._view = ViewBuilder()
        self._hooked: list[nn.Module] = []
        self._rated: list[_Rated] = []
        self._queries: dict[nn.Module, Tensor] = {}
        self._projected: dict[nn.Module, Tensor] = {}
        self._static = False
        self._keeper = Keeper(self)
        self._num_cached = self._num_forwards = self._num_commits = self._num_grown = 0
        self._stream: StreamingBudget | None = None

    def _check_router(self) -> tuple[bool, bool]:
        """Say whether options exclude a calibrated router, and whether they make their own."""
        names = ("num_experts", "top_k", "router_type", "experts")
        given = [name for name in names if getattr(self, name) is not None]
        given += ["policy"] if self.policy == "dominant" else []
        if self.router in (None, "auto"):
            return self.router is None or bool(given), bool(given)
        if given:
            raise ValueError(
                f"expected no {' or '.join(given)} beside a calibrated router, which brings its "
                "own experts and gates; or router=None"
            )
        if isinstance(self.router, str):
            self.router = load_router(self.router)
        if not isinstance(self.router, CalibratedRouter):
            raise TypeError(
                f'expected router a moekv.CalibratedRouter, a name, "auto" or None, got '
                f"{type(self.router).__name__}"
            )
        return False, False

    def _find_router(self, model: PreTrainedModel) -> CalibratedRouter | None:
        """Find the calibrated router for a model, if there is to be one."""
        if self._training_free:
            return None
        if not isinstance(self.router, CalibratedRouter):
            return shipped_router(model)
        self.router.check(model)
        return self.router

    def _see_unknown_tokens(self) -> None:
        """Do without a calibrated router, which cannot rate them, if nobody asked for it.

        Raises
        ------
        RuntimeError
            It was asked for, or the press has rated with it before.
        """
        if self._calibrated is None:
            return
        if self.router != "auto" or self._layers:
            raise RuntimeError(
                "expected a cache whose tokens have all been fed in a block of this press, as a "
                "calibrated router reads each when it comes, got one with others; pass router=None"
            )
        self._training_free, self._calibrated, self._experts = True, None, self._own_experts

    # --- Rating -----------------------------------------------------------------------------------

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Rate the pairs of one layer, and observe.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        hidden_states : Tensor [B, N, hidden]
            Its input: a whole prefill, a slice of it, or the last N tokens of the cache.
        keys, values : Tensor [B, H, T, D]
        attentions : Tensor or None
            For experts that use attention weights.
        kwargs : dict
            Of the layer's forward.

        Returns
        -------
        Tensor [B, H, T], float32
            Finite; in a mixture sinks and recent positions come first, padding last.

        Raises
        ------
        ValueError
            See ``moekv.view.ViewBuilder``; or an expert's scores are not [B, H, T].
        """
        look = self._look(module, hidden_states, keys, values, attentions, kwargs)
        (rating,) = self._rate([look])
        self._observe([rating])
        sinks, recent = self._protected(rating)
        return protect(rating.scores, rating.start, sinks=sinks, recent=recent)

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Rate the pairs of one layer and copy those that stay.

        Parameters
        ----------
        module, hidden_states, keys, values, attentions, kwargs
            As in :meth:`score`.

        Returns
        -------
        keys, values : Tensor [B, H, n, D]
            In their old order.

        Raises
        ------
        ValueError
            As in :meth:`score`, or the batch is padded.
        """
        check_ratio(self.compression_ratio)
        if self._budget != "uniform":
            raise ValueError(
                f"expected budget 'uniform' inside a kvpress wrapper, whose layers are dense, got "
                f"{self.budget!r}; use the press in a block of its own"
            )
        if self._goes_on:
            raise ValueError(
                "expected neither decoding nor context_length inside a kvpress wrapper, which "
                "decides itself when to compress: use the press in a block of its own, or "
                "kvpress.DecodingPress without them"
            )
        look = self._look(module, hidden_states, keys, values, attentions, kwargs)
        if look.view.start is not None and self._evicts:
            num_keys = keys.shape[2]
            raise ValueError(
                "expected rows without padding inside a kvpress wrapper, got "
                f"{[num_keys - n for n in look.view.lengths]} padding positions: after eviction "
                "the attention mask would no longer fit; use the press in a block of its own"
            )
        (rating,) = self._rate([look])
        (kept,) = self._choose([rating])
        before = storage_bytes(keys, values)
        if kept is not None:
            layer = GrowingLayer.compress(keys, values, kept)
            keys, values = cached_pairs(layer)
        self._record([rating], [kept], [(before, storage_bytes(keys, values))])
        return keys, values

    def _look(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
        queries: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> _Look:
        if hidden_states.shape[1] < keys.shape[2]:
            self._see_unknown_tokens()
        with torch.no_grad():
            return self._look_at(
                self._view(
                    module,
                    hidden_states,
                    keys,
                    values,
                    attentions,
                    kwargs,
                    window=self.window,
                    kinds=self._kinds(module),
                    backend=self.backend,
                    queries=queries,
                    projected=projected,
                )
            )

    def _expects(self, module: nn.Module) -> bool:
        return any(isinstance(expert, ExpectedExpert) for expert in self._experts_for(module))

    def _kinds(self, module: nn.Module) -> list[ScoreKind]:
        experts = self._experts_for(module)
        return sorted(set().union(*(expert.kinds for expert in experts)))

    @torch.no_grad()
    def _look_at(self, view: LayerView) -> _Look:
        """Take of a view all that needs its hidden states and queries, and let these go."""
        experts = self._experts_for(view.module)
        layer = self._layer(view.module, view.hidden_states, experts)
        routed = None
        if self._calibrated is None:
            routed = layer.router(view.hidden_states, view.token_mask)
        else:
            index: int = view.module.layer_idx  # type: ignore[assignment]
            view.read = self._calibrated.project(index, view.hidden_states)
        scores = [None if expert.waits else scores_by(expert, view) for expert in experts]
        if view.aligned and self._expects(view.module):
            view.expected()
        view.observed()
        return _Look(layer, view.released(), routed, scores)

    @torch.no_grad()
    def _rate(self, looks: Sequence[_Look], alone: Sequence[int] | None = None) -> list[_Rating]:
        """Rate layers, those that are alike at once.

        In each row an expert alone would keep as many pairs as `alone` says, or its own number.
        """
        ratings: list[_Rating] = []
        for _, alike in groupby(looks, key=lambda look: look.alike):
            ratings += self._rate_alike(list(alike), alone)
        return ratings

    def _rate_alike(self, looks: list[_Look], alone: Sequence[int] | None) -> list[_Rating]:
        view = looks[0].view
        experts = self._experts_for(view.module)
        num_experts, num_layers = len(experts), len(looks)
        batch, num_heads, num_keys = view.keys.shape[:3]
        routed = [self._routed(look) for look in looks]
        by_expert = [
            scores_by(expert, look.view) if (known := look.scores[e]) is None else known
            for e, expert in enumerate(experts)
            for look in looks
        ]
        # The layers are further rows of the batch, so that each step is one operation for all.
        scores = torch.cat(by_expert).view(num_experts, num_layers * batch, num_heads, num_keys)
        del by_expert
        hit_rates = self._hit_rates(looks, scores, alone)
        ruling: Sequence[Tensor | None] = [None] * num_layers
        if self.policy == "dominant":
            decisive, shares, ruling = self._rule(view, scores, routed)
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
            _Rating(look.layer, scores_, ruler, *row)
            for look, scores_, ruler in zip(looks, decisive, ruling, strict=True)
        ]

    def _routed(self, look: _Look) -> RouterOutput:
        if look.routed is not None:
            return look.routed
        gate, read = look.layer.router, look.view.read
        assert isinstance(gate, CalibratedGate) and read is not None
        return gate.decide(read, look.view.token_mask)

    def _rule(
        self, view: LayerView, scores: Tensor, routed: Sequence[RouterOutput]
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

    def _mix(
        self, looks: Sequence[_Look], scores: Tensor, routed: Sequence[RouterOutput]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Mixed scores [B, H, T] of each layer, and each expert's share in them [B, T, E]."""
        view = looks[0].view
        weights, chosen, shares = zip(*(self._weights(view, r) for r in routed), strict=True)
        gain, offset = self._scale(looks, scores)
        mixed = ops.mix_scores(
            scores, together(weights), together(chosen), gain, offset, backend=self.backend
        )
        return list(torch.split(mixed, len(view.keys))), list(shares)

    def _weights(self, view: LayerView, routed: RouterOutput) -> tuple[Tensor, Tensor, Tensor]:
        """Gate weights and experts [B, T, k] of the pairs, and each expert's share [B, T, E]."""
        weights, chosen, shares = routed.weights, routed.experts, routed.shares
        if view.aligned:
            return weights, chosen, shares
        # Not every pair's token is known: all are mixed as the known ones are on average.
        able = [expert.can_rate(view) for expert in self._experts_for(view.module)]
        _check_able(self._experts_for(view.module), any(able))
        total = shares.sum(1, keepdim=True).repeat_interleave(view.folded, 0)
        # A little for all that can rate, in case that tokens chose none of them.
        total = (total + 1e-6) * torch.tensor(able, device=total.device)
        shares = (total / total.sum(-1, keepdim=True)) * view.real[..., None]
        chosen = torch.arange(len(able), dtype=torch.int32, device=total.device)
        return shares.contiguous(), chosen.expand(shares.shape).contiguous(), shares

    def _scale(self, looks: Sequence[_Look], scores: Tensor) -> tuple[Tensor, Tensor]:
        """Affine maps of the experts' scores [E, L * B, H, T] to one scale: gain, offset."""
        view = looks[0].view
        if self._calibrated is None:
            real = None if view.start is None else view.real.repeat(len(looks), 1)
            gain, offset = common_scale(self._experts_for(view.module), scores, real)
            if not self._own_choice:
                gain[1:] *= ROUTED_SAY
                offset[1:] *= ROUTED_SAY
            return gain, offset
        indices: list[int] = [look.view.module.layer_idx for look in looks]  # type: ignore[misc]
        gain, offset = self._calibrated.scale(indices, scores.device)  # [E, L, H]
        if view.folded > 1:
            return gain[:, 0, view.heads], offset[:, 0, view.heads]
        batch = len(view.keys)
        if batch > 1:
            gain, offset = gain.repeat_interleave(batch, 1), offset.repeat_interleave(batch, 1)
        return gain, offset

    def _hit_rates(
        self, looks: Sequence[_Look], scores: Tensor, alone: Sequence[int] | None
    ) -> Tensor:
        """Share [E, L] of the observed attention on what each expert alone would keep.

        Parameters
        ----------
        looks : sequence of L _Look
            Layers that are alike.
        scores : Tensor [E, L * B, H, T], float32
        alone : sequence of B ints, optional
            Pairs that an expert alone keeps in each row.
        """
        first, num_layers = looks[0].view, len(looks)
        experts = self._experts_for(first.module)
        num_experts, batch = len(experts), len(first.keys)
        num_heads, num_keys = scores.shape[2:]
        sinks, recent = self._protected(first)
        totals = [alone or self._alone(expert, first.lengths) for expert in experts]
        (kept,) = select(  # all experts of all layers at once, as further rows of the batch
            [scores.flatten(0, 1)],
            None if first.start is None else first.start.repeat(num_experts * num_layers),
            [total for rows in totals for total in num_layers * list(rows)],
            sinks=sinks,
            recent=recent,
            backend=self.backend,
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

    def _alone(self, expert: Expert, lengths: Sequence[int]) -> list[int]:
        """Pairs that an expert alone keeps in each row."""
        if self.policy == "mixture":
            return [kept_pairs(n, self.compression_ratio) for n in lengths]
        return [min(max(expert.kept(n, self.compression_ratio), 1), max(n, 1)) for n in lengths]

    def _protected(self, view: LayerView | _Rating) -> tuple[int, int]:
        """Sinks and recent positions that stay in any case; in a chunk those that it really has."""
        if self.policy == "dominant":
            return 0, 0
        return self.sinks if view.begins else 0, self.recent if view.ends else 0

    # --- Acting -----------------------------------------------------------------------------------

    @property
    def _evicts(self) -> bool:
        return self.compression_ratio > 0 or self.policy == "dominant" or self.decoding is not None

    @property
    def _goes_on(self) -> bool:
        """Whether a cache may be compressed more than once."""
        return self.decoding is not None or self.context_length is not None

    def _keep(self, lengths: Sequence[int], ahead: int = 0) -> list[int]:
        """Pairs of a head in each row that stay of a prompt, of which some tokens are ahead."""
        keep = [kept_pairs(n + ahead, self.compression_ratio) for n in lengths]
        if self.decoding is not None:
            keep = [min(n, self.decoding.target) for n in keep]
        return [min(k, max(n, 1)) for k, n in zip(keep, lengths, strict=True)]

    def _ahead(self, num_tokens: int) -> int:
        """Tokens that a prompt has behind the first ones."""
        return 0 if self.context_length is None else self.context_length - num_tokens

    def _choose(self, ratings: Sequence[_Rating]) -> list[Kept | None]:
        """Say what each layer keeps; None where everything stays.

        The one place where a dominant policy and a model's budget wait for the device.
        """
        if not self._evicts:
            return [None] * len(ratings)
        first = ratings[0]
        num_keys = first.scores.shape[2]
        if self.policy == "mixture":
            ahead = self._ahead(num_keys)
            totals = self._keep(first.lengths, ahead)
            if first.start is None and totals[0] == num_keys:
                return [None] * len(ratings)
            chosen = self._select([r.scores for r in ratings], first, totals, budget=self._budget)
            # Rows may be all padding, so far.
            chosen = [without_padding(kept, first.start, first.lengths) for kept in chosen]
            if self.context_length is not None:
                chosen = [replace(kept, per_head=None) for kept in chosen]
            return list(chosen)
        assert self._experts is not None
        ruling = [r.ruling for r in ratings if r.ruling is not None]
        rulers = torch.stack([r.to(ruling[0].device) for r in ruling]).tolist()
        chosen = []
        for rating, ruler in zip(ratings, rulers, strict=True):
            totals = self._alone(self._experts[ruler], rating.lengths)
            chosen += self._select([rating.scores], rating, totals)
        if len({kept.per_head for kept in chosen}) > 1:
            # Only ragged layers report the true length, as masks need it where lengths differ.
            chosen = [replace(kept, per_head=None) for kept in chosen]
        return list(chosen)

    def _select(
        self,
        scores: Sequence[Tensor],
        view: LayerView | _Rating,
        totals: Sequence[int],
        budget: str = "uniform",
    ) -> list[Kept]:
        sinks, recent = self._protected(view)
        return select(
            scores,
            view.start,
            totals,
            budget=budget,
            sinks=sinks,
            recent=recent,
            backend=self.backend,
        )

    def _observe(self, ratings: Sequence[_Rating], kept: Sequence[Tensor] | None = None) -> None:
        """Record ratings, and the share [B, T] of heads that keep each position, if any left.

        Those that were made together come together.
        """
        first = 0
        while first < len(ratings):
            seen = ratings[first].seen
            last = first + len(seen.load)
            layers = [rating.layer for rating in ratings[first:last]]
            shares = None if kept is None else torch.stack(list(kept[first:last]))
            record([layer.stats for layer in layers], seen, shares)
            for layer, rates in zip(layers, seen.hit_rates.unbind(), strict=True):
                layer.router.update_history(rates)
            first = last

    def _record(
        self,
        ratings: Sequence[_Rating],
        kept: Sequence[Kept | None],
        num_bytes: Iterable[tuple[int, int]],
    ) -> None:
        """Count what stays of rated layers, and their bytes before and after."""
        everywhere = torch.ones_like(ratings[0].scores[:, 0])
        shares = [
            everywhere.to(r.scores.device) if k is None else k.share()
            for r, k in zip(ratings, kept, strict=True)
        ]
        self._observe(ratings, shares)
        for rating, chosen, (before, after) in zip(ratings, kept, num_bytes, strict=True):
            pairs = rating.scores.shape[1] * sum(rating.lengths)
            self._bytes[0] += before
            self._bytes[1] += after
            self._pairs[0] += pairs
            self._pairs[1] += pairs if chosen is None else len(chosen.indices)

    def _commit(self, rated: Sequence[_Rated]) -> None:
        """Compress rated layers: all that is likely to fail comes before the first is touched."""
        if any(r.cache.layers[r.index].keys is not r.keys() for r in rated):
            raise RuntimeError(
                "expected the cache as it was when it was rated, got one that another hook has "
                "changed; kvpress.ComposedPress chains presses"
            )
        ratings = [r.done for r in rated]
        kept, num_bytes = self._choose(ratings), []
        if any(k is not None and k.per_head is None for k in kept):
            check_attention(self._hooked[0], "heads or layers of different lengths")
        try:
            for r, chosen in zip(rated, kept, strict=True):
                before = after = storage_bytes(*cached_pairs(r.cache.layers[r.index]))
                if is_static(r.cache):
                    compact(r.cache, r.index, chosen, backend=self.backend)
                elif chosen is not None:
                    before, after = evict(r.cache, r.index, chosen, backend=self.backend)
                self._keeper.adopt(r, chosen)
                num_bytes.append((before, after))
        except BaseException:
            # Out of memory, say. Half a compressed cache is of no use: begin again with none.
            empty_cache(rated[0].cache)
            raise
        self._record(ratings, kept, num_bytes)

    def _begin_stream(self, cache: Cache, rating: _Rating) -> None:
        """Get ready to trim the layers of a prefill as they arrive, if anything is to leave."""
        totals = self._keep(rating.lengths)
        if not self._evicts or (rating.start is None and totals[0] == rating.scores.shape[2]):
            return
        sinks, recent = self._protected(rating)
        self._stream = StreamingBudget(
            cache,
            budget=self._budget,
            num_layers=len(self._hooked),
            totals=totals,
            lengths=rating.lengths,
            start=rating.start,
            sinks=sinks,
            recent=recent,
            backend=self.backend,
        )

    def _end_stream(self, rated: Sequence[_Rated]) -> None:
        """Record what the stream has done; its last layer has trimmed all to the budget."""
        assert self._stream is not None
        layers = self._stream.layers
        for r, trimmed in zip(rated, layers, strict=True):
            self._keeper.adopt(r, trimmed.kept)
        self._record(
            [r.done for r in rated],
            [trimmed.kept for trimmed in layers],
            [(trimmed.before, trimmed.after) for trimmed in layers],
        )
        self._stream = None

    def _abort_stream(self, *_: Any) -> None:
        """Empty the cache of a prefill that has not come to its end."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.abort()

    # --- Hooks ------------------------------------------------------------------------------------

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Generator[None, None, None]:
        """Compress the prefills that run in the block.

        Parameters
        ----------
        model : PreTrainedModel

        Raises
        ------
        TypeError
            The model has no decoder layers with attention, or its cache cannot be served.
        ValueError
            All its layers have sliding windows; or eager attention cannot serve what would result.
        RuntimeError
            A press is at work on the model, or this one on another; a forward cannot be
            compressed; or the block ends and nothing was, although something was to be.
        """
        if self._hooked:
            raise RuntimeError("expected a press in one block at a time, got a second one")
        decoder, layers = find_layers(model)
        if decoder in _busy or any(is_pressed(layer) for layer in layers):
            raise RuntimeError(
                "expected a model without a press at work, got one inside another press's block; "
                "kvpress.ComposedPress chains presses"
            )
        hooked = [layer for layer in layers if not is_sliding(layer)]
        if not hooked:
            raise ValueError(
                "expected layers with full attention, got sliding windows in all of them: "
                "their caches are bounded already"
            )
        self.post_init_from_model(model)
        if self._budget != "uniform" and self._evicts:
            check_attention(hooked[0], f"budget {self.budget!r}")
        handles = []
        self._hooked, self._rated = hooked, []
        self._num_cached = self._num_forwards = self._num_commits = self._num_grown = 0
        _busy.add(decoder)
        try:
            handles.append(
                decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            )
            handles += [
                layer.register_forward_hook(self._after_attention, with_kwargs=True)
                for layer in hooked
            ]
            if self.streaming:
                handles.append(decoder.register_forward_hook(self._abort_stream, always_call=True))
            # Kernels that replace the model's own may rotate queries in place.
            kept = () if model.use_kernels or not self._expects(hooked[0]) else hooked
            with (
                lent_rotary(decoder, layers),
                last_queries(hooked, self.window) as self._queries,
                projected_queries(kept) as self._projected,
            ):
                yield
            acted = self._num_commits or self._num_grown
            if self._num_forwards and not acted and self._evicts:
                raise RuntimeError(
                    f"MoERouterPress compressed nothing in {self._num_forwards} forward(s): no "
                    "prefill ended inside the block. Either the prompt was fed outside of it, or "
                    f"transformers {transformers.__version__} no longer calls the attention "
                    "layers that carry the hooks"
                )
        finally:
            self._abort_stream()  # after an interrupt, for which no hook is called
            for handle in handles:
                handle.remove()
            _busy.discard(decoder)
            self._hooked, self._rated, self._queries, self._projected = [], [], {}, {}

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Get ready for a model: kvpress calls this when a block begins.

        Parameters
        ----------
        model : PreTrainedModel

        Raises
        ------
        RuntimeError
            The press remembers another model.
        """
        _, layers = find_layers(model)
        for layer in layers:
            self._check_known(layer)
        self._budget = resolve_budget(self.budget)
        if (found := self._find_router(model)) is not self._calibrated:
            self._calibrated = found
            self._experts = self._own_experts if found is None else found.experts
        for expert in self._experts_for(layers[0]):
            if isinstance(expert, PressExpert):
                expert.press.post_init_from_model(model)

    def forward_hook(
        self, module: nn.Module, input: list[Tensor], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Compress one layer at once, after a prefill: what kvpress's wrappers call.

        Parameters
        ----------
        module : nn.Module
            The attention layer. One with a sliding window stays as it is.
        input : list of Tensor
            Not used.
        kwargs : dict
            Of the layer's forward.
        output : tuple
            Of the layer's forward.

        Returns
        -------
        tuple
            `output`.

        Raises
        ------
        RuntimeError, TypeError, ValueError
            As in a block of the press's own.
        """
        hidden_states, cache, position = hook_arguments(
            kwargs, "hidden_states", "past_key_values", "cache_position"
        )
        if is_sliding(module) or not is_prefilling(position, hidden_states.shape[1]):
            return output
        check_cache(cache)
        cache_layer = cache.layers[module.layer_idx]
        keys, values = cached_pairs(cache_layer)
        cache_layer.keys, cache_layer.values = self.compress(
            module, hidden_states, keys, values, _attentions(output), kwargs
        )
        return output

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse what cannot be compressed before anything runs."""
        if torch.compiler.is_compiling():
            return
        self._abort_stream()
        self._rated = []
        self._queries.clear()
        self._projected.clear()
        self._num_forwards += 1
        try:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        except TypeError:
            given = kwargs
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        num_tokens = 0 if tokens is None else tokens.shape[1]
        self._num_cached = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        if cache is not None and self._num_cached:
            self._keeper.check(cache, self._num_cached, num_tokens, given)
            self._resolve_budget(cache)
            return
        padded = False
        if isinstance(mask, Tensor) and self._evicts:
            padded = any(read_starts(mask[..., :num_tokens] if is_static(cache) else mask))
        self._resolve_budget(cache)
        if cache is not None:
            check_cache(cache, static=self._not_for_static(padded))
        if self.context_length is not None:
            self._keeper.check_chunk(0, num_tokens, given)
            if self._evicts:
                check_attention(self._hooked[0], "a prompt in chunks")
        if padded:
            check_attention(self._hooked[0], "rows with padding")

    def _resolve_budget(self, cache: Any) -> None:
        if self.budget == "auto":
            dense = is_static(cache) or has_own_attention(self._hooked[0])
            self._budget = "uniform" if dense or not self._is_comparable() else "model"

    def _is_comparable(self) -> bool:
        """Say whether mixed scores are on one scale over all heads and layers."""
        if self._calibrated is not None:
            return True
        if self._goes_on or self.policy == "dominant":
            return False
        experts = self._experts_for(self._hooked[0])
        return not self._own_choice or all(expert.comparable for expert in experts)

    def _not_for_static(self, padded: bool) -> str | None:
        """Name what keeps the press from compressing a static cache."""
        if self._goes_on:
            return "compression that goes on (decoding, context_length)"
        if self.streaming:
            return "streaming, which gives memory back while layers arrive"
        if self._evicts and (self._budget != "uniform" or self.policy != "mixture"):
            return f"budget {self.budget!r} with policy {self.policy!r}"
        return "rows with padding" if padded else None

    def _after_attention(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Rate a layer after its prefill, and commit after the last."""
        if torch.compiler.is_compiling():
            return  # a step over a static cache, which is compressed after its prefill alone
        hidden_states, cache = hook_arguments(kwargs, "hidden_states", "past_key_values")
        projected = self._projected.pop(module, None)
        if self._num_cached:
            if self._goes_on:
                self._num_grown += module is self._hooked[0]
                self._keeper.after_attention(
                    module, kwargs, hidden_states, cache, _attentions(output)
                )
            return
        if module is self._hooked[0]:
            check_ratio(self.compression_ratio)
            self._rated = []
            self._static = is_static(cache)
            if not self._static:
                check_cache(cache)
        keys, values = cached_pairs(cache.layers[module.layer_idx])
        held = weakref.ref(keys)
        if self._static:
            num_tokens = hidden_states.shape[1]
            keys, values = keys[:, :, :num_tokens], values[:, :, :num_tokens]
            kwargs = kwargs | {"attention_mask": None}  # no padding, and no slots to come
        if module is not self._hooked[len(self._rated)]:
            self._rated = []
            raise RuntimeError(
                "expected the attention layers to run in order, once in a forward, got layer "
                f"{module.layer_idx} out of turn (transformers {transformers.__version__})"
            )
        attentions = _attentions(output)
        queries = self._queries.pop(module, None)
        look = self._look(
            module, hidden_states, keys, values, attentions, kwargs, queries, projected
        )
        del projected, keys, values  # what is evicted is free at once
        index: int = module.layer_idx  # type: ignore[assignment]
        states = self._keeper.last_states(hidden_states, look.view.lengths)
        read = self._keeper.read(index, look.view.read)
        self._rated.append(_Rated(cache, index, held, states, read, look))
        del look
        unrated = [r for r in self._rated[-TOGETHER:] if r.rating is None]
        if self.streaming or len(unrated) == TOGETHER or module is self._hooked[-1]:
            looks = [r.look for r in unrated if r.look is not None]
            for r, rating in zip(unrated, self._rate(looks), strict=True):
                r.rating, r.look = rating, None
            del looks
        if self.streaming:
            rating = self._rated[-1].done
            if len(self._rated) == 1:
                self._begin_stream(cache, rating)
            if self._stream is not None:
                with torch.no_grad():
                    self._stream.add(index, rating.scores)
        if module is self._hooked[-1]:
            rated, self._rated = self._rated, []
            with torch.no_grad():
                if self._stream is None:
                    self._commit(rated)
                else:
                    self._end_stream(rated)
            self._num_commits += 1

    # --- Memory of layers -------------------------------------------------------------------------

    def _experts_for(self, module: nn.Module) -> list[Expert]:
        if self._experts is None:
            config: Any = module.config
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            wanted = int(config.num_hidden_layers * heads).bit_length() - 1
            names = expert_names()
            self._experts = build_experts(names[: max(wanted, self._top_k)])
        return self._experts

    def _check_known(self, module: nn.Module) -> None:
        known = self._layers.get(module.layer_idx)  # type: ignore[call-overload]
        if known is not None and known.module() is not module:
            raise RuntimeError(
                "expected the model whose statistics and history this press holds, got another: "
                "call reset_stats() first, or make a press for each model"
            )

    def _layer(self, module: nn.Module, hidden_states: Tensor, experts: Sequence[Expert]) -> _Layer:
        self._check_known(module)
        index: int = module.layer_idx  # type: ignore[assignment]
        if index not in self._layers:
            router: BaseMoERouter
            if self._calibrated is not None:
                router = self._calibrated.gate(index, hidden_states, backend=self.backend)
            else:
                router = self._make_router(hidden_states.shape[-1], experts)
                router = router.to(hidden_states.device, hidden_states.dtype).eval()
                router.requires_grad_(False)
            self._layers[index] = _Layer(
                module, router, LayerStats(len(experts), hidden_states.device)
            )
        return self._layers[index]

    def _make_router(self, hidden_size: int, experts: Sequence[Expert]) -> BaseMoERouter:
        if not self._own_choice:
            prior = [expert.prior for expert in experts[1:]]
            router = SharedExpertRouter(
                hidden_size, len(prior), self._top_k, prior=prior, backend=self.backend
            )
            router.freeze()
            return router
        options: dict[str, Any] = {}
        if self._router_type == "topk_balanced":
            options["balance_mode"] = self.balance_mode
        if self._router_type == "pikv":
            options["cache_aware"] = self.cache_aware
            options["cache_update_interval"] = self.cache_update_interval
        return make_router(
            self._router_type,
            hidden_size,
            len(experts),
            self._top_k,
            prior=[expert.prior for expert in experts],
            backend=self.backend,
            **options,
        )

    # --- Statistics -------------------------------------------------------------------------------

    def get_stats(self) -> dict[str, Any]:
        """Read what the press has measured since it was made or reset. Waits for the device.

        Returns
        -------
        dict
            ``forward_count``: ratings of the layer that was rated most often: one for each
            prefill, and for each compression while decoding or between chunks.
            ``total_aux_loss``: auxiliary losses, summed over layers and forwards;
            ``avg_aux_loss``: that per forward.
            ``router``: which kind is at work, and for which model it was calibrated.
            ``compression``: ``bytes_before``, ``bytes_after``, ``bytes_freed`` of the storages of
            the layers that the press compressed, and ``ratio``, the exact share of real
            pairs removed. Where a cache is compressed again, every pair counts once: before,
            when the compression after its coming is done; after, as long as it stays. Room
            for tokens to come does not count. (Inside a wrapper such as
            ``kvpress.DecodingPress`` each compression counts by itself.)
            ``layer_stats``: for each layer index

            - ``router_stats``: ``expert_usage_ratios`` and ``expert_usage_count`` (how
              often each expert was chosen, as a share and as a number), ``total_tokens`` (real
              ones; those of a window that is routed again count again), ``routing_decisions``
              (choices made, all experts together), ``router_entropy`` (of the probabilities,
              mean over tokens, nats);
            - ``expert_compression_stats``: ``expert_usage`` (share of the positions' weight that
              the expert had), ``compression_ratios`` (share removed of the pairs that it rated,
              by weight; NaN if it rated none, or if a wrapper evicted), ``cache_hit_rates``
              (share of the attention of the last ``window`` queries, of 8 where no expert rates by
              them, that falls on what the expert alone would keep, in [0, 1]: moving average over
              calls),

            each by the expert's name.
        """
        assert self._experts is not None or not self._layers
        names = [expert.name for expert in self._experts or ()]
        layers = {i: layer.stats for i, layer in sorted(self._layers.items())}
        count = max((stats.num_calls for stats in layers.values()), default=0)
        aux_loss = sum(float(stats.aux_loss) for stats in layers.values())
        before, after = self._bytes
        pairs, kept = self._pairs
        return {
            "total_aux_loss": aux_loss,
            "avg_aux_loss": aux_loss / max(count, 1),
            "forward_count": count,
            "router": self._router_name(),
            "compression": {
                "bytes_before": before,
                "bytes_after": after,
                "bytes_freed": before - after,
                "ratio": (pairs - kept) / max(pairs, 1),
            },
            "layer_stats": {i: stats.report(names) for i, stats in layers.items()},
        }

    def _router_name(self) -> str:
        if self._calibrated is None:
            kind = self._router_type if self._own_choice else "shared expert"
            return f"{kind}, not calibrated"
        return f"calibrated for {self._calibrated.recipe.get('model_name', self._calibrated.model)}"

    def reset_stats(self) -> None:
        """Forget everything measured: statistics, routers' histories, and the model they are of."""
        self._layers = {}
        self._bytes, self._pairs = [0, 0], [0, 0]


def _attentions(output: Any) -> Tensor | None:
    return output[1] if isinstance(output, tuple) and len(output) > 1 else None


def _check_able(experts: Sequence[Expert], able: bool) -> None:
    if not able:
        raise ValueError(
            "expected an expert that can do without hidden states, which are gone where a cache is "
            f"compressed again, got {', '.join(expert.name for expert in experts)}"
        )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"expected {name} among {', '.join(choices)}, got {value!r}")


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"expected {name} an integer >= {least}, got {value!r}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} True or False, got {value!r}")
