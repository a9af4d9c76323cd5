"""``MoERouterPress``: holds options, opens blocks, and reads statistics."""

from __future__ import annotations

import copy
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moekv.budget import Budget
from moekv.calibration.router import CalibratedRouter, is_folder, load_router
from moekv.experts.base import Expert
from moekv.models.hooks import find_layers
from moekv.models.weights import language_model
from moekv.ops import Backend
from moekv.press.checks import check_flag
from moekv.press.options import DecodingConfig, Options, Policy
from moekv.press.rater import Rater, name_router
from moekv.press.reports import Stats
from moekv.press.session import Session
from moekv.press.stats import Statistics
from moekv.report.recording import Recording
from moekv.routing.base import BaseMoERouter
from moekv.routing.registry import RouterType

logger = logging.getLogger("moekv")


@dataclass(repr=False)
class MoERouterPress:
    """Compress KV caches with a router over experts.

    An expert scores the KV pairs of a layer. One is shared by all tokens; beside it, where options
    ask for routing, each token is routed to a few others. Every expert has a share of the budget:
    the shared one nine tenths, each routed one its mean gate weight of the rest. It picks pairs in
    the order of its scores until its share is used up; a pair that several pick counts once. Pairs
    that no expert picks are evicted, and their memory is freed.

    Inside ``with press(model):`` each prefill is compressed once, when its last layer has run: an
    exception before that leaves the cache whole. Until then the full cache is held, so the peak is
    that of a prefill without compression (see `streaming`). Decoding steps evict nothing without
    `decoding` (or ``kvpress.DecodingPress``). Inside a kvpress wrapper the press compresses each
    layer as soon as it has run.

    Parameters
    ----------
    compression_ratio : float
        Share of the bytes to remove, in [0, 1). A head retains exactly
        ``max(1, int(T * (1 - compression_ratio)))`` of the T real pairs of its row, on average over
        the heads that share a budget; 0 measures and evicts nothing. Where pairs are quantised, as
        many more are retained as fit into these bytes, scales counted.
    num_experts : int or "auto", optional
        Number of routed experts, taken from the registry in its order, without the shared one.
        ``"auto"``: ``floor(log2(layers * KV heads))``, at least `top_k`, at most all: more heads do
        more different things. If none of `num_experts`, `top_k`, `router_type`, `cache_aware` and
        `experts` is given, a calibrated router scores alone, if there is one, else the shared
        expert, for which ``selective`` and ``semantic`` stand in where it cannot score, as in a
        cache that is compressed again. If only others of them are given, it is 4.
    top_k : int, optional
        Routed experts per token. Unless given, all of a list (`experts`), and 2 otherwise.
    router_type : str or BaseMoERouter, optional
        A key of ``moekv.routing.registry.ROUTERS``; ``"pikv"`` by default. Or a router instance for
        that many experts, with options of its class; every layer gets a copy. A router without
        training routes by the experts' scores of a token, and by how much of the observed attention
        each expert would have retained (``moekv.routing.evidence``).
    cache_aware : bool, optional
        Whether the choices of a ``"pikv"`` router follow the measured hit rates; they do by
        default. Other routers have no history.
    policy : str
        ``"mixture"``: see above. ``"dominant"``: the expert with the highest mean probability over
        a layer's real tokens decides the layer alone, with its own budget, ``Expert.kept``. Layers
        may differ in length, which eager attention cannot serve.
    budget : str
        ``"uniform"``: every head retains the same number of pairs, in plain dense layers.
        ``"layer"``: dense layers of different lengths: each has the mean length that its heads
        would have under one threshold over the model. The rows of a batch share that length, the
        mean of theirs (with padding layers are ragged, and each row has its own). ``"head"``: one
        threshold over the heads of a layer; ``"model"``: one over the heads of all layers. Both
        give ragged layers. ``"auto"``: ``"model"``; ``"layer"`` where eager attention needs dense
        layers; ``"uniform"`` for static caches, which need one length, for a dominant policy, and
        where the only expert's scores are not comparable between heads (see ``Expert.comparable``).
    backend : str
        ``"auto"`` (by the device of the tensors), ``"cpu"``, ``"cuda"`` or ``"torch"``.
    experts : sequence, optional
        Names, ``Expert`` instances or kvpress scorers to be routed, instead of the registry's first
        `num_experts`. No expert is shared then, unless `shared` or `router` names one.
    shared : str, Expert, kvpress scorer or None
        The expert that all tokens share. ``"auto"``: the calibrated router, if there is one, or
        ``expected``; no expert beside `experts`, or with policy ``"dominant"``. None: no expert.
    sinks : int
        First real positions, always retained: attention needs them whatever their tokens are
        (StreamingLLM).
    recent : int
        Last real positions, always retained: too few queries have attended to them to score them.
        More of them, at most `window`, where a forward asks for the logits of its last tokens
        (``logits_to_keep``), as assisted decoding does, which may reject these tokens.
    window : int
        Last tokens whose queries are observed, by experts that score by them (``selective``), by
        routers, and where a cache is compressed again. Where none of these is at work, a value
        other than the default is named in a warning.
    decoding : DecodingConfig, optional
        Compress during decoding as well, so that a cache never exceeds its budget.
    streaming : bool
        Compress each layer when it has run, instead of all after the last. The same pairs are
        retained; the peak is the budget and one whole layer, and with a budget over the model an
        eighth of the budget more. That budget costs a selection over all layers so far for every
        layer, and older layers are copied a few times. An exception halfway leaves the cache empty
        instead of whole.
    router : CalibratedRouter, str or None
        A calibrated router, which has its own experts and gates and takes the place of the shared
        expert; or the folder or hub id of one, which is loaded when a block begins. Every token has
        to be fed in a block of the press. ``"auto"``: the one that comes with the package for the
        model, if there is one. It is not used where `experts`, `shared` or policy ``"dominant"``
        choose otherwise, or where the first cache holds tokens that were fed outside of the block
        (as inside ``kvpress.DecodingPress``); ``get_stats()["router"]`` names the one in use. None:
        no calibrated router.
    pairs : str
        Storage format of retained pairs. ``"16"``: the model's dtype. ``"k8v8"``, ``"k8v4"``,
        ``"k4v4"``: bits per number of a key and of a value, plus a few bits for scales
        (``moekv.ops.quantize_pairs``), in ragged layers whatever the budget. Later tokens are not
        quantised before their row is compressed next. A quantised layer keeps its format; with
        `decoding` one in 16 bits is quantised at the block's first forward. With
        `compression_ratio` 0 nothing is evicted. ``"auto"``: the format that loses least at the
        ratio in bytes; ``"16"`` with ratio 0, and where the model cannot be served otherwise.
    fold : bool or "auto"
        Have evicted pairs join retained ones that queries of the text look at alike: these get a
        mean of the values, and a bias of their logits (``moekv.ops.fold_pairs``), which takes two
        bytes a pair. For quantised pairs, after a prefill in one forward. ``"auto"``: where half of
        the pairs or more leave, on CPUs, if an expert needs these queries as well (``expected``).

    Raises
    ------
    ValueError
        An option is unknown or out of range, or excludes another.
    TypeError
        An expert is not an expert, or `decoding` not a ``DecodingConfig``.
    AttributeError
        An unknown option is set.
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
    The same inputs to a new or reset press give the same outputs, bit for bit. The history of a
    ``"pikv"`` router is part of its inputs.

    Options may be set later and act from the next forward on. Experts, routers and `backend` can be
    set until a layer has been scored, and again after :meth:`reset_stats`.

    Threads may share a block, each with its own caches, if all of them end before the block does. A
    thread's history begins as it was at the block's beginning and follows its own prompts alone;
    that of the thread which opened the block is the one that stays.
    """

    compression_ratio: float = 0.5
    num_experts: int | Literal["auto"] | None = None
    top_k: int | None = None
    router_type: RouterType | BaseMoERouter | None = None
    cache_aware: bool | None = None
    policy: Policy = "mixture"
    budget: Budget = "auto"
    backend: Backend = "auto"
    experts: Sequence[str | Expert | Any] | None = None
    shared: str | Expert | Any | None = "auto"
    sinks: int = 4
    recent: int = 16
    window: int = 64
    decoding: DecodingConfig | None = None
    streaming: bool = False
    router: CalibratedRouter | str | None = "auto"
    pairs: str = "16"
    fold: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        """Check every option before a model is at hand."""
        self._lock = threading.Lock()
        self._given: dict[str, Any] = {}
        self._checked: Options | None = None
        self._rater: Rater | None = None
        self._model: Callable[[], PreTrainedModel | None] = _nobody  # a weak reference
        self._statistics = Statistics()
        self._recording: Recording | None = None
        self._session: Session | None = None
        self._opening = False
        self._options()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option. A router's folder is read at once, the hub only when a block begins."""
        names = [field.name for field in fields(self)]
        if name not in names and not name.startswith("_"):
            raise AttributeError(f"expected an option among {', '.join(names)}, got {name!r}")
        if name == "router" and isinstance(value, str) and value != "auto" and is_folder(value):
            value = load_router(value)
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """Show the options that differ from their defaults."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        own = [n for n in given if not _same({n: given[n]}, defaults)]
        return f"{type(self).__name__}({', '.join(f'{n}={given[n]!r}' for n in own)})"

    def __getstate__(self) -> dict[str, Any]:
        """Return options and copies of statistics and routers, without block, model or record."""
        left = {"_lock", "_session", "_opening", "_recording"}
        state = {name: value for name, value in self.__dict__.items() if name not in left}
        state["_statistics"] = copy.copy(self._statistics)
        state["_rater"] = copy.copy(self._rater)
        state["_model"] = _nobody
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a saved press."""
        self.__dict__ |= state
        self._lock = threading.Lock()
        self._session, self._opening, self._recording = None, False, None

    # --- Options and the rater --------------------------------------------------------------------

    def _options(self) -> Options:
        """Return the current options, checked again if one has changed."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(given["experts"], list):
            given["experts"] = tuple(given["experts"])
        if self._checked is None or not _same(given, self._given):
            known = [] if self._checked is None else [self._checked.routing]
            if self._rater is not None:
                known.append(self._rater.routing)
            self._checked = Options.of(given, known)
            self._given = given
        return self._checked

    def _rater_for(self, options: Options) -> Rater:
        """Return the rater, which has to fit these options."""
        with self._lock:
            rater, model = self._rater, self._model()
            stale = rater is None or (rater.routing != options.routing and not rater.routers)
            if stale and model is not None:  # reset in a block, or set before anything was rated
                rater = self._rater = self._make_rater(options, model)
        assert rater is not None
        if rater.routing != options.routing:
            raise RuntimeError(
                "expected experts, routers and backend as they were when statistics began, got "
                "others: call reset_stats() first"
            )
        return rater

    @staticmethod
    def _make_rater(options: Options, model: PreTrainedModel) -> Rater:
        return Rater.of_model(options.routing, model, model.config.get_text_config(decoder=True))

    def _prepare(self, model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
        """Get ready for a model with these attention layers.

        Raises
        ------
        RuntimeError
            The press has statistics of another model, or of other experts and routers.
        ValueError
            The calibrated router was fitted to another model.
        """
        if isinstance(self.router, str) and self.router != "auto":
            self.router = load_router(self.router)
        self._model = weakref.ref(model)
        options, rater = self._options(), self._rater
        if rater is not None and rater.routers:
            rater.routers.check(layers)
            if rater.calibrated is not None:
                rater.distance = _check_again(rater.calibrated, model)
            self._rater_for(options)
        else:
            rater = self._rater = self._make_rater(options, model)
        rater.routers.begin()

    # --- The block --------------------------------------------------------------------------------

    @contextmanager
    def __call__(
        self,
        model: PreTrainedModel,
        *,
        context_length: int | None = None,
        record: bool = False,
    ) -> Iterator[None]:
        """Compress the prefills that run in the block.

        Parameters
        ----------
        model : PreTrainedModel
            Or PEFT's wrapper around one.
        context_length : int, optional
            Length of a prompt, padding included, that is fed in several forwards (as
            ``moekv.prefill_in_chunks`` does). After each, pairs are evicted until the cache holds
            no more than the whole prompt will retain: the peak is that and a chunk. Layers become
            ragged, whatever the budget. None: a prefill is one forward.
        record : bool
            Record which pairs of a prefill are retained, and which expert picked each, for
            :meth:`report`: two bytes a pair, until the next block begins.

        Raises
        ------
        TypeError
            The model has no decoder layers with attention, or its cache cannot be served.
        ValueError
            All its layers have sliding windows; or eager attention cannot serve what would result;
            or a prompt in chunks is to be recorded.
        RuntimeError
            Another press is open on the model, or this one on another model; or, raised by a
            forward in the block: it cannot be compressed, or it was to be and was not.
        """
        model = language_model(model)
        check_flag("record", record)
        if record and context_length is not None:
            raise ValueError(
                "expected record or context_length, got both: a record is of a prefill in one "
                "forward, which is compressed once"
            )
        with self._lock:
            if self._session is not None or self._opening:
                raise RuntimeError("expected a press in one block at a time, got a second one")
            self._opening = True
        try:
            self._recording = None
            decoder, layers = find_layers(model)  # or it is refused
            self._prepare(model, layers)
            self._session = Session(
                model,
                decoder,
                layers,
                options=self._options,
                rater=self._rater_for,
                statistics=lambda: self._statistics,
                context_length=context_length,
                note=self._note if record else None,
            )
        finally:
            self._opening = False
        try:
            with self._session.open():
                yield
            self._warn_of_idle()
        finally:
            self._session = None

    def _note(self, recording: Recording) -> None:
        self._recording = replace(recording, press=repr(self))

    def _warn_of_idle(self) -> None:
        rater = self._rater
        if rater is None or self.policy == "dominant":
            return
        silent = self._statistics.silent
        named = [] if silent is None else silent.tolist()
        if named := [name for name, is_so in zip(rater.names, named, strict=False) if is_so]:
            logger.warning(
                "%s was not counted: expected scores that differ, got the same, NaN or infinity "
                "for all pairs",
                ", ".join(named),
            )
        routed = {expert.name for expert in rater.routed} - set(named)
        options = self._checked  # those that acted last: what is set now may be wrong
        assert options is not None
        asked = options.window != MoERouterPress.window
        if asked and options.evicts and options.decoding is None and not rater.observes:
            logger.warning(
                "window=%d was not used: no expert that scores here (%s) looks at the last "
                "queries, as 'selective' does",
                options.window,
                ", ".join(expert.name for expert in rater.shared),
            )
        if idle := [name for name in self._idle() if name in routed]:
            logger.warning(
                "no token was routed to %s: raise top_k, or leave that expert out",
                ", ".join(idle),
            )

    def _idle(self) -> list[str]:
        """Name the experts that no token was routed to, but for those that only stand in."""
        rater = self._rater
        if rater is None:
            return []
        idle = self._statistics.idle(rater.names)
        return [name for name in idle if not rater.stands_in or name in rater.names[:1]]

    # --- Statistics -------------------------------------------------------------------------------

    def get_stats(self) -> Stats:
        """Read what the press has measured since it was made or reset. Waits for the device.

        Returns
        -------
        dict
            ``forward_count``: how often the layer that was scored most often has been scored: once
            for each prefill, and for each compression while decoding or between chunks.
            ``total_aux_loss``: auxiliary losses, summed over layers and forwards;
            ``avg_aux_loss``: that per forward.
            ``router``: the router in use, the model it was calibrated for, and the distance of that
            model's weights from this one's, if they differ.
            ``budget``, ``pairs`` and ``fold``: as ``asked`` for, and as ``used`` last (None:
            nothing has been compressed); ``why_not``: why evicted pairs joined no others.
            ``never_chosen``: experts that no token of any layer was routed to, but for those that
            only stand in for another; the end of a block logs a warning for those that are routed.
            ``compression``: ``bytes_before``, ``bytes_after``, ``bytes_freed`` of the storages of
            the layers that the press compressed; ``ratio``, the exact share of the real pairs'
            bytes that was removed, and ``evicted``, the share of the pairs: smaller where they are
            quantised, 0 where quantising alone was enough; ``folded``, the share of evicted pairs
            that joined retained ones. Where a cache is compressed again, every
            pair counts once: in "before" from its first compression on, in "after" while it is
            retained. Room for later tokens does not count. (Inside a wrapper such as
            ``kvpress.DecodingPress`` each compression counts by itself.)
            ``cache``: the cache that was compressed last, as it is now, also while ``generate``
            runs: ``bytes_held`` by its storages (None: it is gone, or a wrapper's); split into
            ``bytes_by_kind``: ``pairs``, their ``scales`` and ``biases``, the ``tail`` of later
            tokens, and ``notes`` for the next compression; ``bits_per_number`` of the compressed
            pairs, scales and biases counted; ``bytes_allowed`` where `decoding` bounds the cache;
            and ``evictions``, the number of pairs evicted so far.
            ``layer_stats``: for each layer index

            - ``kept_pairs``: pairs that each head retained at the last compression, summed over
              rows;
            - ``router_stats``: ``expert_usage_ratios`` and ``expert_usage_count`` (how
              often each expert was chosen, as a share and as a number), ``total_tokens`` (real
              ones; those of a window that is routed again count again), ``routing_decisions``
              (choices, summed over experts), ``router_entropy`` (of the probabilities, mean over
              tokens, in nats), ``history_bias`` (by how much measured hit rates move the choice of
              each routed expert, in units of probability; empty for other routers than ``"pikv"``);
            - ``expert_compression_stats``: ``expert_usage`` (share of the positions' weight that
              the expert had), ``compression_ratios`` (share removed of the pairs that it rated,
              by weight; NaN if it scored none, or if a wrapper evicted), ``cache_hit_rates``
              (share of the attention of the last ``window`` queries, of 8 where no expert scores by
              them, on the pairs that the expert alone would retain, in [0, 1]: moving average over
              calls), ``later_hit_rates`` (the same of queries after a compression in the same
              block, over the retained pairs, at every 16th step; evicted pairs cannot be measured.
              NaN: not measured, as where no router has a history, or the expert has not acted),

            each by the expert's name.
        """
        rater = self._rater
        assert self._checked is not None
        routing = self._checked.routing if rater is None else rater.routing
        found = routing.calibrated if rater is None else rater.calibrated
        calibrated = found if isinstance(found, CalibratedRouter) else None
        names = [] if rater is None else rater.names
        distance = 0.0 if rater is None else rater.distance
        name = name_router(routing, calibrated, distance)
        history = {} if rater is None else rater.history()
        asked = self.budget, self.pairs, self.fold
        return self._statistics.report(names, name, *asked, self._idle(), history)

    def summary(self) -> None:
        """Print the options and the main statistics in about ten lines."""
        # Imported here: only a summary needs rich.
        from moekv.press.summary import print_summary

        print_summary(repr(self), self.get_stats())

    def report(
        self,
        path: str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase,
        input_ids: Tensor | Sequence[int],
        *,
        row: int = 0,
    ) -> None:
        """Write a page that shows what the last prefill retained, in a block with ``record=True``.

        One HTML file that loads nothing: bytes, retained pairs by layer and head, the experts'
        weights, and the text, each token shaded by how many heads retained it.

        Parameters
        ----------
        path : path
            The file to write or replace. It contains the text.
        tokenizer : PreTrainedTokenizerBase
        input_ids : Tensor [B, T] or [T], int64, or sequence of T ints
            The tokens of that prefill.
        row : int
            Row of the batch.

        Raises
        ------
        RuntimeError
            Nothing has been recorded.
        TypeError, ValueError
            Tokenizer or tokens are not what they should be, there are more or fewer tokens than
            were prefilled, or there is no such row.
        OSError
            The file cannot be written.

        Examples
        --------
        >>> with press(model, record=True):  # doctest: +SKIP
        ...     out = model.generate(input_ids, max_new_tokens=100)
        >>> press.report("report.html", tokenizer, input_ids)  # doctest: +SKIP
        """
        # Imported here: only a report needs it.
        from moekv.report.page import write_page

        write_page(path, self.recording(), tokenizer, input_ids, row=row)

    def recording(self) -> Recording:
        """Return the record of the last prefill.

        Raises
        ------
        RuntimeError
            There is none: see ``record`` of a block.
        """
        if self._recording is None:
            raise RuntimeError(
                "expected a recorded prefill, got none: run one in a block of this press's own, "
                "`with press(model, record=True):`, and report before the next block begins"
            )
        return self._recording

    def reset_stats(self) -> None:
        """Forget all measurements: statistics, routers' histories, and the model they belong to."""
        self._rater, self._statistics = None, Statistics()


def _which_names_the_block(init: Callable[..., None]) -> Callable[..., None]:
    """Have a constructor say where the length of a prompt belongs, which it does not take."""

    @functools.wraps(init)
    def construct(self: MoERouterPress, *args: Any, **options: Any) -> None:
        if "context_length" in options:
            raise ValueError(
                "expected context_length where a block begins, which is of one prompt, `with "
                "press(model, context_length=n):`, got it as an option of the press"
            )
        init(self, *args, **options)

    return construct


MoERouterPress.__init__ = _which_names_the_block(MoERouterPress.__init__)  # type: ignore[method-assign]


def _check_again(calibrated: CalibratedRouter, model: PreTrainedModel) -> float:
    """Check that a router still fits the model: its weights may have changed since."""
    try:
        return calibrated.check(model)
    except ValueError as error:
        raise ValueError(f"{error}; reset_stats() first, for another router or none") from None


def _nobody() -> None:
    """Stand in for a weak reference to a model."""


def _same(given: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether all options have the same values and types as before."""
    pairs = ((value, before.get(name)) for name, value in given.items())
    return all(a is b or (type(a) is type(b) and a == b) for a, b in pairs)
