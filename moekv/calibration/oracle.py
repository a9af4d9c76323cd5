"""The oracle: the attention of a second reading of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from moekv.cache.attention import last_queries
from moekv.cache.caches import cached_pairs
from moekv.cache.layer import CompressedLayer
from moekv.calibration.config import CalibrationConfig
from moekv.experts.base import scores_by
from moekv.experts.builder import ViewBuilder
from moekv.experts.learned import places
from moekv.experts.registry import fitted_experts
from moekv.experts.view import LayerView
from moekv.models.chat import user_turn
from moekv.models.hooks import (
    cache_argument,
    choice_of,
    experts_in,
    find_layers,
    is_sliding,
    rotary_in,
    routers_in,
    with_choice,
)
from moekv.models.queries import logit_options, logits_of
from moekv.models.watching import Asked, StandIn, ask
from moekv.ops import ScoreKind

REPEAT = "\n\nRepeat the previous context exactly."
"""The prompt between the text and its second reading."""

_TILE = 128  # queries whose attention is in memory at a time

_FLOOR = 1e-6  # attention below which a pair counts as not attended


@dataclass
class Reading:
    """The reading of one text. L layers, H KV heads, T tokens, E experts beside ``learned``."""

    hidden: Tensor  # [L, T, width], inputs of the attention layers, with the model's choice
    where: Tensor  # [T, 3], see places()
    novelty: Tensor  # [L, H, T], how unlike the other keys each is
    scores: Tensor  # [L, E, H, T] of these experts
    target: Tensor  # [L, H, T], log of the oracle's attention

    def at(self, tokens: slice | Tensor) -> Reading:
        """Select tokens; indices copy them, a slice does not."""
        return Reading(
            self.hidden[:, tokens],
            self.where[tokens],
            self.novelty[..., tokens],
            self.scores[..., tokens],
            self.target[..., tokens],
        )

    @classmethod
    def join(cls, parts: Sequence[Reading]) -> Reading:
        """Join the readings of groups of layers for the same tokens."""
        names = ("hidden", "novelty", "scores", "target")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(where=parts[0].where, **joined)


class Oracle:
    """Reads texts twice and measures the attention of the second reading.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    config : CalibrationConfig

    Raises
    ------
    TypeError
        The model has no decoder layers with attention.
    ValueError
        The model's own choice of experts is asked for, and it has none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: CalibrationConfig,
    ) -> None:
        self.model, self.config = model, config
        self.decoder, layers = find_layers(model)
        self.layers = [layer for layer in layers if not is_sliding(layer)]
        self.experts = fitted_experts(config.experts)
        #: The model's own experts, if their choice is read.
        self.choices = experts_in(self.decoder) if config.expert_choice else 0
        if config.expert_choice and not self.choices:
            raise ValueError(
                "expected a model that is a mixture of experts for expert_choice=True, got "
                f"{type(model).__name__}, which names no router"
            )
        before, after = user_turn(tokenizer) or ("", "\n")
        self.tokenizer = tokenizer
        self.before = self.encode(before)
        self.repeat = self.encode(REPEAT + after)

    def encode(self, text: str) -> list[int]:
        """Tokenise a piece of text, without special tokens of the tokenizer's own."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @torch.no_grad()
    def describe(self, texts: Sequence[str]) -> Tensor:
        """Mean token embeddings [N, hidden] of texts, to cluster them by topic."""
        embed = self.model.get_input_embeddings()
        rows = []
        for text in texts:
            ids = torch.tensor(self.encode(text)[: self.config.length], device=self.model.device)
            rows.append(embed(ids).float().mean(0).cpu())
        return torch.stack(rows)

    @torch.no_grad()
    def read(self, text: str, *, as_turn: bool, rows: range | None = None) -> Reading:
        """Read a text twice.

        Parameters
        ----------
        text : str
            Cut after ``length`` tokens.
        as_turn : bool
            Whether it is the user's turn of a chat, or plain.
        rows : range, optional
            The layers to read; by default all.

        Raises
        ------
        RuntimeError
            A press compresses the model's caches.
        """
        layers = self.layers if rows is None else self.layers[rows.start : rows.stop]
        body = self.encode(text)[: self.config.length]
        prompt = [*(self.before if as_turn else ()), *body]
        cache = DynamicCache()
        with last_queries(layers, self.config.window) as queries:
            first = self._run(prompt, cache, layers)
        if any(isinstance(layer, CompressedLayer) for layer in cache.layers):
            raise RuntimeError(
                "expected a model outside of a press's block, got one whose caches are compressed: "
                "calibrate it before the block begins, or behind it"
            )
        look_at = ViewBuilder(rotary_in(self.decoder))
        scores, novelty = [], []
        for layer in layers:
            view = self._look(look_at, layer, cache, *first[layer][:2], queries.get(layer))
            scores.append(torch.cat([scores_by(expert, view) for expert in self.experts]))
            novelty.append(view.scores_of(ScoreKind.DIVERSITY)[0])
        second = self._run([*self.repeat, *body], cache, layers)
        target = [
            self._attention(layer, cache, *second[layer][:2], len(prompt)) for layer in layers
        ]
        read = (
            with_choice(hidden, choice_of(said, 1), self.choices)
            for hidden, _, said in map(first.__getitem__, layers)
        )
        hidden = torch.stack([states[0].cpu() for states in read])
        where = places((len(prompt),), len(prompt), hidden.device)[0].t()
        return Reading(
            hidden, where, *(torch.stack(parts).cpu() for parts in (novelty, scores, target))
        )

    def _run(
        self, ids: Sequence[int], cache: DynamicCache, layers: Sequence[nn.Module]
    ) -> dict[nn.Module, tuple[Tensor, dict[str, Any], Any]]:
        """Feed tokens; return each layer's input and arguments, and what the router before said."""
        inputs = {}
        said: Any = None

        def hear(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal said
            said = output

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            inputs[module] = (kwargs["hidden_states"], kwargs, said)

        hooks = [x.register_forward_pre_hook(keep, with_kwargs=True) for x in layers]
        if self.choices:
            hooks += [x.register_forward_hook(hear) for x in routers_in(self.decoder)]
        try:
            self.decoder(
                input_ids=torch.tensor([ids], device=self.model.device),
                **cache_argument(self.decoder, cache),
            )
        finally:
            for hook in hooks:
                hook.remove()
        return inputs

    def _look(
        self,
        look_at: ViewBuilder,
        layer: nn.Module,
        cache: DynamicCache,
        hidden: Tensor,
        kwargs: dict[str, Any],
        asked: Asked | None,
    ) -> LayerView:
        keys, values = cached_pairs(cache.layers[layer.layer_idx])  # type: ignore[index]
        view = look_at(
            layer,
            hidden,
            keys,
            values,
            None,
            kwargs,
            window=self.config.window,
            backend="auto",
            asked=asked,
        )
        view.kinds = sorted({ScoreKind.DIVERSITY}.union(*(e.kinds for e in self.experts)))
        return view

    def _attention(
        self,
        layer: nn.Module,
        cache: DynamicCache,
        hidden: Tensor,
        kwargs: dict[str, Any],
        num_keys: int,
    ) -> Tensor:
        """Log of the power mean of the attention [H, T] that the last tokens pay to the first."""
        keys, _ = cached_pairs(cache.layers[layer.layer_idx])  # type: ignore[index]
        keys = keys[0]
        num_heads, total, dim = keys.shape
        asked = ask(layer, hidden, kwargs, StandIn(lambda: num_keys))
        queries = asked.query[0].to(keys.dtype)
        num_queries = queries.shape[1]
        options = logit_options(layer, asked, dim)
        exponent = self.config.exponent
        column = torch.arange(total, device=keys.device)
        seen = torch.zeros(num_heads, num_keys, device=keys.device)
        for begin in range(0, num_queries, _TILE):
            tile = queries[:, begin : begin + _TILE]
            position = total - num_queries + begin + torch.arange(tile.shape[1], device=keys.device)
            tile = tile.reshape(num_heads, -1, dim)
            logits = logits_of(tile, keys, **options)
            logits = logits.view(num_heads, -1, len(position), total)
            logits.masked_fill_(column > position[:, None], -torch.inf)
            attention = logits.softmax(-1)[..., :num_keys].flatten(1, 2)
            if math.isinf(exponent):
                seen = torch.maximum(seen, attention.amax(1))
            else:
                seen += attention.pow_(exponent).sum(1)
        if math.isinf(exponent):
            return seen.clamp(min=_FLOOR).log()
        mean = seen / (num_queries * queries.shape[0] // num_heads)
        # The floor is one of attention, below its power.
        return (mean.clamp(min=_FLOOR**exponent).log() / exponent).clamp(min=math.log(_FLOOR))
