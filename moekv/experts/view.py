"""A layer as experts read it: its cached pairs, the queries on them, the padding."""

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekv import ops
from moekv.devices import send
from moekv.models.queries import (
    behind,
    logit_options,
    logits_of,
    next_queries,
    tokens_at,
    turn_behind,
)
from moekv.models.ranks import ALONE, Ranks
from moekv.ops import ScoreKind
from moekv.ops.reference.expected_attention import REACH

POOL = 5
"""Positions that ``ScoreKind.ATTENTION`` averages, as in SnapKV."""

LAG = 128
"""Tokens in a partition of ``ScoreKind.LAG``, as in LagKV."""

OBSERVED = 8
"""Last queries that are observed where no expert scores by them: enough for statistics."""


@dataclass
class LayerView:
    """One attention layer at the moment when its cache is scored.

    Shapes: B batch, H KV heads, Hq query heads, T cached pairs, N tokens whose hidden states are
    known, W window queries, D head dim.

    Where heads hold different numbers of pairs (``moekv.press.growth``), each KV head is a row of
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
        Whether the view has the sequence's first and last token. False inside a sequence that is
        scored in chunks.
    attentions : Tensor or None
        Attention weights, where the attention implementation returns them.
    kwargs : mapping
        Keyword arguments of the layer's forward.
    kinds : sequence of ScoreKind
        Native scores that the experts read by :meth:`scores_of`.
    backend : str
        Of the ops, see ``moekv.ops.BACKENDS``.
    notes : tuple of two Tensor [B, H, T], float32, or None
        For a calibrated router, in a cache that is compressed again: its projection of each pair's
        hidden state, from when the token was fed, and the token's position in its row.
    asked : Tensor [B, Hq, N, D] or None
        Queries of all tokens, where they were observed and can be rotated further.
    read : Tensor [B, N, H + E] or None
        A calibrated router's projection of the hidden states.
    rotary : nn.Module or None
        The decoder's rotary embedding, for layers that have none of their own.
    turned : dict
        Shared by the views of a forward: the rotation of its queries to its end.
    logits : dict
        ``scaling`` and ``softcap`` of the products of queries and keys; by default the layer's.
    expert_choice : Tensor [B, N, E], float32, or None
        In models that are mixtures of E experts themselves: the weights by which the last router
        before the layer, that of the block before, sent each token to experts, 0 where it did not.
        None: there was none, no expert of the press reads it (``Expert.reads_choice``), or the
        cache is compressed again.
    ranks : Ranks
        The processes that share out the layer's KV heads: the view has those of this one.
    lengths_of_all : tuple of ints, or None
        Real pairs in each row of the heads of all processes; None: the rows are the same.
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
    asked: Tensor | None = None
    read: Tensor | None = None
    rotary: nn.Module | None = None
    turned: dict[Any, Any] = field(default_factory=dict)
    logits: Mapping[str, float] = field(default_factory=dict)
    expert_choice: Tensor | None = None
    ranks: Ranks = ALONE
    lengths_of_all: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Read the logits' scaling from the layer, if it was not given."""
        self.logits = self.logits or logit_options(self.module, None, self.queries.shape[3])

    def released(self) -> "LayerView":
        """Return this view without hidden states and queries, with the scores computed from them.

        They are as large as a layer's pairs, or several times that, and most experts can score
        without them (``Expert.waits``).
        """
        view = copy.copy(self)
        view.hidden_states = self.hidden_states.new_empty(*self.hidden_states.shape[:2], 0)
        view.queries = view.hidden_states
        view.attentions, view.asked, view.kwargs = None, None, {}
        view.expert_choice = None
        return view

    @property
    def folded(self) -> int:
        """KV heads that are rows of their own: all, or 1 where rows are those of the batch."""
        return self.keys.shape[0] // self.hidden_states.shape[0]

    @property
    def heads(self) -> Tensor:
        """Which of the layer's KV heads each row and column holds: [B, H], int64."""
        batch, num_heads = self.keys.shape[:2]
        own = self.own_heads
        heads = torch.arange(own.start, own.stop, device=self.keys.device)
        return heads.repeat(batch // self.folded).view(batch, num_heads)

    @property
    def own_heads(self) -> slice:
        """Which of the heads of all processes the view has."""
        return self.ranks.own(self.keys.shape[1] * self.folded)

    @property
    def aligned(self) -> bool:
        """Whether every cached pair has its hidden state (N = T)."""
        return self.hidden_states.shape[1] == self.keys.shape[2] and not self._all_folded

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

        Raises
        ------
        ValueError
            No expert has declared the kind.
        """
        if kind not in self.kinds:
            raise ValueError(
                f"expected a kind of scores that an expert declares, got {ScoreKind(kind)!r}: set "
                "kinds = (ScoreKind...,) in the class of the expert that asks for it"
            )
        return self._all_scores[kind]

    def observed(self) -> Tensor:
        """Observed attention to the pairs: of all W queries, or of ``OBSERVED`` of them.

        The latter where no expert scores by it, as the cost is proportional to the queries.

        Returns
        -------
        Tensor [B, H, T], float32
            ``ScoreKind.MASS`` of the last queries.
        """
        return self._all_scores[ScoreKind.MASS]

    @property
    def _all_folded(self) -> bool:
        """Whether each head of all processes is a row of its own."""
        return len(self.lengths_of_all or self.lengths) != len(self.hidden_states)

    def gathered(self, scores: Tensor) -> Tensor:
        """Join scores [..., B, H, T] with those of the heads of other processes.

        They may be of several layers of equal sizes, layer after layer in the rows.
        """
        if self.ranks.size == 1:
            return scores
        lead, num_keys = scores.shape[:-3], scores.shape[-1]
        heads = self.keys.shape[1] * self.folded
        joined = self.ranks.gather(scores.reshape(-1, heads, num_keys), 1)
        heads = 1 if self._all_folded else joined.shape[1]
        return joined.view(*lead, -1, heads, num_keys)

    def of_all_heads(self, observed: Tensor) -> "LayerView":
        """Return this view with the heads of all processes: what is decided over them needs.

        Parameters
        ----------
        observed : Tensor [B, H, T], float32
            See :meth:`observed`, of all heads.

        Returns
        -------
        LayerView
            Its keys and values have the sizes, and no numbers to read.
        """
        if self.ranks.size == 1:
            return self
        view = copy.copy(self)
        rows, heads, num_keys = observed.shape
        view.keys = self.keys[:1, :1].expand(rows, heads, -1, -1)
        view.values = self.values[:1, :1].expand(rows, heads, -1, -1)
        if self.lengths_of_all is not None:
            view.lengths = self.lengths_of_all
        if self.start is not None:
            real = send(view.lengths, observed.device, torch.int32)
            view.start = num_keys - real
        view.ranks, view.lengths_of_all = ALONE, None
        view.__dict__["_all_scores"] = {ScoreKind.MASS: observed}
        return view

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
            **self.logits,
            pool=POOL,
            lag=LAG,
            backend=self.backend,
        )
        return dict(zip(kinds, scores.unbind(), strict=True))

    def expected(self) -> Tensor:
        """Return the expected attention to the pairs; the view has to be ``aligned``.

        Computed at the first call.

        Returns
        -------
        Tensor [B, H, T], float32
            See ``moekv.ops.expected_attention``. Not to be written to.

        Raises
        ------
        NotImplementedError
            The layer's queries can neither be observed nor computed.
        """
        return self._expected

    def expected_among(self, keys: Tensor) -> Tensor:
        """Return the expected attention to pairs that are the last of a longer layer.

        As in :meth:`expected`, but the queries of the tokens before them are unknown, and missing
        for the first pairs. The view has to be ``aligned``.

        Parameters
        ----------
        keys : Tensor [B, H, S, D]
            Of the whole layer; the view's are its last T.

        Returns
        -------
        Tensor [B, H, T], float32
        """
        queries = self._behind().to(keys.dtype)
        batch, _, count, dim = queries.shape
        grouped = queries.reshape(batch, keys.shape[1], -1, dim)
        looks = logits_of(grouped, keys, **self.logits).softmax(-1)[..., -count:].square()
        looks = looks.view(batch, keys.shape[1], -1, count, count).mean(2)
        near = torch.ones_like(looks[0, 0]).triu().tril(REACH)  # from a token on, and no farther
        return (looks * near).sum(-2).clamp(min=1e-36).log() / 2

    def _behind(self) -> Tensor:
        """Return the queries of all tokens at the position after the last one: [B, Hq, N, D]."""
        given = self.module, self.hidden_states, self.kwargs, self.rotary
        if self.asked is None:
            return next_queries(*given)
        return behind(self.asked, *given, self.turned)

    def sampled(self, count: int) -> Tensor:
        """Return queries of some tokens, from all over the text, as if they stood behind it.

        The view has to be ``aligned``.

        Parameters
        ----------
        count : int
            Tokens, M. Those of a shorter text come more than once: a row with padding is sampled as
            it is alone.

        Returns
        -------
        Tensor [B, Hq, M, D]

        Raises
        ------
        NotImplementedError
            The layer's queries can neither be observed nor computed.
        """
        num_keys = self.keys.shape[2]
        length = send(self.lengths, self.keys.device)[:, None]
        part = torch.arange(count, device=self.keys.device)
        # One in each of equal parts, at places that repeat nowhere, as in `expected_attention`.
        places = (part * 65536 + part * 40503 % 65536) * length // (count * 65536)
        places = (num_keys - length + places).clamp(max=num_keys - 1)
        if self.asked is None:
            return tokens_at(self._behind(), places)
        given = self.module, self.hidden_states, self.kwargs, self.rotary
        return behind(self.asked, *given, self.turned, places)

    @functools.cached_property
    def _expected(self) -> Tensor:
        given = self.module, self.hidden_states, self.kwargs, self.rotary
        turn = None
        if self.asked is None:
            queries = next_queries(*given)
        else:
            queries, turn = self.asked, turn_behind(*given, self.turned)
        cos, sin = (None, None) if turn is None else turn
        return ops.expected_attention(
            queries.to(self.keys.dtype),
            self.keys,
            self.start,
            cos,
            sin,
            scaling=self.logits["scaling"],
            softcap=self.logits["softcap"],
            backend=self.backend,
        )
