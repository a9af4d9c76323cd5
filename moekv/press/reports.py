"""Types of the dictionaries that `get_stats` returns."""

from __future__ import annotations

from typing import TypedDict


class RouterStats(TypedDict):
    """Statistics of a layer's router; dictionaries are by the expert's name."""

    expert_usage_ratios: dict[str, float]
    expert_usage_count: dict[str, int]
    total_tokens: int
    routing_decisions: int
    router_entropy: float
    history_bias: dict[str, float]


class ExpertStats(TypedDict):
    """Statistics of a layer's experts, by name."""

    expert_usage: dict[str, float]
    compression_ratios: dict[str, float]
    cache_hit_rates: dict[str, float]
    later_hit_rates: dict[str, float]


class LayerReport(TypedDict):
    """Statistics of a layer."""

    router_stats: RouterStats
    expert_compression_stats: ExpertStats
    kept_pairs: list[int]


class BudgetReport(TypedDict):
    """The budget option, and the budget used last; None: nothing was compressed."""

    asked: str
    used: str | None


class PairsReport(TypedDict):
    """The storage format option, and the format used last; None: nothing was compressed."""

    asked: str
    used: str | None


class FoldReport(TypedDict):
    """The option to fold, and whether it was done last; None: nothing was compressed.

    ``why_not``: why evicted pairs joined no others; None: they did, or nothing was compressed.
    """

    asked: bool | str
    used: bool | None
    why_not: str | None


class Compression(TypedDict):
    """Bytes of storages, and the exact shares removed: of the bytes, and of the pairs.

    ``folded``: the share of the evicted pairs that joined retained ones.
    """

    bytes_before: int
    bytes_after: int
    bytes_freed: int
    ratio: float
    evicted: float
    folded: float


class HeldCache(TypedDict):
    """The cache that was compressed last, as it is now."""

    bytes_held: int | None
    bytes_by_kind: dict[str, int] | None
    bits_per_number: float | None
    bytes_allowed: int | None
    evictions: int


class Stats(TypedDict):
    """Everything, see ``MoERouterPress.get_stats``."""

    total_aux_loss: float
    avg_aux_loss: float
    forward_count: int
    router: str
    budget: BudgetReport
    pairs: PairsReport
    fold: FoldReport
    never_chosen: list[str]
    compression: Compression
    cache: HeldCache
    layer_stats: dict[int, LayerReport]
