"""kvpress's wrappers, each around a press."""

from collections.abc import Callable

from kvpress import (
    AdaKVPress,
    BasePress,
    CAMPress,
    ChunkKVPress,
    ChunkPress,
    ComposedPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DecodingPress,
    DMSPress,
    EntropyGatedChunkKVPress,
    KeyRerotationPress,
    MergingPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    ScorerPress,
)

CUTTING: dict[str, Callable[[ScorerPress], BasePress]] = {
    "ComposedPress": lambda press: ComposedPress([press]),
    "KeyRerotationPress": KeyRerotationPress,
    "ChunkPress": lambda press: ChunkPress(press, chunk_length=32),
    "ChunkKVPress": lambda press: ChunkKVPress(press, chunk_length=8),
    "EntropyGatedChunkKVPress": EntropyGatedChunkKVPress,
    "CriticalKVPress": CriticalKVPress,
    "MergingPress": MergingPress,
    "PerLayerCompressionPress": lambda press: PerLayerCompressionPress(press, [0.25, 0.75]),
    "PrefillDecodingPress": PrefillDecodingPress,
}
"""Those that cut the cache after a prefill."""

MASKING: dict[str, Callable[[ScorerPress], BasePress]] = {
    "AdaKVPress": AdaKVPress,
    "CriticalAdaKVPress": CriticalAdaKVPress,
    "DMSPress": lambda press: DMSPress(press, threshold=0.05, sliding_window_size=8),
}
"""Those that mask keys instead."""

DECODING: dict[str, Callable[[ScorerPress], BasePress]] = {
    "DecodingPress": lambda press: DecodingPress(press, compression_interval=4, target_size=24),
    "CAMPress": lambda press: CAMPress(press, compression_interval=4, target_size=24),
}
"""Those that act on decoding steps alone."""

WRAPPERS = CUTTING | MASKING | DECODING
