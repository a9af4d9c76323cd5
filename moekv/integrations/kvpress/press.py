"""``MoERouterPress`` as a kvpress press: for the pipeline, and for kvpress's wrappers.

A wrapper acts on each layer at once and decides itself which pairs leave, so all layers are dense
and each head keeps as many.
"""

from __future__ import annotations

import weakref
from dataclasses import fields
from typing import Any

import torch
from kvpress import BasePress, DMSPress, PrefillDecodingPress, ScorerPress
from kvpress.utils import extract_keys_and_values
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekv.budget import protect
from moekv.cache.attention import install
from moekv.cache.buffers import gather_rows, storage_bytes
from moekv.cache.caches import cached_pairs, check_cache
from moekv.experts.builder import ViewBuilder
from moekv.experts.view import LayerView
from moekv.integrations.kvpress.wrappers import Outcomes, as_attention, wrapper_hook
from moekv.models.hooks import (
    attentions_of,
    cache_of,
    find_layers,
    hook_arguments,
    index_of,
    is_prefill,
    is_sliding,
)
from moekv.models.weights import mesh_of
from moekv.press import press as core
from moekv.press.commit import choose, observe, record
from moekv.press.forward import Plan
from moekv.press.options import Options
from moekv.press.rater import Rater
from moekv.press.rating import protected
from moekv.press.reports import Stats

_UNSERVED = {
    "budget": "which acts on one layer at once, and says how many pairs its heads keep",
    "pairs": "which reads keys and values as the model makes them",
    "fold": "which reads keys and values as the model makes them, without biases",
    "decoding": "which says itself when pairs leave",
    "streaming": "which acts on each layer as it arrives",
}
"""Options of a block of the press's own: why a wrapper does not serve them."""


class MoERouterPress(core.MoERouterPress, ScorerPress):
    """See ``moekv.press.press.MoERouterPress``: the same, and a scorer for kvpress's wrappers."""

    def __post_init__(self) -> None:
        """Check every option before a model is at hand."""
        super().__post_init__()
        self._outcomes = Outcomes()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option; `decoding` makes a press that kvpress's pipeline also decodes with."""
        super().__setattr__(name, value)
        if name == "decoding" and type(self) in (MoERouterPress, DecodingMoERouterPress):
            kind = MoERouterPress if value is None else DecodingMoERouterPress
            object.__setattr__(self, "__class__", kind)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Get ready for a model: kvpress calls this when a wrapper's block begins.

        Parameters
        ----------
        model : PreTrainedModel

        Raises
        ------
        RuntimeError
            The press remembers another model.
        """
        self._prepare(model, find_layers(model)[1])

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Rate the pairs of one layer, and observe.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        hidden_states : Tensor [B, N, hidden]
            Its input: a whole prefill, a slice of it, or the last N tokens of the cache.
        keys, values : Tensor [B, H, T, D]
            All pairs of the layer, or those of a slice, or (``DMSPress``) of the last N tokens.
        attentions : Tensor or None
            For experts that use attention weights.
        kwargs : dict
            Of the layer's forward.

        Returns
        -------
        Tensor [B, H, T], float32
            Attention that pairs of the press's order can expect: positive, comparable over heads
            and layers, distinct in each head. See :func:`as_attention`. In a mixture sinks and
            recent positions come first; under ``DMSPress``, whose window stands for them, sinks.

        Raises
        ------
        ValueError
            See ``moekv.experts.builder.ViewBuilder``; or an expert's scores are not [B, H, T]; or
            options are set that a wrapper cannot serve; or a wrapper is at work on padded rows.
        """
        hook = wrapper_hook(module, self)
        wrapper = None if hook is None else hook.__self__
        options = self._options_inside(wrapper)
        cache, whole = cache_of(kwargs), keys
        fed = kwargs.get("hidden_states", hidden_states).shape[1]
        if hook is not None and cache is not None:
            whole, _ = extract_keys_and_values(cache, index_of(module))
        rater, view = self._view(module, hidden_states, keys, values, attentions, kwargs, options)
        if wrapper is not None:
            _check_padding(view, wrapper)
        expected = None
        if keys.shape[2] == fed < whole.shape[2]:  # tokens of a text that has begun elsewhere
            view.begins = view.ends = False
            expected = view.expected_among(whole)
        elif view.aligned and hasattr(module, "rotary_emb"):
            expected = view.expected()
        fresh = whole.shape[2] == fed
        (rating,) = rater.rate([rater.prepare(view)], options, goes_on=keys.shape[2] > fed)
        observe([rating], rater, self._statistics)
        if hook is not None and cache is not None:
            self._outcomes.expect(module, cache, hook, self._statistics, fresh=fresh)
        sinks, recent = protected(rating, options)
        if isinstance(wrapper, DMSPress):
            recent = 0
        order = rating.order()[:, rating.own_heads]
        scores = protect(order, rating.start, sinks=sinks, recent=recent)
        return as_attention(scores, expected, rating.start)

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Rate the pairs of one layer and copy those that stay.

        Parameters
        ----------
        module, hidden_states, keys, values, attentions, kwargs
            As in :meth:`score`.

        Returns
        -------
        keys, values : Tensor [B, H, n, D]
            In their old order.

        Raises
        ------
        ValueError
            As in :meth:`score`.
        """
        hook = wrapper_hook(module, self)
        wrapper = None if hook is None else hook.__self__
        options = self._options_inside(wrapper)
        rater, view = self._view(module, hidden_states, keys, values, attentions, kwargs, options)
        if options.evicts:
            _check_padding(view, wrapper)
        (rating,) = rater.rate([rater.prepare(view)], options)
        plan = Plan(options, rater, self._statistics, (module,), "uniform", None, options.recent)
        (chosen,) = choose([rating], plan)
        kept = None if chosen is None else chosen.of_heads(rating.own_heads)
        before = storage_bytes(keys, values)
        if kept is not None:
            assert kept.per_head is not None
            shape = (*kept.shape[:2], kept.per_head, -1)
            keys, values = (gather_rows(x, kept.rows()).view(shape) for x in (keys, values))
        before, after = rating.ranks.total([before, storage_bytes(keys, values)])
        record([rating], [chosen], [(before, after)], rater, self._statistics)
        return keys, values

    def forward_hook(
        self, module: nn.Module, input: list[Tensor], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Compress one layer at once, after a prefill: what kvpress's wrappers call.

        Parameters
        ----------
        module : nn.Module
            The attention layer. One with a sliding window stays as it is.
        input : list of Tensor
            Not used.
        kwargs : dict
            Of the layer's forward.
        output : tuple
            Of the layer's forward.

        Returns
        -------
        tuple
            `output`.

        Raises
        ------
        RuntimeError, TypeError, ValueError
            As in a block of the press's own.
        """
        hidden_states, cache = hook_arguments(kwargs)
        if is_sliding(module):
            return output
        cache_layer = cache.layers[module.layer_idx]
        if not is_prefill(kwargs, cache_layer, hidden_states.shape[1]):
            return output
        check_cache(cache, offloaded="kvpress's wrappers, which read layers when they have run")
        keys, values = cached_pairs(cache_layer)
        cache_layer.keys, cache_layer.values = self.compress(
            module, hidden_states, keys, values, attentions_of(output), kwargs
        )
        return output

    # --- Statistics -------------------------------------------------------------------------------

    def get_stats(self) -> Stats:
        """See ``moekv.press.press.MoERouterPress.get_stats``; pairs that are masked have left."""
        self._outcomes.settle()
        return super().get_stats()

    def reset_stats(self) -> None:
        """Forget everything measured, see ``moekv.press.press.MoERouterPress.reset_stats``."""
        self._outcomes.settle()
        self._outcomes = Outcomes()
        super().reset_stats()

    # --- One layer by itself ----------------------------------------------------------------------

    def _options_inside(self, wrapper: BasePress | None) -> Options:
        """Return the options; raise if one is set that the wrapper overrides."""
        known = {field.name: field.default for field in fields(self)}
        unserved = dict(_UNSERVED)
        if isinstance(wrapper, DMSPress):
            unserved["recent"] = "whose sliding window says which last pairs stay"
        if self.pairs == "auto":
            del unserved["pairs"]
        if self.fold is not True:
            del unserved["fold"]
        for name, why in unserved.items():
            if (value := getattr(self, name)) != known[name]:
                raise ValueError(
                    f"expected {name}={known[name]!r} inside {_name(wrapper)}, {why}, got "
                    f"{value!r}; use the press in a block of its own"
                )
        return self._options().in_format(None)

    def _view(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
        options: Options,
    ) -> tuple[Rater, LayerView]:
        if self._rater is None and self._model() is None:  # no block has named the model
            if options.routing.calibrated not in (None, "auto"):
                raise ValueError(
                    "expected no calibrated router inside a wrapper that does not say which model "
                    "it is at work on, got one; use the press in a block of its own, or router=None"
                )
            self._rater = Rater(options.routing, module.config)
        rater = self._rater_for(options)
        if rater.reads_choice:
            raise ValueError(
                "expected no expert or router that reads which experts the model itself chose "
                "inside a wrapper, which does not see it; use the press in a block of its own"
            )
        install()  # what the layer asks is seen by it
        if hidden_states.shape[1] < keys.shape[2]:
            rater.see_unknown_tokens()
        with torch.no_grad():
            view = self._builder(kwargs)(
                module,
                hidden_states,
                keys,
                values,
                attentions,
                kwargs,
                window=options.window,
                backend=options.backend,
            )
        return rater, view

    def _builder(self, kwargs: dict[str, Any]) -> ViewBuilder:
        """Return the forward's view builder: its layers share their rotations, and nobody else."""
        shared = kwargs["position_embeddings"][0]
        seen: tuple[weakref.ref[Tensor], ViewBuilder] | None = getattr(self, "_seen", None)
        if seen is None or seen[0]() is not shared:
            model = self._model()
            builder = ViewBuilder(mesh=None if model is None else mesh_of(model))
            seen = self._seen = weakref.ref(shared, self._forget), builder
        return seen[1]

    def _forget(self, ended: weakref.ref[Tensor]) -> None:
        """Hold nothing of a forward that is over."""
        seen = getattr(self, "_seen", None)
        if seen is not None and seen[0] is ended:
            del self._seen

    def __getstate__(self) -> dict[str, Any]:
        """Take no forward along."""
        self._outcomes.settle()
        return {k: v for k, v in super().__getstate__().items() if k not in ("_seen", "_outcomes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was saved."""
        super().__setstate__(state)
        self._outcomes = Outcomes()


def _name(wrapper: BasePress | None) -> str:
    return "a kvpress wrapper" if wrapper is None else type(wrapper).__name__


def _check_padding(view: LayerView, wrapper: BasePress | None) -> None:
    if view.start is not None:
        num_keys = view.keys.shape[2]
        raise ValueError(
            f"expected rows without padding inside {_name(wrapper)}, got "
            f"{[num_keys - n for n in view.lengths]} padding positions: after eviction the "
            "attention mask would no longer fit; use the press in a block of its own"
        )


class DecodingMoERouterPress(MoERouterPress, PrefillDecodingPress):
    """A ``MoERouterPress`` with `decoding`, which becomes one when the option is set.

    kvpress's pipeline opens the block of a press for the answer as well if it is of this kind.
    """
