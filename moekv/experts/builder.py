"""Makes views of layers from the arguments of forward hooks."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moekv.devices import send
from moekv.experts.view import LayerView
from moekv.models.hooks import choice_of
from moekv.models.queries import learn_rotation, logit_options, window_queries
from moekv.models.ranks import Ranks, ranks_of
from moekv.models.watching import Asked


class ViewBuilder:
    """Builds the views of one forward, and reads its mask only once.

    Parameters
    ----------
    rotary : nn.Module, optional
        The decoder's rotary embedding, for layers that have none of their own.
    mesh : DeviceMesh, optional
        Processes over which the model is spread, see ``moekv.models.weights.mesh_of``.
    """

    def __init__(self, rotary: nn.Module | None = None, mesh: Any = None) -> None:
        self.rotary, self._mesh = rotary, mesh
        self._turned: dict[Any, Any] = {}
        self._mask: weakref.ref[Tensor] | None = None
        self._starts: tuple[int, ...] = ()
        self._copies: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

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
        backend: str,
        asked: Asked | None = None,
        expects: bool = False,
        choice: Any = None,
    ) -> LayerView:
        """Make the view of one layer.

        Parameters
        ----------
        module, hidden_states, keys, values, attentions, kwargs
            As in ``kvpress.ScorerPress.score``: the whole prefill, a chunk of it (``ChunkPress``),
            or a cache of which only the last tokens' hidden states are known
            (``DecodingPress``).
        window : int
            Last tokens whose queries are observed, at most.
        backend : str
            Of the ops.
        asked : Asked, optional
            Queries of the layer's last call, at least of the window. None, or of fewer tokens:
            they are computed again.
        expects : bool
            Whether the queries of all tokens are needed, see ``LayerView.expected``.
        choice : optional
            What the model's own router returned for these tokens, see ``LayerView.expert_choice``.

        Returns
        -------
        LayerView
            Its ``kinds``, none, are to be set before it is scored.

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
                "another press has compressed the cache of this prefill, and the positions of its "
                "pairs are unknown; put MoERouterPress first"
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
        count, everything = min(window, num_tokens), None
        if asked is None or asked.query.shape[2] < count:
            asked = window_queries(module, hidden_states, kwargs, window, offset, self.rotary)
        elif (
            expects
            and asked.query.shape[2] == num_tokens
            and learn_rotation(module, hidden_states, kwargs, asked.query) is not None
        ):
            everything = asked.query
        queries = asked.query[:, :, asked.query.shape[2] - count :]
        if isinstance(asked.key, Tensor) and _row_of(asked.key) != _row_of(keys):
            # They were computed from cached pairs; of a static cache from all slots, filled or not.
            keys, values = asked.key[:, :, :num_keys], asked.value[:, :, :num_keys]
        start = None
        if any(starts):
            start = self.on_device(tuple(starts), keys.device)
        return LayerView(
            module=module,
            hidden_states=hidden_states,
            keys=keys,
            values=values,
            queries=queries.to(keys.dtype, copy=True, memory_format=torch.contiguous_format),
            start=start,
            lengths=tuple(num_keys - start for start in starts),
            begins=first == 0,
            ends=whole or first + num_keys == fed.shape[1],
            attentions=attentions,
            kwargs=kwargs,
            kinds=(),
            backend=backend,
            asked=everything,
            rotary=self.rotary,
            turned=self._turned,
            logits=logit_options(module, asked, queries.shape[3]),
            expert_choice=choice_of(choice, len(hidden_states)),
            ranks=self.ranks(module, keys.shape[1]),
        )

    def ranks(self, module: nn.Module, num_heads: int) -> Ranks:
        """Find the processes that share out a layer's heads, of which this one has so many."""
        return ranks_of(self._mesh, module, num_heads)

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

    def on_device(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """Return numbers as an int32 tensor: one copy for all layers."""
        if (numbers, device) not in self._copies:
            self._copies[numbers, device] = send(numbers, device, torch.int32)
        return self._copies[numbers, device]


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
        A row has padding elsewhere than at its left; or the mask hides keys from the last query
        and not from others, as in packed texts, or differs between heads.
    """
    seen = _seen(mask[:, 0, -1] if mask.dim() == 4 else mask, mask.dim() == 4)
    real = seen.sum(-1)
    first = torch.where(real > 0, seen.int().argmax(-1), seen.shape[-1])
    starts, is_left = torch.stack([first, (first + real == seen.shape[-1]).long()]).tolist()
    if not all(is_left):
        raise ValueError(
            "expected padding at the left of the rows only, got a mask with gaps or padding at "
            "the right; set tokenizer.padding_side = 'left'"
        )
    if mask.dim() == 4 and (any(starts) or mask.shape[1] > 1):
        _check_padding(_seen(mask, True), first)
    return tuple(starts)


def _row_of(pairs: Tensor) -> tuple[int, ...]:
    """Return the sizes of all the pairs of a token: rows, heads, channels."""
    batch, heads, _, dim = pairs.shape
    return batch, heads, dim


def _seen(mask: Tensor, additive: bool) -> Tensor:
    if additive and mask.is_floating_point():
        return mask > torch.finfo(mask.dtype).min / 2
    return mask != 0


def _check_padding(seen: Tensor, first: Tensor) -> None:
    """Raise unless what a mask [B, Hq or 1, Q, T] hides from the last query is padding for all."""
    num_queries, length = seen.shape[2:]
    position = torch.arange(length, device=seen.device)
    is_padding = (position < first[:, None])[:, None]  # [B, 1, T]
    asks = ~is_padding[..., length - num_queries :]  # [B, 1, Q]
    wrong = (seen & is_padding[:, :, None]).any(-1) & asks
    # Queries at padding see nothing, or everything, which spares them an empty softmax.
    wrong |= (seen.any(-1) != seen.all(-1)) & ~asks
    wrong |= (seen[:, :, -1] != seen[:, :1, -1]).any(-1, keepdim=True)
    if bool(wrong.any()):
        raise ValueError(
            "expected a causal attention mask with padding at the left of the rows, got one that "
            "hides from the last token what others see, as of several texts in a row: the pairs "
            "that later tokens need are unknown"
        )


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
