"""The part of a press that compresses caches which grow, see ``moekv.decoding``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from moekv import decoding as growth
from moekv.budget import Kept, check_ratio
from moekv.cache import cached_pairs, check_cache
from moekv.decoding import Held, Regrown
from moekv.hooks import check_attention
from moekv.layers import GrowingLayer, notes_of

if TYPE_CHECKING:
    from moekv.press import MoERouterPress, _Rated, _Rating


@dataclass
class _Plan:
    """A forward after which pairs leave."""

    padding: Sequence[int]  # of the rows, in positions of the mask
    keep: list[int]  # pairs of a head that stay in each row, on average
    ragged: bool  # whether layers are to report the true length
    regrown: list[tuple[Regrown, "_Rating"]]


class Keeper:
    """Keeps caches that grow inside a press's block within their budget.

    Parameters
    ----------
    press : MoERouterPress
        Whose options, routers and statistics it uses.
    """

    def __init__(self, press: "MoERouterPress") -> None:
        self._press = press
        self._plan: _Plan | None = None

    # --- Before a forward -------------------------------------------------------------------------

    def check(
        self, cache: Cache, num_cached: int, num_tokens: int, given: Mapping[str, Any]
    ) -> None:
        """Refuse tokens for a cache that holds some, unless all that goes on can be right.

        Parameters
        ----------
        cache : Cache
        num_cached, num_tokens : int
            What it holds, and what is fed.
        given : mapping
            Arguments of the decoder's forward.

        Raises
        ------
        RuntimeError, TypeError
            See docs/errors.md.
        """
        press = self._press
        if press._goes_on:
            check_cache(cache, grown=True)
            if any(notes_of(cache.layers[m.layer_idx]) is None for m in press._hooked):  # type: ignore[index]
                press._see_unknown_tokens()
        if num_tokens <= 1:
            return
        layer = cache.layers[press._hooked[0].layer_idx]  # type: ignore[index]
        evicted = getattr(layer, "evicted", 0)
        in_prompt = press.context_length is not None and num_cached < press.context_length
        if in_prompt and not evicted:
            self.check_chunk(num_cached, num_tokens, given)
            return
        if press.decoding is None:
            raise RuntimeError(
                f"expected a prefill in one forward, got {num_tokens} tokens for a cache that "
                f"holds {num_cached}: leave the `with` block before feeding more than one "
                "token at a time, and feed the whole prompt at once, or give its length "
                "as context_length (moekv.prefill_in_chunks does)"
            )
        position = given.get("cache_position")
        first = num_cached if position is None else int(position[0])
        held = layer.get_seq_length()
        if evicted and first not in (held, held + evicted):
            raise RuntimeError(
                f"expected tokens at position {held + evicted}, or at place {held} of what the "
                f"cache holds, got {num_tokens} at {first}: their masks would be wrong"
            )

    def check_chunk(self, num_cached: int, num_tokens: int, given: Mapping[str, Any]) -> None:
        """Refuse a chunk beyond the prompt, and one at other positions than its own.

        Parameters
        ----------
        num_cached, num_tokens, given
            As in :meth:`check`.

        Raises
        ------
        RuntimeError
        """
        length, seen = self._press.context_length, num_cached + num_tokens
        assert length is not None
        if seen > length:
            raise RuntimeError(
                f"expected a prompt of context_length = {length} tokens, got "
                f"{num_tokens} for a cache that holds {num_cached}"
            )
        position_ids = given.get("position_ids")
        if isinstance(position_ids, Tensor) and int(position_ids.max()) >= seen:
            raise RuntimeError(
                f"expected positions below {seen} for a chunk of {num_tokens} tokens behind "
                f"{num_cached}, got {int(position_ids.max())}: some versions of "
                "transformers number the chunks of generate(prefill_chunk_size=...) wrongly; "
                "moekv.prefill_in_chunks does not"
            )

    # --- After a prefill --------------------------------------------------------------------------

    def last_states(self, hidden_states: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """Copy the inputs of the last tokens that no head will lack.

        Parameters
        ----------
        hidden_states : Tensor [B, T, hidden]
            Of an attention layer's prefill.
        lengths : sequence of B ints
            Real tokens of each row.

        Returns
        -------
        Tensor [B, N, hidden], or None where compression does not go on.
        """
        press, length = self._press, hidden_states.shape[1]
        if not press._goes_on:
            return None
        run = self._run_without_gaps(press._keep(lengths, press._ahead(length)), lengths)
        return hidden_states[:, length - run :].clone()

    def read(self, index: int, projected: Tensor | None) -> Tensor | None:
        """Say what is to be noted of what a calibrated router reads of new tokens.

        Parameters
        ----------
        index : int
            Of the layer.
        projected : Tensor [B, N, H + E] or None
            See ``CalibratedRouter.project``.

        Returns
        -------
        Tensor [B, H, N], float32, or None
            None where there is none, or compression does not go on.
        """
        router = self._press._calibrated
        if router is None or projected is None or not self._press._goes_on:
            return None
        return router.read(index, projected)

    def adopt(self, rated: "_Rated", kept: Kept | None) -> None:
        """Make a layer that has been compressed after its prefill ready for the next time, if any.

        Parameters
        ----------
        rated : _Rated
        kept : Kept or None
            What the layer holds now; None: all.
        """
        if rated.states is None:
            return
        press, rating = self._press, rated.done
        layer = growth.growing(rated.cache, rated.index, backend=press.backend)
        growth.remember(layer, rated.states, press.window)
        if rated.read is not None:
            layer.notes = growth.take_notes(rated.read, kept, backend=press.backend)
        self._expect(layer)
        padding = [rating.scores.shape[2] - n for n in rating.lengths]
        layer.counted = (press._pairs, sum(growth.count_pairs(layer, 0, padding)))

    # --- After a forward that adds tokens ---------------------------------------------------------

    def after_attention(
        self,
        module: nn.Module,
        kwargs: dict[str, Any],
        hidden_states: Tensor,
        cache: Cache,
        attentions: Tensor | None,
    ) -> None:
        """Rate a layer that has got new tokens, and let pairs leave after the last layer.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        kwargs : dict
            Of its forward.
        hidden_states : Tensor [B, Q, hidden]
            Its input.
        cache : Cache
        attentions : Tensor or None
        """
        press = self._press
        index: int = module.layer_idx  # type: ignore[assignment]
        layer = growth.growing(cache, index, backend=press.backend)
        growth.remember(layer, hidden_states, press.window)
        if press._calibrated is not None:
            with torch.no_grad():
                projected = press._calibrated.project(index, hidden_states)
                growth.note(layer, press._calibrated.read(index, projected))
        if module is press._hooked[0]:
            check_ratio(press.compression_ratio)
            self._plan = self._make_plan(
                cache, hidden_states.shape[1], kwargs.get("attention_mask")
            )
        plan = self._plan
        if plan is None:
            return
        with torch.no_grad():
            held = Held.of(layer, plan.padding)
            assert layer.recent is not None
            view = held.view(
                module,
                layer.recent.states(press.window),
                attentions,
                kwargs,
                kinds=press._kinds(module),
                backend=press.backend,
            )
            (rating,) = press._rate([press._look_at(view)], held.alone(plan.keep))
            scores = rating.scores.view(held.shape)
            plan.regrown.append((Regrown(index, layer, scores, held.start, held.lengths), rating))
            if module is press._hooked[-1]:
                self._plan = None
                del held, view
                self._shrink(cache, plan)

    def _make_plan(self, cache: Cache, fed: int, mask: Any) -> _Plan | None:
        """Say what is to stay of a cache whose first layer has got new tokens; None: all."""
        press = self._press
        indices: list[Any] = [module.layer_idx for module in press._hooked]
        layers = [growth.growing(cache, index, backend=press.backend) for index in indices]
        keys, _ = cached_pairs(layers[0])
        batch, num_heads = keys.shape[:2]
        seen = layers[0].get_seq_length()
        in_prompt = (
            press.context_length is not None
            and seen <= press.context_length
            and not getattr(layers[0], "evicted", 0)
        )
        padding: Sequence[int] = (0,) * batch

        def too_many(limit: Sequence[int]) -> bool:
            counts = [
                growth.count_pairs(layer, 0 if layer is layers[0] else fed, padding)
                for layer in layers
            ]
            return growth.exceeds(counts, num_heads, limit, over_model=press._budget == "model")

        if in_prompt:
            padding = press._view.row_starts(mask, batch)
            keep = limit = press._keep([seen - p for p in padding], press._ahead(seen))
        elif press.decoding is not None:
            keep = [press.decoding.target] * batch
            limit = [press.decoding.target + press.decoding.interval - 1] * batch
            if too_many(limit):
                padding = press._view.row_starts(mask, batch)
        else:
            return None
        if not too_many(limit):
            return None
        ragged = in_prompt or any(padding) or press._budget != "uniform"
        if ragged:
            check_attention(press._hooked[0], "heads or layers of different lengths")
        return _Plan(padding, keep, ragged, [])

    def _shrink(self, cache: Cache, plan: _Plan) -> None:
        """Let pairs leave the rated layers."""
        press = self._press
        kept = growth.choose(
            [each for each, _ in plan.regrown],
            plan.keep,
            budget=press._budget,
            sinks=press.sinks,
            recent=press.recent,
            backend=press.backend,
        )
        if plan.ragged:
            kept = [replace(chosen, per_head=None) for chosen in kept]
        for (each, rating), chosen in zip(plan.regrown, kept, strict=True):
            layer = growth.recompress(cache, each, chosen, backend=press.backend)
            held = [sum(row) for row in each.lengths]
            heads = each.scores.shape[1]
            if layer.recent is not None:
                run = self._run_without_gaps(plan.keep, [n // heads for n in held])
                layer.recent.keep(run, layer.get_seq_length())
            self._expect(layer)
            self._record(layer, rating, chosen, sum(held))

    def _run_without_gaps(self, keep: Sequence[int], lengths: Sequence[int]) -> int:
        press = self._press
        return growth.run_without_gaps(
            keep, lengths, sinks=press.sinks, recent=press.recent, window=press.window
        )

    def _expect(self, layer: growth.Grown) -> None:
        """Tell a layer how far it will grow, where that is known."""
        config = self._press.decoding
        if config is not None:
            layer.most = config.interval
            if isinstance(layer, GrowingLayer):
                layer.most += config.target
            if layer.notes is not None:
                layer.notes.most = layer.most

    def _record(self, layer: growth.Grown, rating: "_Rating", kept: Kept, num_held: int) -> None:
        """Count the pairs that have come since those of the layer were counted, and what stays."""
        press = self._press
        share = kept.mask().float()
        rows = rating.seen.shares.shape[1]
        press._observe([rating], [share.mean(1) if len(share) == rows else share.flatten(0, 1)])
        owner, counted = layer.counted
        counted = counted if owner is press._pairs else 0
        num_kept = len(kept.indices)
        keys, values = cached_pairs(layer)
        pair = (keys.shape[-1] + values.shape[-1]) * keys.dtype.itemsize
        for numbers, unit in ((press._pairs, 1), (press._bytes, pair)):
            numbers[0] += (num_held - counted) * unit
            numbers[1] += (num_kept - counted) * unit
        layer.counted = (press._pairs, num_kept)
