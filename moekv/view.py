"""What the experts see of one layer: its cached pairs, the queries on them, the padding."""

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.phi3.modeling_phi3 import Phi3Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from moekv import ops
from moekv.ops import ScoreKind

POOL = 5
"""Positions that ``ScoreKind.ATTENTION`` averages, as in SnapKV."""

LAG = 128
"""Tokens in a partition of ``ScoreKind.LAG``, as in LagKV."""

OBSERVED = 8
"""Last queries whose attention is observed where no expert rates by it: enough for statistics."""

_BACK = "_moekv_back"  # attribute of a forward's cosines: what turns keys back from its end

_rotates: weakref.WeakKeyDictionary[nn.Module, bool | None] = weakref.WeakKeyDictionary()
"""Whether an attention layer rotates its queries; None: they are none that can be formed here."""


@dataclass
class LayerView:
    """One attention layer at the moment when its cache is rated.

    Shapes: B batch, H KV heads, Hq query heads, T cached pairs, N tokens whose hidden states are
    known, W window queries, D head dim.

    Where heads keep different numbers of pairs (see ``moekv.decoding``), each KV head is a row of
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

        Returns
        -------
        Tensor [B, H, T], float32
            See ``moekv.ops.expected_attention``.

        Raises
        ------
        ValueError
            The layer forms its queries in a way of its own.
        """
        if _rotates.get(self.module, True) is None:
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

    def _turned_back(self) -> Tensor:
        """Matrices [B or 1, D, D] that turn keys back by the position behind the last token.

        Their products with queries that nobody has rotated are then the logits of queries that
        stand there: a query turned forward is many numbers more.
        """
        scaling, dtype, device = self.module.scaling, self.keys.dtype, self.keys.device
        # The layers of a forward share their rotations, and most likely this as well.
        shared = self.kwargs["position_embeddings"][0]
        known: dict[Any, Tensor] = shared.__dict__.setdefault(_BACK, {})
        key = scaling, dtype, device, _rotates.get(self.module)
        back = known.get(key)
        if back is None:
            eye = torch.eye(self.keys.shape[3], device=device)
            cos, sin = _rotations(self.module, eye, self.kwargs, range(1, 2))
            forward = rotate(self.module, eye.expand(len(cos), 1, -1, -1), cos, sin)[:, 0]
            back = (forward.mT * scaling).to(dtype)  # type: ignore[operator]
            known[key] = back
        return back

    @property
    def _logits(self) -> dict[str, float]:
        """How the layer makes logits of products."""
        softcap = getattr(self.module.config, "attn_logit_softcapping", None)
        return {"scaling": self.module.scaling, "softcap": softcap or 0.0}  # type: ignore[dict-item]


class ViewBuilder:
    """Builds views from what a forward hook gets, and reads each attention mask only once."""

    def __init__(self) -> None:
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
        projected = _as_queries(module, projected, num_tokens)
        if queries is not None and whole and offset is not None:
            _learn_rotation(module, hidden_states, kwargs, queries, projected)
        if queries is None or queries.shape[2] != min(window, num_tokens):
            queries = _window_queries(module, hidden_states, kwargs, window, offset)
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


@contextmanager
def projected_queries(
    layers: Iterable[nn.Module],
) -> Generator[dict[nn.Module, Tensor], None, None]:
    """Hold what the running layers' queries are before their rotation, to project only once.

    Parameters
    ----------
    layers : iterable of nn.Module
        Attention layers.

    Yields
    ------
    dict
        For each layer what its query projection, or the norm behind it, gave in its last forward.
        Whoever takes it out gives the memory back. Compiled graphs go unseen.
    """
    held: dict[nn.Module, Tensor] = {}
    begun: set[nn.Module] = set()  # whoever projects beside the layer's forward is not meant
    handles = []

    def begin(layer: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            begun.add(layer)

    def hold(layer: nn.Module, _: nn.Module, args: Any, output: Tensor) -> None:
        if not torch.compiler.is_compiling() and layer in begun:
            begun.discard(layer)
            held[layer] = output.detach()

    for layer in layers:
        last = _last_before_rotation(layer)
        if last is not None:
            handles.append(layer.register_forward_pre_hook(begin))
            handles.append(last.register_forward_hook(partial(hold, layer)))
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def _last_before_rotation(module: nn.Module) -> nn.Module | None:
    """Find what gives an attention layer's queries in a layout that is known."""
    if isinstance(module, Phi3Attention):
        return module.qkv_proj
    normed = isinstance(module, (Qwen3Attention, Gemma3Attention))
    if hasattr(module, "q_norm") and not normed:
        return None
    return getattr(module, "q_norm" if normed else "q_proj", None)


def _as_queries(module: nn.Module, projected: Tensor | None, num_tokens: int) -> Tensor | None:
    """Cut [B, Hq, N, D] out of what :func:`projected_queries` held; None if that is unfit."""
    if projected is None:
        return None
    num_heads: int = module.config.num_attention_heads  # type: ignore[assignment, union-attr]
    dim: int = module.head_dim  # type: ignore[assignment]
    if isinstance(module, Gemma3Attention):  # whose norm comes behind the transposition
        queries = projected
    else:
        queries = projected.flatten(2)
        if isinstance(module, Phi3Attention):
            queries = queries[..., : num_heads * dim]
        if queries.shape[2] != num_heads * dim:
            return None
        queries = queries.view(*queries.shape[:2], num_heads, dim).transpose(1, 2)
    return queries if queries.shape[1:] == (num_heads, num_tokens, dim) else None


def _window_queries(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    window: int,
    offset: int | None,
) -> Tensor:
    """Form the rotated queries of the last tokens, whose hidden states begin at an offset."""
    queries = project_queries(module, hidden_states[:, -window:])
    num_queries = queries.shape[2]
    if offset is None:
        cos, sin = _rotations(module, hidden_states, kwargs, range(1 - num_queries, 1))
    else:
        end = offset + hidden_states.shape[1]
        cos, sin = (x[:, end - num_queries : end] for x in kwargs["position_embeddings"])
    return rotate(module, queries, cos, sin)


def recent_queries(module: nn.Module, hidden_states: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Form the queries of the last tokens, rotated at their true positions.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    hidden_states : Tensor [B, N, hidden]
        Its inputs, of the last N tokens that were fed, one after another.
    kwargs : mapping
        Of the layer's last forward, whose positions end with the last token's.

    Returns
    -------
    Tensor [B, Hq, N, D]
    """
    back = range(1 - hidden_states.shape[1], 1)
    cos, sin = _rotations(module, hidden_states, kwargs, back)
    return rotate(module, project_queries(module, hidden_states), cos, sin)


def _rotations(
    module: nn.Module, hidden_states: Tensor, kwargs: Mapping[str, Any], steps: range
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B or 1, steps, dim] so many positions from that of the last token."""
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        position_ids = kwargs["cache_position"][None]
    positions = position_ids[:, -1:] + torch.arange(
        steps.start, steps.stop, device=position_ids.device
    )
    rotary: nn.Module = module.rotary_emb  # type: ignore[assignment]
    options = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        options["layer_type"] = module.layer_type
    cos, sin = rotary(hidden_states, positions, **options)
    return cos, sin


def project_queries(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """Form the queries [B, Hq, N, D] of tokens [B, N, hidden], normed if they are, not rotated.

    Raises
    ------
    NotImplementedError
        The layer has neither ``q_proj`` nor ``qkv_proj``.
    """
    layer: Any = module
    num_channels = layer.config.num_attention_heads * layer.head_dim
    if hasattr(layer, "q_proj"):
        queries = layer.q_proj(hidden_states)
    elif hasattr(layer, "qkv_proj"):
        queries = layer.qkv_proj(hidden_states)[..., :num_channels]
    else:
        raise NotImplementedError(
            f"expected an attention layer with q_proj or qkv_proj, got {type(module).__name__}"
        )
    norm = getattr(layer, "q_norm", None)
    heads = (*hidden_states.shape[:2], -1, layer.head_dim)
    if norm is None:
        return queries.view(heads).transpose(1, 2)  # type: ignore[no-any-return]
    # Over all channels at once (OLMo 2), or head by head (Qwen3, Gemma 3).
    together = getattr(norm, "weight", queries[:0]).shape[-1] == num_channels
    queries = norm(queries).view(heads) if together else norm(queries.view(heads))
    return queries.transpose(1, 2)  # type: ignore[no-any-return]


@torch.no_grad()
def _learn_rotation(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    queries: Tensor,
    projected: Tensor | None,
) -> None:
    """Find out from a layer's own last query how it forms it. Waits for the device, once."""
    asked = queries[:, :, -1:].float()
    if module in _rotates or not hasattr(module, "head_dim") or not asked.isfinite().all():
        return
    if projected is None:
        projected = project_queries(module, hidden_states[:, -1:])
    plain = projected[:, :, -1:]
    turned = rotate(module, plain, *(x[:, -1:] for x in kwargs["position_embeddings"]))
    near = [(x.float() - asked).abs().amax() <= 0.05 * asked.abs().amax() for x in (turned, plain)]
    is_turned, is_plain = torch.stack(near).tolist()
    if not (is_turned and is_plain):  # as at position 0, which says nothing
        _rotates[module] = is_turned if is_turned or is_plain else None


@functools.cache
def _own_rotation(name: str) -> Callable[..., Any] | None:
    """Find the rotation in a model's file, if it turns neighbours and not halves of a head."""
    file = sys.modules[name]
    half, apply = (getattr(file, name, None) for name in ("rotate_half", "apply_rotary_pos_emb"))
    if half is None or apply is None or half(torch.arange(4)).tolist() == [-2, -3, 0, 1]:
        return None
    return apply  # type: ignore[no-any-return]


def rotate(module: nn.Module, queries: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels, as many as the cosines have (Phi3: not all).

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    queries : Tensor [B, Hq, N, D]
    cos, sin : Tensor [B or 1, N or 1, dim]

    Returns
    -------
    Tensor [B, Hq, N, D]
        As they are where the layer rotates nothing (as some of SmolLM3).
    """
    if _rotates.get(module) is False:
        return queries
    # In the layout that projections have, [B, W, Hq, D]: several times faster than across it.
    source = queries.transpose(1, 2)
    dim = cos.shape[-1]
    if (own := _own_rotation(type(module).__module__)) is not None:
        part = source[..., :dim]
        rotated, _ = own(part, part, cos, sin, unsqueeze_dim=2)
        return torch.cat([rotated, source[..., dim:]], dim=-1).transpose(1, 2)
    cos, sin = cos[:, :, None], sin[:, :, None]
    half = dim // 2
    left, right = source[..., :half], source[..., half:dim]
    rotated = source[..., :dim] * cos
    rotated[..., :half] -= right * sin[..., :half]
    rotated[..., half:] += left * sin[..., half:]
    if dim < source.shape[-1]:
        rotated = torch.cat([rotated, source[..., dim:]], dim=-1)
    return rotated.transpose(1, 2)
