"""A budget that is kept while the layers of a prefill arrive.

Where layers do not share it, each is compressed when it arrives. A budget over the model can be
kept, too. Of the layers seen so far, never more pairs can stay in the end than it has. So when a
layer arrives, the best of all pairs seen are chosen, as many as the budget has, and what falls
behind leaves: those before it stay before it, whatever follows. After the last layer exactly the
pairs are left that one selection over all of them would have kept, and at no time there were more
than the budget, a slack, and one whole layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from moekv.budget import Kept, select, select_over_layers, without_padding
from moekv.cache import cached_pairs, empty_cache
from moekv.layers import RaggedLayer, compressed, storage_bytes

SLACK = 1 / 8
"""Share of the budget by which pairs may exceed it before older layers are copied once more."""


@dataclass
class Trimmed:
    """A layer of the stream.

    Attributes
    ----------
    index : int
        In the cache.
    layer : CacheLayerMixin
        What holds its pairs now.
    before : int
        Bytes of the storages that it came with.
    kept : Kept or None
        What it holds; None: all that it came with.
    size : int
        Pairs that it holds.
    """

    index: int
    layer: CacheLayerMixin
    before: int
    kept: Kept | None
    size: int

    @property
    def after(self) -> int:
        """Bytes of the storages that hold its pairs now."""
        if isinstance(self.layer, RaggedLayer):
            return self.layer.nbytes
        return storage_bytes(*cached_pairs(self.layer))


class StreamingBudget:
    """Trims the layers of one prefill to their budget, as they arrive.

    Parameters
    ----------
    cache : Cache
        Of the prefill. Its layers are replaced.
    budget : str
        ``"uniform"``, ``"head"`` or ``"model"``, see ``moekv.budget``.
    num_layers : int
        Layers of the prefill, L.
    totals, lengths : sequence of B ints
        Pairs that a head of each row keeps on average, and real pairs that it has.
    start : Tensor [B], int32, or None
        Padding at the left of each row.
    sinks, recent : int
        First and last real positions that every head keeps, as far as the total allows.
    backend : str
        Of the ops.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        budget: str,
        num_layers: int,
        totals: Sequence[int],
        lengths: Sequence[int],
        start: Tensor | None,
        sinks: int,
        recent: int,
        backend: str,
    ) -> None:
        self.layers: list[Trimmed] = []
        self._cache = cache
        self._budget = budget
        self._num_layers = num_layers
        self._totals = totals
        self._lengths = lengths
        self._start = start
        self._protected = {"sinks": sinks, "recent": recent}
        self._backend = backend
        self._scores: list[Tensor] = []

    def add(self, index: int, scores: Tensor) -> None:
        """Take in the next layer, and trim what can no longer stay.

        A budget over the model waits for the device.

        Parameters
        ----------
        index : int
            Of the layer in the cache; its keys and values are as the prefill left them.
        scores : Tensor [B, H, T], float32
            On one scale with those of the other layers.

        Raises
        ------
        RuntimeError
            Somebody else has replaced a layer of the stream.
        """
        layer = self._cache.layers[index]
        before = storage_bytes(*cached_pairs(layer))
        self.layers.append(Trimmed(index, layer, before, None, scores.numel()))
        if self._budget == "model":
            self._scores.append(scores)
            self._trim_all()
            return
        (kept,) = select(
            [scores],
            self._start,
            self._totals,
            budget=self._budget,
            backend=self._backend,
            **self._protected,
        )
        self._trim(self.layers[-1], without_padding(kept, self._start, self._lengths))

    def _trim_all(self) -> None:
        """Leave of all layers so far what the model's budget can still keep."""
        scores = self._scores[-1]
        heads = scores.shape[1]
        budget = [self._num_layers * heads * n for n in self._totals]
        real = [len(self.layers) * heads * max(n, 1) for n in self._lengths]
        last = len(self.layers) == self._num_layers
        if self._start is None and not last and sum(real) <= sum(budget):
            return
        chosen = select_over_layers(
            self._scores,
            self._start,
            [min(pair) for pair in zip(budget, real, strict=True)],
            backend=self._backend,
            **self._protected,
        )
        chosen = [without_padding(kept, self._start, self._lengths) for kept in chosen]
        self._trim(self.layers[-1], chosen[-1])
        if last or sum(layer.size for layer in self.layers) > (1 + SLACK) * sum(budget):
            for trimmed, kept in zip(self.layers, chosen, strict=True):
                if trimmed.kept is not None and not last:
                    # A budget below sinks and recent positions protects fewer of them with every
                    # layer, and may use what that leaves for pairs that have gone. Only what the
                    # last selection keeps is sure to be among those of all before.
                    kept = Kept.from_mask(kept.mask() & trimmed.kept.mask())
                self._trim(trimmed, kept)

    def abort(self) -> None:
        """Empty the cache: part of a prefill is of no use."""
        empty_cache(self._cache)

    def _trim(self, trimmed: Trimmed, kept: Kept) -> None:
        """Leave only the kept pairs in a layer, which are among those that it holds."""
        if self._cache.layers[trimmed.index] is not trimmed.layer:
            raise RuntimeError(
                "expected the cache as it was left, got one in which somebody else has replaced "
                f"layer {trimmed.index} meanwhile; kvpress.ComposedPress chains presses"
            )
        layer = trimmed.layer
        if not isinstance(layer, RaggedLayer):
            layer = compressed(*cached_pairs(layer), kept, backend=self._backend)
        elif len(kept.indices) < trimmed.size:
            assert trimmed.kept is not None
            layer = layer.subset(kept, of=trimmed.kept)
        self._cache.layers[trimmed.index] = trimmed.layer = layer
        trimmed.kept, trimmed.size = kept, len(kept.indices)
