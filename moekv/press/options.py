"""The options of a press: checked, and frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from moekv import ops
from moekv.budget import BUDGETS, check_ratio
from moekv.cache.rows import check_pairs, gain
from moekv.press.checks import check_choice, check_count, check_flag
from moekv.press.routing import Routing, check_able, routing_of
from moekv.units import kind

Policy = Literal["mixture", "dominant"]
POLICIES = get_args(Policy)

FEW_BITS = 1.12
"""Bits per number of a cache below which ``pairs="auto"`` stores keys in 4 bits as well: that loses
less than evicting more pairs. Measured with 4, 1.6, .8 and .3 bits (docs/results-bytes.md): 8-bit
keys lose less with the first two, 4-bit keys with the last two."""

OFTEN = "pairs leave more than once"
"""Why they do not join others: who joins whom is known once, when the whole text has been read."""

FOLD_FROM = 0.5
"""Share of evicted pairs from which ``fold="auto"`` has them join retained ones. Measured with
shares of .4, .5, .6, .75, .85 and more (docs/design.md): little to gain with the first, a quarter
of the KL divergence with the second, half and more with the others."""


@dataclass(frozen=True)
class DecodingConfig:
    """Compress during decoding.

    Tokens are added until a head holds ``target + interval`` pairs; then pairs are evicted until it
    holds ``target``. With a budget over the heads of a layer or of the model these are averages
    over them, and exact as such. So decoding token by token never holds more than ``target +
    interval``, however long it goes on. A prefill, too, leaves at most ``target``.

    Parameters
    ----------
    target : int
        Pairs of a head after each compression; at least 1.
    interval : int
        Tokens between two compressions; at least 1. A larger one costs less per token, and more
        queries (at most the press's ``window``) are observed.

    Raises
    ------
    ValueError
        One is not an integer, or less than 1.
    """

    target: int = 2048
    interval: int = 512

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("target", "interval"):
            check_count(name, getattr(self, name), 1)


@dataclass(frozen=True)
class Options:
    """Options of ``MoERouterPress``, see there, checked one by one and against each other.

    Attributes
    ----------
    routing : Routing
        Options of experts and routers.
    """

    routing: Routing
    compression_ratio: float
    policy: str
    budget: str
    backend: str
    sinks: int
    recent: int
    window: int
    decoding: DecodingConfig | None
    streaming: bool
    pairs: str
    fold: bool | str

    @classmethod
    def of(cls, given: Mapping[str, Any], known: Sequence[Routing] = ()) -> Options:
        """Check what a press was given.

        Parameters
        ----------
        given : mapping
            Of every option of the press.
        known : sequence of Routing
            Earlier ones, whose experts are reused where the options are the same.

        Raises
        ------
        ValueError, TypeError, RuntimeError
            See ``MoERouterPress``.
        """
        check_ratio(given["compression_ratio"])
        check_choice("policy", given["policy"], POLICIES)
        check_choice("budget", given["budget"], BUDGETS)
        ops.check_backend(given["backend"])
        for name, least in (("sinks", 0), ("recent", 0), ("window", 1)):
            check_count(name, given[name], least)
        check_flag("streaming", given["streaming"])
        check_choice("pairs", given["pairs"], (*ops.PAIRS, "auto"))
        if given["fold"] != "auto":
            check_flag("fold", given["fold"])
        if given["cache_aware"] is not None:
            check_flag("cache_aware", given["cache_aware"])
        decoding = given["decoding"]
        if decoding is not None and not isinstance(decoding, DecodingConfig):
            came = kind(decoding) if isinstance(decoding, type) else repr(decoding)
            raise TypeError(f"expected decoding a moekv.DecodingConfig, got {came}")
        if given["policy"] == "dominant":
            _check_dominant(given)
        if given["fold"] is True:
            _check_fold(given)
        if given["streaming"] and given["budget"] == "layer":
            raise ValueError(
                "expected a budget other than 'layer' with streaming: the length of a layer "
                "is known only after the last layer"
            )
        routing = routing_of(given, known)
        if decoding is not None and routing.experts is not None and routing.calibrated is None:
            check_able(routing.experts)
        own = {field.name for field in fields(cls)} - {"routing"}
        return cls(routing, **{name: given[name] for name in own})

    @property
    def evicts(self) -> bool:
        """Whether any pair may be evicted."""
        by_ratio = self.compression_ratio > 0
        return by_ratio or self.policy == "dominant" or self.decoding is not None

    @property
    def quantises(self) -> bool:
        """Whether pairs are stored in fewer bits."""
        return self.pairs != "16"

    @property
    def folds(self) -> bool:
        """Whether evicted pairs join those that stay; where ``fold`` is "auto", it does not."""
        return self.fold is True and self.quantises and self.evicts

    @property
    def acts(self) -> bool:
        """Whether caches are changed."""
        return self.evicts or self.quantises

    def in_format(
        self, sizes: tuple[int, int, torch.dtype] | None, device: torch.device | None = None
    ) -> Options:
        """Return what ``pairs="auto"`` stands for.

        Parameters
        ----------
        sizes : tuple of int, int, torch.dtype, or None
            Channels of a key and a value, and their dtype; None: they keep that dtype.
        device : torch.device, optional
            Of the pairs; the CPU by default.
        """
        if self.pairs != "auto":
            return self
        room, device = 1 - self.compression_ratio, device or torch.device("cpu")
        return replace(self, pairs=_best_pairs(room, sizes, device=device, backend=self.backend))

    def unfolded(
        self,
        sizes: tuple[int, int, torch.dtype] | None,
        *,
        expects: bool,
        device: torch.device,
    ) -> str | None:
        """Say why no pair that leaves after a prefill in one forward joins another; None: they do.

        Parameters
        ----------
        sizes : tuple of int, int, torch.dtype, or None
            As of :meth:`in_format`, whose result these options have to be.
        expects : bool
            Whether an expert needs the queries that say who joins whom as well.
        device : torch.device
            Of the pairs.
        """
        if self.fold is False or not self.evicts:
            return "fold is False" if self.evicts else "nothing is evicted"
        if not self.quantises:
            return "pairs are stored in 16 bits, without biases"
        if self.fold is True:
            return None
        if self.streaming or self.decoding is not None:
            return OFTEN
        if not expects or sizes is None:
            return "no expert asks the text's queries again, as 'expected' does"
        if device.type != "cpu":
            return f"fold_pairs has no kernel for {device.type}"
        evicted = 1 - (1 - self.compression_ratio) * gain(self.pairs, *_empty(sizes), biased=True)
        if evicted < FOLD_FROM:
            return f"{evicted:.0%} of the pairs leave, less than {FOLD_FROM:.0%}"
        return None


def _best_pairs(
    room: float, sizes: tuple[int, int, torch.dtype] | None, *, device: torch.device, backend: str
) -> str:
    """Name the format that loses least where this share of the bytes is retained."""
    if sizes is None or room == 1:
        return "16"
    best = "k8v4" if 8 * sizes[2].itemsize * room >= FEW_BITS else "k4v4"
    if room * gain("k8v8", *_empty(sizes)) >= 1:  # all pairs stay
        best = "k8v8"
    for pairs in (best, "k8v8"):
        try:
            check_pairs(pairs, *sizes, device=device, backend=backend)
        except (RuntimeError, ValueError):
            continue
        return pairs
    return "16"


def _empty(sizes: tuple[int, int, torch.dtype]) -> tuple[torch.Tensor, torch.Tensor]:
    """Make keys and values of these channels and dtype, without pairs."""
    key_dim, value_dim, dtype = sizes
    nothing = torch.empty(0, dtype=dtype, device="cpu")
    return nothing.view(0, key_dim), nothing.view(0, value_dim)


def _check_fold(given: Mapping[str, Any]) -> None:
    if given["pairs"] == "16":
        raise ValueError(
            "expected quantised pairs (pairs 'auto', 'k8v8', 'k8v4' or 'k4v4') with fold, got '16'"
        )
    for name in ("streaming", "decoding"):
        if given[name]:
            raise ValueError(
                f"expected fold or {name}, got both: pairs join others once, when the whole text "
                "has been read"
            )


def _check_dominant(given: Mapping[str, Any]) -> None:
    if given["budget"] not in ("auto", "uniform"):
        raise ValueError(
            "expected budget 'uniform' with policy 'dominant', in which one expert sets how many "
            f"pairs each head keeps, got {given['budget']!r}"
        )
    if given["streaming"]:
        raise ValueError(
            "expected policy 'mixture' with streaming, got 'dominant', whose layers may differ "
            "in length, which is known only after the last layer"
        )
    if given["decoding"] is not None:
        raise ValueError(
            "expected policy 'mixture' where compression goes on during decoding or between "
            "chunks, got 'dominant', which has no budget to come back to"
        )
