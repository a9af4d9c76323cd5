"""Plans a forward before it runs: its settings, its strategy, or an error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import Cache

from moekv.cache.caches import agree_on_padding, check_cache, is_static, num_rows, repeat_rows
from moekv.cache.layer import CompressedLayer
from moekv.experts.builder import ViewBuilder
from moekv.models.habits import EAGER, habits_of, why_dense
from moekv.models.hooks import cache_of, index_of, is_prefill
from moekv.models.weights import device_of
from moekv.press.checks import check_count
from moekv.press.forward import Plan, Strategy
from moekv.press.growth import Growth
from moekv.press.later import Later
from moekv.press.measuring import Measuring
from moekv.press.options import Options
from moekv.press.prefill import Prefill
from moekv.press.rater import Rater
from moekv.press.refusals import check_block, check_more, check_prefill, fits_masks
from moekv.press.stats import Statistics
from moekv.press.streaming import Streaming
from moekv.report.recording import Recording

logger = logging.getLogger("moekv")
_MARK = "_moekv_block"  # attribute of caches


class _Mark:
    """Identifies a block. Copies of a cache carry the mark of their block."""

    def __copy__(self) -> _Mark:
        return self

    def __deepcopy__(self, memo: object) -> _Mark:
        return self


class Planner:
    """Plans the forwards of one block.

    Parameters
    ----------
    layers : sequence of nn.Module
        The attention layers whose pairs may be evicted.
    rotary : nn.Module or None
        The decoder's rotary embedding.
    options : callable
        Returns the press's options when a forward begins.
    rater : callable
        Returns the rater for options.
    statistics : callable
        Returns those that a forward adds to.
    context_length : int, optional
        Length of a prompt in chunks, padding included.
    note : callable, optional
        Takes the record of every prefill.
    mesh : DeviceMesh, optional
        Processes over which the model is spread, see ``moekv.models.weights.mesh_of``.
    shares : bool
        Whether later layers attend to the pairs of these, too.
    origin : int
        Position of a text's first token.

    Raises
    ------
    ValueError
        The options do not fit the model.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        rotary: nn.Module | None,
        *,
        options: Callable[[], Options],
        rater: Callable[[Options], Rater],
        statistics: Callable[[], Statistics],
        context_length: int | None,
        note: Callable[[Recording], None] | None = None,
        mesh: Any = None,
        shares: bool = False,
        origin: int = 0,
    ) -> None:
        if context_length is not None:
            check_count("context_length", context_length, 1)
        self.layers = layers
        self._mark = _Mark()
        self._rotary, self._mesh, self._shares = rotary, mesh, shares
        self._origin = origin
        self._options, self._rater, self._statistics = options, rater, statistics
        self._context_length = context_length
        self._note = note
        self._later = Later()
        self._possible: Options | None = None
        self._named: set[str] = set()
        self._check(options())

    @property
    def rater(self) -> Rater:
        """The rater for the current options."""
        return self._rater(self._options())

    def note(self, cache: Cache | None) -> None:
        """Mark a cache as filled inside the block, also where nothing had to be evicted."""
        if cache is not None:
            vars(cache)[_MARK] = self._mark
            agree_on_padding(cache.layers)

    def _has_seen(self, cache: Cache) -> bool:
        return vars(cache).get(_MARK) is self._mark

    def _check(self, options: Options) -> None:
        if options is not self._possible:
            rater = self._rater(options)
            check_block(self.layers, self._rotary, options, rater, self._context_length)
            self._possible = options

    def misses(self, cache: Cache, given: Mapping[str, Any], num_tokens: int) -> bool:
        """Return whether a forward that no strategy was chosen for had to be compressed.

        Parameters
        ----------
        cache : Cache
        given : mapping
            Arguments of its first attention layer, which has run.
        num_tokens : int
        """
        options = self._options()
        if not options.acts or self._goes_on(options):
            return options.acts
        layer = cache.layers[index_of(self.layers[0])]
        return num_tokens > 1 and is_prefill(given, layer, num_tokens)

    def choose(self, given: Mapping[str, Any], wanted: int) -> Strategy | None:
        """Choose the strategy of a forward, or raise, before anything runs.

        Parameters
        ----------
        given : mapping
            Arguments of the decoder's forward.
        wanted : int
            Number of last tokens whose logits the caller asks for; 0: unknown.

        Returns
        -------
        Strategy or None
            None: there is nothing to do, as in a decoding step.

        Raises
        ------
        RuntimeError, TypeError, ValueError
            See docs/errors.md.
        """
        options = self._options()
        cache = cache_of(given)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        num_tokens = 0 if tokens is None else tokens.shape[1]
        num_cached = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        self._check(options)
        dense = self._why_dense is not None or is_static(cache)
        sizes = None if dense else habits_of(self.layers[0], self._rotary).sizes
        options = options.in_format(sizes, device_of(self.layers[0]))
        if cache is not None and num_cached and self._goes_on(options):
            self._check_grown(options, cache)
        plan = self._plan(options, cache, wanted, num_tokens)
        view = ViewBuilder(self._rotary, self._mesh)
        if cache is not None and num_cached:
            is_own = self._has_seen(cache)
            check_more(plan, cache, is_own, num_cached, num_tokens, wanted, given)
            if plan.goes_on:
                if tokens is not None and len(tokens) > 1 == num_rows(cache):
                    repeat_rows(cache, len(tokens))  # one text, continued in several
                return Growth(plan, view)
            first = cache.layers[index_of(self.layers[0])]
            return Measuring(plan, view) if self._later.is_due(first) else None
        check_prefill(plan, self._rotary, cache, num_tokens, given)
        plan = self._with_folding(plan, sizes)
        return Streaming(plan, view) if options.streaming else Prefill(plan, view)

    def _check_grown(self, options: Options, cache: Cache) -> None:
        """Raise if a cache cannot be compressed again; drop a router that has not read it all."""
        check_cache(cache, indices=self._indices, grown=True)
        layers = [cache.layers[index_of(module)] for module in self.layers]
        rater = self._rater(options)

        def is_noted(layer: Any) -> bool:
            if not isinstance(layer, CompressedLayer) or layer.reader != rater.reader:
                return False
            return layer.whole_notes() is not None

        if rater.calibrated is not None and not all(map(is_noted, layers)):
            rater.see_unknown_tokens()

    def _with_folding(self, plan: Plan, sizes: tuple[int, int, torch.dtype] | None) -> Plan:
        """Decide whether pairs that leave after this prefill join others."""
        options, unfolded = plan.options, plan.unfolded
        if plan.context_length is None:
            expects, device = plan.rater.expects, device_of(self.layers[0])
            unfolded = options.unfolded(sizes, expects=expects, device=device)
        return replace(plan, options=replace(options, fold=unfolded is None), unfolded=unfolded)

    def _plan(self, options: Options, cache: Any, wanted: int, num_tokens: int) -> Plan:
        rater = self._rater(options)
        budget = options.budget
        if budget == "auto":
            budget = self._automatic(options, rater, cache)
        # Tokens that may be rejected are retained in every head, so that they can be cropped: of
        # those whose logits assisted decoding asks for, all but the first are guesses.
        guesses = wanted - 1 if 1 < wanted < num_tokens else 0
        recent = max(options.recent, min(guesses, options.window))
        return Plan(
            options,
            rater,
            self._statistics(),
            self.layers,
            budget,
            self._context_length,
            recent,
            self._note,
            self._later,
            shares=self._shares,
            origin=self._origin,
        )

    def _automatic(self, options: Options, rater: Rater, cache: Any) -> str:
        """Return the budget that ``"auto"`` stands for; warn where another would lose less."""
        if options.policy == "dominant" or not rater.compares:
            return "uniform"
        reader, remedy = self._why_dense, ""
        if reader == EAGER:
            remedy = "; 'model' loses less, with attn_implementation=\"sdpa\""
        if is_static(cache):
            reader, remedy = "a static cache", "; 'model' loses less, with a DynamicCache"
        if reader is None:
            return "model"
        if is_static(cache) or options.streaming or not fits_masks(self.layers, self._rotary):
            budget, what = "uniform", "every head keeping the same number of pairs"
        else:
            budget, what = "layer", "the heads of a layer keeping the same number of pairs"
        if options.evicts and reader not in self._named:
            self._named.add(reader)
            logger.warning(
                "budget 'auto' is %r, %s, as %s needs dense layers%s",
                budget,
                what,
                reader,
                remedy,
            )
        return budget

    @property
    def _indices(self) -> list[int]:
        return [index_of(layer) for layer in self.layers]

    @property
    def _why_dense(self) -> str | None:
        """Why layers have to be dense; None: they need not."""
        reasons = (why_dense(layer, self._rotary) for layer in self.layers)
        return next((why for why in reasons if why is not None), None)

    def _goes_on(self, options: Options) -> bool:
        return options.decoding is not None or self._context_length is not None
