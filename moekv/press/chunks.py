"""A prompt in chunks, compressed after each."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from moekv.models.hooks import cache_argument
from moekv.press.checks import check_count
from moekv.press.press import MoERouterPress
from moekv.units import kind


def prefill_in_chunks(
    press: MoERouterPress,
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    chunk_size: int,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    **inputs: Any,
) -> Any:
    """Fill a cache with a prompt that is fed in chunks, and compress after each.

    The cache never holds more than the pairs retained of the whole prompt, and one chunk. A prefill
    in one forward holds the whole prompt until it is compressed.

    Parameters
    ----------
    press : MoERouterPress
        Not open in a block: this function opens one.
    model : PreTrainedModel
    input_ids : Tensor [B, T]
        ``generate`` needs one token that is not in the cache: feed all but the last here, and pass
        all of them to ``generate``.
    chunk_size : int
        Tokens of a forward, at least 1.
    attention_mask : Tensor [B, T], optional
        0 at padding, which is at the left. What is beyond the prompt does not count.
    past_key_values : Cache, optional
        An empty ``DynamicCache``; by default a new one.
    **inputs
        Further arguments of each forward.

    Returns
    -------
    ModelOutput
        Of the last forward: ``past_key_values`` is the cache, whose layers report the true length,
        and ``logits``, unless `inputs` choose otherwise, are those of the last token [B, 1, vocab].

    Raises
    ------
    ValueError
        `input_ids` have another shape or are no integers, `attention_mask` has another shape,
        `chunk_size` is less than 1, the cache is not empty, or the press streams or has a dominant
        policy.
    RuntimeError, TypeError
        As in a block of the press.

    Examples
    --------
    >>> cache = prefill_in_chunks(press, model, ids[:, :-1], chunk_size=1024).past_key_values
    >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=100)
    """
    if not isinstance(press, MoERouterPress):
        raise TypeError(f"expected a MoERouterPress, got {kind(press)}")
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"expected input_ids as a tensor [B, T], got {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"expected input_ids [B, T] as integers, got {list(input_ids.shape)}, {input_ids.dtype}"
        )
    length = input_ids.shape[1]
    if attention_mask is not None:
        _check_mask(attention_mask, input_ids)
    check_count("chunk_size", chunk_size, 1)
    if press.streaming or press.policy != "mixture":
        raise ValueError(
            "expected streaming=False, as chunks bound the peak already, and policy 'mixture', "
            f"got {press.streaming} and {press.policy!r}"
        )
    cache = DynamicCache(config=model.config) if past_key_values is None else past_key_values
    if cache.get_seq_length():
        raise ValueError(f"expected an empty cache, got one that holds {cache.get_seq_length()}")
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs = {"logits_to_keep": 1} | inputs
    named = cache_argument(model, cache)
    position_ids = torch.arange(length, device=input_ids.device)[None]
    if attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), press(model, context_length=length):
        for begin in range(0, length, chunk_size):
            end = min(begin + chunk_size, length)
            out = model(
                input_ids=input_ids[:, begin:end],
                attention_mask=None if attention_mask is None else attention_mask[:, :end],
                position_ids=position_ids[:, begin:end],
                **named,
                use_cache=True,
                **inputs,
            )
    return out


def _check_mask(mask: Any, input_ids: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"expected attention_mask as a tensor [B, T], got {kind(mask)}")
    batch, length = input_ids.shape
    if mask.dim() != 2 or len(mask) != batch or mask.shape[1] < length:
        raise ValueError(
            f"expected attention_mask [{batch}, {length}] for these input_ids, got "
            f"{list(mask.shape)}"
        )
