"""``MoERouterPress`` as a kvpress press: for the pipeline, and for kvpress's wrappers.

A wrapper acts on each layer at once and decides itself which pairs leave, so all layers are dense
and each head keeps as many.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from kvpress import ScorerPress
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekv.budget import protect
from moekv.cache.buffers import gather_rows, storage_bytes
from moekv.cache.caches import cached_pairs, check_cache
from moekv.experts.builder import ViewBuilder
from moekv.models.hooks import attentions_of, hook_arguments, is_prefill, is_sliding
from moekv.press import press as core
from moekv.press.commit import choose, observe, record
from moekv.press.forward import Plan
from moekv.press.options import Options
from moekv.press.rating import Look, Rater, protected


class MoERouterPress(core.MoERouterPress, ScorerPress):
    """See ``moekv.press.press.MoERouterPress``: the same, and a scorer for kvpress's wrappers."""

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
        self._prepare(model)

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
        attentions : Tensor or None
            For experts that use attention weights.
        kwargs : dict
            Of the layer's forward.

        Returns
        -------
        Tensor [B, H, T], float32
            Finite; in a mixture sinks and recent positions come first, padding last.

        Raises
        ------
        ValueError
            See ``moekv.experts.builder.ViewBuilder``; or an expert's scores are not [B, H, T].
        """
        options = self._options()
        rater, look = self._look(module, hidden_states, keys, values, attentions, kwargs, options)
        (rating,) = rater.rate([look], options)
        observe([rating], rater, self._statistics)
        sinks, recent = protected(rating, options)
        return protect(rating.scores, rating.start, sinks=sinks, recent=recent)

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
            As in :meth:`score`, or the batch is padded.
        """
        options = self._options()
        if options.budget not in ("auto", "uniform"):
            raise ValueError(
                f"expected budget 'uniform' inside a kvpress wrapper, whose layers are dense, got "
                f"{options.budget!r}; use the press in a block of its own"
            )
        if options.decoding is not None:
            raise ValueError(
                "expected no decoding inside a kvpress wrapper, which decides itself when to "
                "compress: use the press in a block of its own, or kvpress.DecodingPress without it"
            )
        rater, look = self._look(module, hidden_states, keys, values, attentions, kwargs, options)
        if look.view.start is not None and options.evicts:
            num_keys = keys.shape[2]
            raise ValueError(
                "expected rows without padding inside a kvpress wrapper, got "
                f"{[num_keys - n for n in look.view.lengths]} padding positions: after eviction "
                "the attention mask would no longer fit; use the press in a block of its own"
            )
        (rating,) = rater.rate([look], options)
        plan = Plan(options, rater, self._statistics, (module,), "uniform", None, options.recent)
        (kept,) = choose([rating], plan)
        before = storage_bytes(keys, values)
        if kept is not None:
            assert kept.per_head is not None
            shape = (*kept.shape[:2], kept.per_head, -1)
            keys, values = (gather_rows(x, kept.rows()).view(shape) for x in (keys, values))
        after = storage_bytes(keys, values)
        record([rating], [kept], [(before, after)], rater, self._statistics)
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
        check_cache(cache)
        keys, values = cached_pairs(cache_layer)
        cache_layer.keys, cache_layer.values = self.compress(
            module, hidden_states, keys, values, attentions_of(output), kwargs
        )
        return output

    # --- One layer by itself ----------------------------------------------------------------------

    def _look(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
        options: Options,
    ) -> tuple[Rater, Look]:
        if self._rater is None and self._model() is None:  # no block has named the model
            if options.routing.calibrated not in (None, "auto"):
                raise ValueError(
                    "expected no calibrated router inside a wrapper that does not say which model "
                    "it is at work on, got one; use the press in a block of its own, or router=None"
                )
            self._rater = Rater(options.routing, module.config)
        rater = self._rater_for(options)
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
                kinds=rater.kinds,
                backend=options.backend,
            )
        return rater, rater.look(view)

    def _builder(self, kwargs: dict[str, Any]) -> ViewBuilder:
        """Give the forward's view builder: its layers share their rotations, and nobody else."""
        shared = kwargs["position_embeddings"][0]
        seen: tuple[weakref.ref[Tensor], ViewBuilder] | None = getattr(self, "_seen", None)
        if seen is None or seen[0]() is not shared:
            seen = self._seen = weakref.ref(shared, self._forget), ViewBuilder()
        return seen[1]

    def _forget(self, ended: weakref.ref[Tensor]) -> None:
        """Hold nothing of a forward that is over."""
        seen = getattr(self, "_seen", None)
        if seen is not None and seen[0] is ended:
            del self._seen

    def __getstate__(self) -> dict[str, Any]:
        """Take no forward along."""
        state = super().__getstate__()
        state.pop("_seen", None)
        return state
