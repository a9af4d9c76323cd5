"""Plans a forward before it runs: its settings, its strategy, or an error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from moekv.cache.caches import check_cache, is_compressed, is_static
from moekv.cache.layer import CompressedLayer
from moekv.cache.rows import check_pairs
from moekv.experts.builder import ViewBuilder, read_starts
from moekv.models.habits import check_attention, follows_masks, habits_of, reads_dense
from moekv.models.hooks import (
    cache_of,
    implementation_of,
    index_of,
)
from moekv.models.weights import device_of
from moekv.ops.backends import MAX_HEAD_DIM
from moekv.press.checks import check_count
from moekv.press.forward import Plan, Strategy
from moekv.press.growth import Growth
from moekv.press.later import Later
from moekv.press.measuring import Measuring
from moekv.press.options import Options
from moekv.press.prefill import Prefill
from moekv.press.rater import Rater
from moekv.press.routing import check_able
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
    ) -> None:
        if context_length is not None:
            check_count("context_length", context_length, 1)
        self.layers = layers
        self._mark = _Mark()
        self._rotary = rotary
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

    def _has_seen(self, cache: Cache) -> bool:
        return vars(cache).get(_MARK) is self._mark

    def _check(self, options: Options) -> None:
        """Raise if no forward of the block could be compressed."""
        if options is self._possible:
            return
        habits = [habits_of(layer, self._rotary) for layer in self.layers]
        if not all(x.is_seen for x in habits):
            raise TypeError(
                "expected attention layers whose queries can be seen, got "
                f"{type(self.layers[0]).__name__}, which multiplies them by its keys by itself"
            )
        size, backend = max(x.head_dim for x in habits), options.backend
        if size > MAX_HEAD_DIM and backend not in ("auto", "torch"):
            raise TypeError(
                f"expected heads of at most {MAX_HEAD_DIM} channels for backend {backend!r}, got "
                f"{size} in {type(self.layers[0]).__name__}; backend='auto' takes others as well"
            )
        if self._goes_on(options) and any(x.mixes for x in habits):
            raise ValueError(
                "expected attention layers of which each head reads its own pairs where "
                "compression goes on during decoding or between chunks, got "
                f"{type(self.layers[0]).__name__}, which reads those of all together"
            )
        if self._context_length is not None:
            if options.streaming:
                raise ValueError(
                    "expected streaming or context_length, got both: a prompt in chunks is "
                    "compressed after each chunk, which bounds the peak already"
                )
            if options.policy == "dominant":
                raise ValueError(
                    "expected policy 'mixture' where compression goes on during decoding or "
                    "between chunks, got 'dominant', which has no budget to come back to"
                )
            check_able(self._rater(options).experts)
        if options.budget in ("head", "model") and options.evicts:
            check_attention(self.layers[0], self._rotary, f"budget {options.budget!r}")
        if options.budget == "layer" and not self._fits_masks:
            raise ValueError(
                "expected attention layers that get their attention function by name, whose masks "
                "can be fitted to layers of different lengths, for budget 'layer', got "
                f"{type(self.layers[0]).__name__} with {implementation_of(self.layers[0])!r}; "
                "use budget='uniform'"
            )
        if options.pairs not in ("16", "auto"):
            check_attention(self.layers[0], self._rotary, f"pairs {options.pairs!r}")
            device = device_of(self.layers[0])
            for sizes in {x.sizes for x in habits if x.sizes is not None}:
                check_pairs(options.pairs, *sizes, device=device, backend=backend)
        self._possible = options

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
        dense = self._reads_dense or is_static(cache)
        sizes = None if dense else habits_of(self.layers[0], self._rotary).sizes
        options = options.in_format(sizes)
        if cache is not None and num_cached and self._goes_on(options):
            self._check_grown(options, cache)
        plan = self._plan(options, cache, wanted, num_tokens)
        view = ViewBuilder(self._rotary)
        if is_static(cache):
            _check_room(cache, index_of(self.layers[0]), num_tokens)
        if cache is not None and num_cached:
            self._check_more(plan, cache, num_cached, num_tokens, wanted, given)
            if plan.goes_on:
                return Growth(plan, view)
            first = cache.layers[index_of(self.layers[0])]
            return Measuring(plan, view) if self._later.is_due(first) else None
        self._check_prefill(plan, cache, num_tokens, given)
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
        )

    def _automatic(self, options: Options, rater: Rater, cache: Any) -> str:
        """Return the budget that ``"auto"`` stands for; warn where another would lose less."""
        if options.policy == "dominant" or not rater.compares:
            return "uniform"
        reader = "a static cache" if is_static(cache) else None
        if self._reads_dense:
            reader = "the model's own attention ('eager', sinks, or heads that it mixes)"
        if reader is None:
            return "model"
        if is_static(cache) or options.streaming or not self._fits_masks:
            budget, what = "uniform", "every head keeping the same number of pairs"
        else:
            budget, what = "layer", "the heads of a layer keeping the same number of pairs"
        if options.evicts and reader not in self._named:
            self._named.add(reader)
            logger.warning(
                "budget 'auto' is %r, %s, as %s needs dense layers; 'model' loses less, with "
                "DynamicCache and 'sdpa'",
                budget,
                what,
                reader,
            )
        return budget

    @property
    def _fits_masks(self) -> bool:
        """Whether masks can be fitted to dense layers of different lengths."""
        return all(follows_masks(layer, self._rotary) for layer in self.layers)

    @property
    def _indices(self) -> list[int]:
        return [index_of(layer) for layer in self.layers]

    @property
    def _reads_dense(self) -> bool:
        return any(reads_dense(layer, self._rotary) for layer in self.layers)

    def _goes_on(self, options: Options) -> bool:
        return options.decoding is not None or self._context_length is not None

    def _check_prefill(
        self, plan: Plan, cache: Any, num_tokens: int, given: Mapping[str, Any]
    ) -> None:
        if plan.options.decoding is not None:
            _check_positions(given, num_tokens)
        mask, padded = given.get("attention_mask"), False
        if isinstance(mask, Tensor) and plan.acts:
            padded = any(read_starts(mask[..., :num_tokens] if is_static(cache) else mask))
        if cache is not None:
            check_cache(cache, indices=self._indices, static=_not_for_static(plan, padded))
        if plan.context_length is not None:
            _check_chunk(plan.context_length, 0, num_tokens, given)
            if plan.acts:
                check_attention(self.layers[0], self._rotary, "a prompt in chunks")
        if padded:
            check_attention(self.layers[0], self._rotary, "rows with padding")

    def _check_more(
        self,
        plan: Plan,
        cache: Cache,
        num_cached: int,
        num_tokens: int,
        wanted: int,
        given: Mapping[str, Any],
    ) -> None:
        """Refuse tokens for a cache that is not empty, unless their positions are right."""
        first_layer = cache.layers[index_of(self.layers[0])]
        serves = plan.goes_on or self._has_seen(cache) or is_compressed(first_layer)
        if plan.acts and not serves:
            raise RuntimeError(
                f"MoERouterPress compressed nothing: expected a prefill inside the block, got "
                f"{num_tokens} token(s) for a cache that holds {num_cached}, fed outside of it"
            )
        if num_tokens <= 1:
            return
        if plan.context_length is not None and num_cached < plan.context_length:
            _check_chunk(plan.context_length, num_cached, num_tokens, given)
            return
        if plan.options.decoding is None and wanted != num_tokens:
            raise RuntimeError(
                f"expected a prefill in one forward, got {num_tokens} tokens for a cache that "
                f"holds {num_cached}: leave the `with` block before feeding more than one "
                "token at a time, and feed the whole prompt at once, or give its length "
                "as context_length (moekv.prefill_in_chunks does)"
            )
        position = given.get("cache_position")
        first = num_cached if position is None else int(position[0])
        if is_compressed(first_layer) and first != num_cached:
            raise RuntimeError(
                f"expected tokens at position {num_cached}, behind what the cache has seen, got "
                f"{num_tokens} at {first}: their masks would be wrong"
            )
        _check_positions(given, num_cached + num_tokens)


def _not_for_static(plan: Plan, padded: bool) -> str | None:
    """Name the option that excludes static caches."""
    options = plan.options
    if plan.goes_on:
        return "repeated compression (decoding, context_length)"
    if options.streaming:
        return "streaming, which frees memory while layers run"
    if options.quantises:
        return f"pairs {options.pairs!r}"
    if plan.evicts and (plan.budget != "uniform" or options.policy != "mixture"):
        return f"budget {plan.budget!r} with policy {options.policy!r}"
    return "rows with padding" if padded else None


def _check_chunk(length: int, num_cached: int, num_tokens: int, given: Mapping[str, Any]) -> None:
    """Refuse a chunk beyond the prompt, or at wrong positions."""
    seen = num_cached + num_tokens
    if seen > length:
        raise RuntimeError(
            f"expected a prompt of context_length = {length} tokens, got "
            f"{num_tokens} for a cache that holds {num_cached}"
        )
    _check_positions(given, seen)


def _check_positions(given: Mapping[str, Any], seen: int) -> None:
    """Refuse positions beyond the tokens fed so far."""
    position_ids = given.get("position_ids")
    if isinstance(position_ids, Tensor) and int(position_ids.max()) >= seen:
        raise RuntimeError(
            f"expected positions below {seen} for the last of {seen} tokens, got "
            f"{int(position_ids.max())}: some versions of transformers number the chunks of "
            "generate(prefill_chunk_size=...) wrongly; moekv.prefill_in_chunks does not"
        )


def _check_room(cache: Cache, index: int, num_tokens: int) -> None:
    """Refuse tokens for which a static cache has no slots."""
    layer = cache.layers[index]
    slots: int = layer.max_cache_len  # type: ignore[attr-defined]
    filled = int(layer.get_seq_length()) - int(getattr(layer, "evicted", 0))
    if filled + num_tokens > slots:
        raise ValueError(
            f"expected a static cache of at least {filled + num_tokens} slots, got {slots}, of "
            f"which {filled} are filled, and {num_tokens} more token(s)"
        )
