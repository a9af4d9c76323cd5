"""What the experts see of one layer: its cached pairs, the queries on them, the padding."""

import copy
import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekv import ops
from moekv.models.queries import (
    as_queries,
    learn_rotation,
    logit_options,
    project_queries,
    rotate,
    rotates,
    rotations,
    window_queries,
)
from moekv.ops import ScoreKind

POOL = 5
"""Positions that ``ScoreKind.ATTENTION`` averages, as in SnapKV."""

LAG = 128
"""Tokens in a partition of ``ScoreKind.LAG``, as in LagKV."""

OBSERVED = 8
"""Last queries whose attention is observed where no expert rates by it: enough for statistics."""


@dataclass
class LayerView:
    """One attention layer at the moment when its cache is rated.

    Shapes: B batch, H KV heads, Hq query heads, T cached pairs, N tokens whose hidden states are
    known, W window queries, D head dim.

    Where heads keep different numbers of pairs (``moekv.press.growth``), each KV head is a row of
    its own: B is batch times KV heads and H is 1 in all but `hidden_states`.

    Attributes
    ----------
    module : nn.Module
        The attention layer.
    hidden_states : Tensor [B, N, hidden]
        Its input, of the last N tokens of the cache (all of them in a prefill: N = T).
    keys, values : Tensor [B, H, T, D]
        Rotated keys, and values. Not to be written to.
    queries : Tensor [B, Hq, W, D]
        Queries of the last W tokens, rotated at their true positions.
    start : Tensor [B], int32, or None
        Padding positions at the left of each row; None: no padding.
    lengths : tuple of B ints
        Real pairs in each row.
    begins, ends : bool
        Whether the view holds the sequence's first and last token. False inside a sequence which
        is rated in chunks.
    attentions : Tensor or None
        Attention weights, where the attention implementation returns them.
    kwargs : mapping
        Keyword arguments of the layer's forward.
    kinds : sequence of ScoreKind
        What the experts ask of :meth:`scores_of`.
    backend : str
        Of the ops, see ``moekv.ops.BACKENDS``.
    notes : tuple of two Tensor [B, H, T], float32, or None
        For a calibrated router, of a cache that is compressed again: what it read of each pair's
        hidden state when the token came, and the token's position in its row.
    projected : Tensor [B, Hq, N, D] or None
        What the layer asks before queries are rotated, where it is at hand.
    read : Tensor [B, N, H + E] or None
        What a calibrated router has read of the hidden states.
    rotary : nn.Module or None
        The decoder's rotary embedding, for layers that have none of their own.
    turned : dict
        Shared by the views of a forward: what turns keys back from its end.
    """

    module: nn.Module
    hidden_states: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor
    start: Tensor | None
    lengths: tuple[int, ...]
    begins: bool
    ends: bool
    attentions: Tensor | None
    kwargs: Mapping[str, Any]
    kinds: Sequence[ScoreKind] = tuple(ScoreKind)
    backend: str = "auto"
    notes: tuple[Tensor, Tensor] | None = None
    projected: Tensor | None = None
    read: Tensor | None = None
    rotary: nn.Module | None = None
    turned: dict[Any, Tensor] = field(default_factory=dict)

    def released(self) -> "LayerView":
        """Give this view without hidden states and queries; what was made of them stays.

        They are as large as a layer's pairs, or several times that, and most experts can rate
        without them (``Expert.waits``).
        """
        view = copy.copy(self)
        view.hidden_states = self.hidden_states.new_empty(*self.hidden_states.shape[:2], 0)
        view.queries = view.hidden_states
        view.attentions, view.projected, view.kwargs = None, None, {}
        return view

    @property
    def folded(self) -> int:
        """KV heads that are rows of their own: all, or 1 where rows are those of the batch."""
        return self.keys.shape[0] // self.hidden_states.shape[0]

    @property
    def heads(self) -> Tensor:
        """Which of the layer's KV heads each row and column holds: [B, H], int64."""
        batch, num_heads = self.keys.shape[:2]
        heads = torch.arange(num_heads * self.folded, device=self.keys.device)
        return heads.repeat(batch // self.folded).view(batch, num_heads)

    @property
    def aligned(self) -> bool:
        """Whether every cached pair has its hidden state (N = T)."""
        return self.hidden_states.shape[1] == self.keys.shape[2] and self.folded == 1

    @property
    def real(self) -> Tensor:
        """True at real pairs, False at padding: [B, T], bool."""
        return self.positions >= 0

    @property
    def positions(self) -> Tensor:
        """Place of each pair in its row, from 0 at the first real one: [B, T], int64."""
        positions = torch.arange(self.keys.shape[2], device=self.keys.device)
        if self.start is None:
            return positions.expand(self.keys.shape[0], -1)
        return positions - self.start[:, None]

    @property
    def token_mask(self) -> Tensor | None:
        """True at the real ones of the N tokens: [B, N], bool; None where all are real."""
        if self.start is None:
            return None
        return self.real[:: self.folded, -self.hidden_states.shape[1] :].contiguous()

    def scores_of(self, kind: ScoreKind) -> Tensor:
        """Scores of one kind; all kinds are computed together, at the first call.

        Parameters
        ----------
        kind : ScoreKind
            One of ``kinds``.

        Returns
        -------
        Tensor [B, H, T], float32
            See ``moekv.ops.expert_scores``. Not to be written to.
        """
        return self._all_scores[kind]

    def observed(self) -> Tensor:
        """Attention that pairs are seen to get: of all W queries, or of ``OBSERVED`` of them.

        The latter where no expert rates by the queries' attention, whose price is by the query.

        Returns
        -------
        Tensor [B, H, T], float32
            ``ScoreKind.MASS`` of the last queries.
        """
        return self._all_scores[ScoreKind.MASS]

    @functools.cached_property
    def _all_scores(self) -> dict[ScoreKind, Tensor]:
        kinds = sorted({ScoreKind.MASS, *self.kinds})
        queries = self.queries
        if {ScoreKind.MASS, ScoreKind.ATTENTION}.isdisjoint(self.kinds):
            queries = queries[:, :, -OBSERVED:]
        scores = ops.expert_scores(
            self.keys,
            self.values,
            queries,
            self.start,
            kinds=kinds,
            **self._logits,
            pool=POOL,
            lag=LAG,
            backend=self.backend,
        )
        return dict(zip(kinds, scores.unbind(), strict=True))

    def expected(self) -> Tensor:
        """Attention that the pairs can expect; the view has to be ``aligned``.

        Computed at the first call.

        Returns
        -------
        Tensor [B, H, T], float32
            See ``moekv.ops.expected_attention``. Not to be written to.

        Raises
        ------
        ValueError
            The layer forms its queries in a way of its own.
        """
        return self._expected

    @functools.cached_property
    def _expected(self) -> Tensor:
        if rotates(self.module) is None:
            raise ValueError(
                "expected an attention layer whose queries are its projected inputs, normed or "
                f"not, and rotated or not, got {type(self.module).__name__} whose are others; "
                "choose experts that need no queries but the last, as MoERouterPress(num_experts=4)"
            )
        projected = self.projected
        if projected is None:
            projected = project_queries(self.module, self.hidden_states)
        keys = torch.matmul(self.keys, self._turned_back()[:, None])
        return ops.expected_attention(
            projected.to(keys.dtype),
            keys,
            self.start,
            softcap=self._logits["softcap"],
            backend=self.backend,
        )

    @functools.cached_property
    def _logits(self) -> dict[str, float]:
        return logit_options(self.module)

    def _turned_back(self) -> Tensor:
        """Matrices [B or 1, D, D] that turn keys back by the position behind the last token.

        Their products with queries that nobody has rotated are then the logits of queries that
        stand there: a query turned forward is many numbers more.
        """
        scaling = self._logits["scaling"]
        dtype, device = self.keys.dtype, self.keys.device
        # The layers of a forward most likely share their rotations, and this as well.
        shared = id(self.kwargs["position_embeddings"][0])  # as long as the forward lasts
        key = shared, scaling, dtype, device, rotates(self.module)
        back = self.turned.get(key)
        if back is None:
            eye = torch.eye(self.keys.shape[3], device=device)
            cos, sin = rotations(self.module, eye, self.kwargs, range(1, 2), self.rotary)
            forward = rotate(self.module, eye.expand(len(cos), 1, -1, -1), cos, sin)[:, 0]
            back = (forward.mT * scaling).to(dtype)
            self.turned[key] = back
        return back


class ViewBuilder:
    """Builds the views of one forward from what its hooks get, and reads its mask only once.

    Parameters
    ----------
    rotary : nn.Module, optional
        The decoder's rotary embedding, for layers that have none of their own.
    """

    def __init__(self, rotary: nn.Module | None = None) -> None:
        self.rotary = rotary
        self._turned: dict[Any, Tensor] = {}
        self._mask: weakref.ref[Tensor] | None = None
        self._starts: tuple[int, ...] = ()

    def __call__(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: Mapping[str, Any],
        *,
        window: int,
        kinds: Sequence[ScoreKind],
        backend: str,
        queries: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> LayerView:
        """Look at one layer.

        Parameters
        ----------
        module, hidden_states, keys, values, attentions, kwargs
            As in ``kvpress.ScorerPress.score``: the whole prefill, a chunk of it (``ChunkPress``),
            or a cache of which only the last tokens' hidden states are at hand
            (``DecodingPress``).
        window : int
            Tokens whose queries are taken, at most.
        kinds : sequence of ScoreKind
            Scores that the view can give.
        backend : str
            Of the ops.
        queries : Tensor [B, Hq, W, D], optional
            The last rotated queries of a whole prefill, where they are at hand. None, or another
            number than `window` asks for: they are computed from the hidden states.
        projected : Tensor, optional
            What the layer's query projection gave for the hidden states, see
            :func:`projected_queries`.

        Returns
        -------
        LayerView

        Raises
        ------
        ValueError
            The cache holds fewer pairs than there are hidden states, or these are in an order that
            leaves their positions unknown; or the batch is not padded at the left.
        TypeError
            The mask is neither a tensor nor None.
        """
        num_tokens, num_keys = hidden_states.shape[1], keys.shape[2]
        if num_tokens > num_keys:
            raise ValueError(
                f"expected a cached pair for each of the {num_tokens} tokens, got {num_keys}: "
                "another press has cut the cache of this prefill, and the positions of what it "
                "left are unknown; put MoERouterPress first"
            )
        fed = kwargs.get("hidden_states", hidden_states)
        offset = _offset_in(hidden_states, fed)
        if offset is None and num_tokens == num_keys:
            raise ValueError(
                "expected the hidden states of a prefill or of a part of it in order, got "
                "reordered ones, whose positions are unknown"
            )
        whole = not (offset is not None and num_tokens == num_keys < fed.shape[1])
        first = 0 if whole or offset is None else offset
        starts = [
            min(max(start - first, 0), num_keys)
            for start in self.row_starts(kwargs.get("attention_mask"), len(keys))
        ]
        projected = as_queries(module, projected, num_tokens)
        if queries is not None and whole and offset is not None:
            learn_rotation(module, hidden_states, kwargs, queries, projected)
        if queries is None or queries.shape[2] != min(window, num_tokens):
            queries = window_queries(module, hidden_states, kwargs, window, offset, self.rotary)
        start = None
        if any(starts):
            start = torch.tensor(starts, dtype=torch.int32, device=keys.device)
        return LayerView(
            module=module,
            hidden_states=hidden_states,
            keys=keys,
            values=values,
            queries=queries.to(keys.dtype),
            start=start,
            lengths=tuple(num_keys - start for start in starts),
            begins=first == 0,
            ends=whole or first + num_keys == fed.shape[1],
            attentions=attentions,
            kwargs=kwargs,
            kinds=kinds,
            backend=backend,
            projected=projected,
            rotary=self.rotary,
            turned=self._turned,
        )

    def row_starts(self, mask: Any, batch: int) -> tuple[int, ...]:
        """Count each row's padding. The layers of a forward share their mask: one read for all."""
        if mask is None:
            return (0,) * batch
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"expected an attention mask that is a tensor, got {type(mask).__name__}; "
                'load the model with attn_implementation="sdpa"'
            )
        if self._mask is None or self._mask() is not mask:
            self._starts = read_starts(mask)
            self._mask = weakref.ref(mask)
        return self._starts if len(self._starts) == batch else self._starts * batch


def read_starts(mask: Tensor) -> tuple[int, ...]:
    """Count the padding positions at the left of each row of a mask.

    Parameters
    ----------
    mask : Tensor
        [B, T], nonzero at real tokens; or [B, 1, Q, T] as the attention gets it, which is True or
        no huge negative number where a query sees a key. The last query sees every real key.

    Returns
    -------
    tuple of ints

    Raises
    ------
    ValueError
        A row has padding elsewhere than at its left.
    """
    row = mask[:, 0, -1] if mask.dim() == 4 else mask
    additive = mask.dim() == 4 and mask.is_floating_point()
    seen = row > torch.finfo(row.dtype).min / 2 if additive else row != 0
    real = seen.sum(-1)
    first = torch.where(real > 0, seen.int().argmax(-1), seen.shape[-1])
    starts, is_left = torch.stack([first, (first + real == seen.shape[-1]).long()]).tolist()
    if not all(is_left):
        raise ValueError(
            "expected padding at the left of the rows only, got a mask with gaps or padding at "
            "the right; set tokenizer.padding_side = 'left'"
        )
    return tuple(starts)


def _offset_in(part: Tensor, fed: Tensor) -> int | None:
    """Where a slice of tokens begins in the tensor it is a view of; None if it is no such view."""
    if part is fed:
        return 0
    if (
        part.stride() != fed.stride()
        or part.shape[0] != fed.shape[0]
        or part.shape[2] != fed.shape[2]
        or part.untyped_storage().data_ptr() != fed.untyped_storage().data_ptr()
    ):
        return None
    offset, rest = divmod(int(part.storage_offset() - fed.storage_offset()), fed.stride(1))
    inside = rest == 0 and 0 <= offset <= fed.shape[1] - part.shape[1]
    return offset if inside else None
