"""The press: what a user holds. It keeps options, hands out blocks, and reads statistics."""

from __future__ import annotations

import copy
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moekv.budget import Budget
from moekv.calibration.router import CalibratedRouter, is_folder, load_router
from moekv.experts.base import Expert
from moekv.models.hooks import find_layers
from moekv.models.weights import language_model
from moekv.ops import Backend
from moekv.press.options import DecodingConfig, Options, Policy, check_flag
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

    An expert orders the pairs of a layer. One is shared by all tokens; beside it, each token is
    routed to a few others. Every expert has a share of the budget, the shared one nine tenths and
    each routed one what the gates gave it on average, and picks pairs in its order until its share
    is used up; what several pick is paid for once. The pairs that nobody picks leave, and their
    memory is freed.

    Inside ``with press(model):`` each prefill is compressed once, when its last layer has run: an
    exception before that leaves the cache whole. Until then the full cache is held, so the peak is
    that of a prefill without compression (see `streaming`). Decoding steps compress nothing unless
    `decoding` says so (or ``kvpress.DecodingPress`` does). As a part of a kvpress wrapper the press
    acts on each layer at once.

    Parameters
    ----------
    compression_ratio : float
        Share of the bytes to remove, in [0, 1). A head keeps exactly
        ``max(1, int(T * (1 - compression_ratio)))`` pairs, of the T real ones of its row, on
        average over the heads that share a budget; 0 measures and removes nothing. Where pairs
        are quantised, as many more stay as fit into these bytes, scales counted, or all.
    num_experts : int or "auto", optional
        As many routed experts from the registry, in its order, the shared one left out. ``"auto"``:
        ``floor(log2(layers * KV heads))``, at least `top_k`, at most all: the more heads, the more
        kinds of them. If none of `num_experts`, `top_k`, `router_type` and `experts` is given,
        a calibrated router rates alone, if there is one; else ``selective`` and ``semantic`` are
        routed. If only others of them are given, it is 4.
    top_k : int, optional
        Routed experts per token. Unless given, all of a list (`experts`), and 2 otherwise.
    router_type : str or BaseMoERouter, optional
        A key of ``moekv.routing.registry.ROUTERS``; ``"pikv"`` unless given. Or a router of as many
        experts, of which every layer gets a copy: so options of one class alone are given. A router
        that nobody trained goes by what the experts themselves say of a token, and by how much of
        the observed attention each would have kept (``moekv.routing.evidence``).
    cache_aware : bool, optional
        Whether a ``"pikv"`` router's choices follow the measured hit rates, as they do unless
        False is given; other routers have no history.
    policy : str
        ``"mixture"``: see above. ``"dominant"``: the expert with the highest mean probability over
        a layer's real tokens rules the layer alone, by its own ``Expert.kept``. Layers of
        different lengths result, which eager attention cannot serve.
    budget : str
        ``"uniform"``: each head keeps the same number, in plain dense layers. ``"layer"``: dense
        layers, too, of different lengths: each of what its heads would keep on average under one
        threshold over the model, and over the rows of a batch, which share a dense layer's length
        (with padding no layer is dense, and each row has its own). ``"head"``: pairs move between
        the heads of a layer; ``"model"``: between the heads of all layers. Both give ragged
        layers. ``"auto"``: ``"model"``; ``"layer"`` where eager attention needs dense layers;
        ``"uniform"`` where static caches need them of one length, a dominant policy rules, or one
        expert alone rates whose scores cannot be compared between heads (see
        ``Expert.comparable``).
    backend : str
        ``"auto"`` (by the device of the tensors), ``"cpu"``, ``"cuda"`` or ``"torch"``.
    experts : sequence, optional
        Names, ``Expert`` instances or kvpress scorers to be routed, instead of the registry's first
        `num_experts`. No expert is shared then, unless `shared` or `router` say so.
    shared : str, Expert, kvpress scorer or None
        The expert that all tokens share. ``"auto"``: the calibrated router, if there is one, or
        ``expected``; none beside `experts`, and with policy ``"dominant"``. None: none.
    sinks : int
        First real positions that stay in any case: attention leans on them whatever they
        say (StreamingLLM).
    recent : int
        Last real positions that stay in any case: too few queries have seen them to judge. More
        of them, at most `window`, where a forward asks for the logits of its last tokens
        (``logits_to_keep``), as assisted decoding does, which may take these back.
    window : int
        Last tokens whose queries are observed.
    decoding : DecodingConfig, optional
        Compress during decoding, too, so that a cache never exceeds its budget.
    streaming : bool
        Trim each layer as it arrives, instead of all after the last. What stays is the same; the
        peak is the budget and one whole layer, and with a budget over the model an eighth of the
        budget more. The price of that budget: a selection over all layers so far for every layer,
        and older ones are copied a few times. An exception halfway leaves the cache empty instead
        of whole.
    router : CalibratedRouter, str or None
        A calibrated router, which brings its own experts and gates and is the shared expert; or the
        folder or hub id of one, which a block asks for.
        It has to see every token in a block of its own.
        ``"auto"``: the one that comes with the package for the model, if there is one, unless
        `experts`, `shared` or policy ``"dominant"`` ask for something else, or the first cache that
        the press rates holds tokens that it has not seen (as inside ``kvpress.DecodingPress``);
        ``get_stats()["router"]`` says which one is at work. None: none.

    pairs : str
        How pairs are stored that stay. ``"16"``: as the model makes them. ``"k8v8"``, ``"k8v4"``,
        ``"k4v4"``: so many bits for each number of a key and of a value, and a few bits for scales
        (``moekv.ops.quantize_pairs``), in ragged layers whatever the budget. Later tokens are not
        quantised before a compression. A layer that is quantised already keeps its format. With
        `compression_ratio` 0 nothing is evicted. ``"auto"``: what loses least at the ratio, in
        bytes; ``"16"`` with ratio 0, and where nothing else can be served.

    Raises
    ------
    ValueError
        An option is unknown or out of range, or excludes another.
    TypeError
        An expert is none, or `decoding` is no ``DecodingConfig``.
    AttributeError
        An option is set that there is not.
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

    Options may be set later: what is set acts from the next forward on. Experts, routers and
    `backend` can be set until something has been rated, and after :meth:`reset_stats`.

    Threads may share a block, each with caches of its own, if all have ended when it does.
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
        """Set an option. A folder of a router is read at once, the hub asked in a block alone."""
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
        """Take options, and copies of statistics and routers along; no block, model or record."""
        left = {"_lock", "_session", "_opening", "_recording"}
        state = {name: value for name, value in self.__dict__.items() if name not in left}
        state["_statistics"] = copy.copy(self._statistics)
        state["_rater"] = copy.copy(self._rater)
        state["_model"] = _nobody
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was saved."""
        self.__dict__ |= state
        self._lock = threading.Lock()
        self._session, self._opening, self._recording = None, False, None

    # --- Options and what is made of them ---------------------------------------------------------

    def _options(self) -> Options:
        """Options as they are now, checked where one has changed."""
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
        """Give the rater, which has to be one for these options."""
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
        find_layers(model)  # or it is refused
        return Rater.of_model(options.routing, model, model.config.get_text_config(decoder=True))

    def _prepare(self, model: PreTrainedModel) -> None:
        """Get ready for a model.

        Raises
        ------
        RuntimeError
            The press remembers another model, or other experts and routers.
        ValueError
            The calibrated router is another model's.
        """
        if isinstance(self.router, str) and self.router != "auto":
            self.router = load_router(self.router)
        self._model = weakref.ref(model)
        options, rater = self._options(), self._rater
        if rater is not None and rater.routers:
            rater.routers.check(find_layers(model)[1])
            if rater.calibrated is not None:
                rater.distance = _check_again(rater.calibrated, model)
            self._rater_for(options)
        else:
            self._rater = self._make_rater(options, model)

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
            Length of a prompt, padding included, that is fed in several forwards (which
            ``moekv.prefill_in_chunks`` does). Pairs leave after each, as many as it takes to hold
            no more than what stays of the whole prompt: the peak is that and a chunk. Layers become
            ragged, whatever the budget. None: a prefill is one forward.
        record : bool
            Note which pairs of a prefill stay, and which expert spoke for each, for :meth:`report`:
            two bytes a pair, until the next block begins.

        Raises
        ------
        TypeError
            The model has no decoder layers with attention, or its cache cannot be served.
        ValueError
            All its layers have sliding windows; or eager attention cannot serve what would result;
            or a prompt in chunks is to be recorded.
        RuntimeError
            A press is at work on the model, or this one on another; or, from a forward in the
            block: it cannot be compressed, or nothing was, although something was to be.
        """
        model = language_model(model)
        check_flag("record", record)
        if record and context_length is not None:
            raise ValueError(
                "expected record or context_length, got both: a record is of a prefill in one "
                "forward, of which pairs leave once"
            )
        with self._lock:
            if self._session is not None or self._opening:
                raise RuntimeError("expected a press in one block at a time, got a second one")
            self._opening = True
        try:
            self._recording = None
            self._prepare(model)
            self._session = Session(
                model,
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
                "%s said nothing: expected scores that differ, got the same, NaN or infinity for "
                "all pairs, which rank last",
                ", ".join(named),
            )
        routed = {expert.name for expert in rater.routed} - set(named)
        if idle := [name for name in self._statistics.idle(rater.names) if name in routed]:
            logger.warning(
                "no token was sent to %s: raise top_k, or leave out what says nothing",
                ", ".join(idle),
            )

    # --- Statistics -------------------------------------------------------------------------------

    def get_stats(self) -> Stats:
        """Read what the press has measured since it was made or reset. Waits for the device.

        Returns
        -------
        dict
            ``forward_count``: ratings of the layer that was rated most often: one for each
            prefill, and for each compression while decoding or between chunks.
            ``total_aux_loss``: auxiliary losses, summed over layers and forwards;
            ``avg_aux_loss``: that per forward.
            ``router``: which kind is at work, for which model it was calibrated, and how far its
            weights are from those here, if they are not the same.
            ``budget`` and ``pairs``: ``asked`` for, and ``used`` last (None: nothing has been
            compressed).
            ``never_chosen``: experts that no token of any layer was sent to; a block that ends
            warns of those that are routed.
            ``compression``: ``bytes_before``, ``bytes_after``, ``bytes_freed`` of the storages of
            the layers that the press compressed; ``ratio``, the exact share of the real pairs'
            bytes that is gone, and ``evicted``, that of the pairs: less where they are quantised,
            0 where that alone made the room. Where a cache is compressed again, every pair counts
            once: before, when the compression after its coming is done; after, as long as it stays.
            Room for tokens to come does not count. (Inside a wrapper such as
            ``kvpress.DecodingPress`` each compression counts by itself.)
            ``cache``: of the one that was compressed last, as it is now, while ``generate`` runs as
            well: ``bytes_held`` by its storages (None: it is gone, or a wrapper's) and, beside
            them, ``bytes_by_kind``: ``pairs`` and their ``scales``, the ``tail`` of tokens since
            and ``notes`` for the next compression; ``bits_per_number`` of the pairs that were
            compressed, scales counted;
            ``bytes_allowed`` where `decoding` bounds what it may hold; and ``evictions``, the pairs
            that have left so far.
            ``layer_stats``: for each layer index

            - ``kept_pairs``: what each head kept when pairs left last, all rows together;
            - ``router_stats``: ``expert_usage_ratios`` and ``expert_usage_count`` (how
              often each expert was chosen, as a share and as a number), ``total_tokens`` (real
              ones; those of a window that is routed again count again), ``routing_decisions``
              (choices made, all experts together), ``router_entropy`` (of the probabilities,
              mean over tokens, nats), ``history_bias`` (by how much measured hit rates move the
              choice of each routed expert, in units of probability; empty for other routers than
              ``"pikv"``);
            - ``expert_compression_stats``: ``expert_usage`` (share of the positions' weight that
              the expert had), ``compression_ratios`` (share removed of the pairs that it rated,
              by weight; NaN if it rated none, or if a wrapper evicted), ``cache_hit_rates``
              (share of the attention of the last ``window`` queries, of 8 where no expert rates by
              them, that falls on what the expert alone would keep, in [0, 1]: moving average over
              calls), ``later_hit_rates`` (of queries that came after a compression in the same
              block, over the pairs that stayed: of every 16th step; what has left cannot be seen.
              NaN: not measured, as where no router has a history),

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
        return self._statistics.report(names, name, self.budget, self.pairs, history)

    def summary(self) -> None:
        """Print in a few lines what the press was asked for, and what it has done."""
        # Here, for who wants no summary does without what draws it.
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
        """Write a page that shows what stayed of the last prefill, in a block with ``record=True``.

        One HTML file, which asks no network: bytes, kept pairs by layer and head, the experts'
        weights, and the text, each token shaded by how many heads kept it.

        Parameters
        ----------
        path : path
            The file to write or replace. It holds the text.
        tokenizer : PreTrainedTokenizerBase
        input_ids : Tensor [B, T] or [T], int64, or sequence of T ints
            What was prefilled.
        row : int
            Of the batch.

        Raises
        ------
        RuntimeError
            Nothing has been recorded.
        TypeError, ValueError
            Tokenizer or tokens are none, the tokens are not as many as were prefilled, or there is
            no such row.
        OSError
            The file cannot be written.

        Examples
        --------
        >>> with press(model, record=True):  # doctest: +SKIP
        ...     out = model.generate(input_ids, max_new_tokens=100)
        >>> press.report("report.html", tokenizer, input_ids)  # doctest: +SKIP
        """
        # Here, for who wants no page does without what writes it.
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
        """Forget everything measured: statistics, routers' histories, and the model they are of."""
        self._rater, self._statistics = None, Statistics()


def _check_again(calibrated: CalibratedRouter, model: PreTrainedModel) -> float:
    """Check that a router is the model's whose statistics there are: its weights may change."""
    try:
        return calibrated.check(model)
    except ValueError as error:
        raise ValueError(f"{error}; reset_stats() first, for another router or none") from None


def _nobody() -> None:
    """Stand in for a weak reference to a model."""


def _same(given: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether all options are as they were, in kind, too."""
    pairs = ((value, before.get(name)) for name, value in given.items())
    return all(a is b or (type(a) is type(b) and a == b) for a, b in pairs)
