"""One ``with`` block on one model: its hooks, and which strategy a forward calls for."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from moekv.cache.attention import copy_last, install
from moekv.cache.caches import check_cache, is_static
from moekv.cache.layer import CompressedLayer
from moekv.cache.static import CompactStaticLayer
from moekv.experts.view import ViewBuilder, read_starts
from moekv.models.hooks import (
    attentions_of,
    check_attention,
    find_layers,
    has_own_attention,
    hook_arguments,
    index_of,
    is_pressed,
    is_sliding,
    lent_rotary,
)
from moekv.models.queries import projected_queries
from moekv.models.watching import watched
from moekv.press.forward import Call, Forward, Plan, Strategy
from moekv.press.growth import Growth
from moekv.press.options import Options, check_able, check_count
from moekv.press.prefill import Prefill
from moekv.press.rating import Rater
from moekv.press.stats import Statistics
from moekv.press.streaming import Streaming


class Session:
    """A block in which prefills of a model are compressed.

    A forward's state is an object of that forward, on a stack of its thread: made before the
    decoder runs, dropped behind it, whether it fails or not.

    Parameters
    ----------
    model : PreTrainedModel
    options : callable
        Gives the press's options as they are when a forward begins.
    rater : callable
        Gives the rater for options.
    statistics : callable
        Gives those that a forward adds to.
    context_length : int, optional
        Length of a prompt in chunks, padding included.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        See ``MoERouterPress.__call__``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        options: Callable[[], Options],
        rater: Callable[[Options], Rater],
        statistics: Callable[[], Statistics],
        context_length: int | None = None,
    ) -> None:
        self.model = model
        self.decoder, layers = find_layers(model)
        if is_in_session(self.decoder) or any(is_pressed(layer) for layer in layers):
            raise RuntimeError(
                "expected a model without a press at work, got one inside another press's block; "
                "kvpress.ComposedPress chains presses"
            )
        self.all_layers = layers
        self.layers = [layer for layer in layers if not is_sliding(layer)]
        if not self.layers:
            raise ValueError(
                "expected layers with full attention, got sliding windows in all of them: "
                "their caches are bounded already"
            )
        if context_length is not None:
            check_count("context_length", context_length, 1)
        self._options, self._rater = options, rater
        self._statistics = statistics
        self._context_length = context_length
        self._rotary: nn.Module | None = getattr(self.decoder, "rotary_emb", None)
        self._local = threading.local()
        self._has_acted = False
        self._possible: Options | None = None
        self._check(options())

    def _check(self, options: Options) -> None:
        """Refuse what no forward in the block could do."""
        if options is self._possible:
            return
        if self._context_length is not None:
            if options.streaming:
                raise ValueError(
                    "expected streaming or context_length, got both: a prompt in chunks has pairs "
                    "of all layers leave after each chunk, and its peak is bounded by that"
                )
            if options.policy == "dominant":
                raise ValueError(
                    "expected policy 'mixture' where compression goes on during decoding or "
                    "between chunks, got 'dominant', which has no budget to come back to"
                )
            check_able(self._rater(options).experts)
        if options.budget in ("head", "model") and options.evicts:
            check_attention(self.layers[0], f"budget {options.budget!r}")
        self._possible = options

    # --- The block --------------------------------------------------------------------------------

    @contextmanager
    def open(self) -> Iterator[None]:
        """Watch the model's forwards in a block."""
        install()
        rater = self._rater(self._options())
        with ExitStack() as stack:

            def hook(handle: Any) -> None:
                stack.callback(handle.remove)

            stack.callback(self._close)
            if self.model is not self.decoder:
                hook(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
            hook(self.decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True))
            for layer in self.layers:
                hook(layer.register_forward_hook(self._after_attention, with_kwargs=True))
            if rater.borrows:
                stack.enter_context(lent_rotary(self.decoder, self.all_layers))
            # Kernels that replace the model's own may rotate queries in place.
            kept = self.layers if rater.expects and not self.model.use_kernels else []
            stack.enter_context(projected_queries(kept, self._projections))
            stack.enter_context(watched(self.layers, self._notice))
            yield

    def _close(self) -> None:
        """Give up forwards that were interrupted, for which no hook is called."""
        while self._stack:
            forward = self._stack.pop()
            self._over.append(forward.handle)
            self._end(forward)
        self._take_down()

    # --- State of this thread ---------------------------------------------------------------------

    @property
    def _stack(self) -> list[Forward]:
        """Forwards that run in this thread, the innermost last."""
        return self._of_thread("stack")

    @property
    def _over(self) -> list[Any]:
        """Hooks of this thread's forwards that have failed."""
        return self._of_thread("over")

    def _of_thread(self, name: str) -> list[Any]:
        found: list[Any] | None = getattr(self._local, name, None)
        if found is None:
            found = []
            setattr(self._local, name, found)
        return found

    def _projections(self) -> dict[nn.Module, Tensor] | None:
        stack = self._stack
        return stack[-1].projected if stack and stack[-1].asks else None

    def _notice(self, module: nn.Module, query: Tensor) -> None:
        stack = self._stack
        if stack and stack[-1].asks and query.shape[2] > 1:
            forward = stack[-1]
            assert forward.strategy is not None
            forward.queries[module] = copy_last(query, forward.strategy.plan.options.window)

    # --- Hooks ------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note of how many tokens the caller wants logits: he may take all but the first back."""
        if not torch.compiler.is_compiling():
            wanted = kwargs.get("logits_to_keep")
            self._local.wanted = wanted if isinstance(wanted, int) else 0

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse what cannot be compressed before anything runs; else choose what is to be done."""
        if torch.compiler.is_compiling():
            return
        self._take_down()
        forward = Forward(self._choose(_bound(module, args, kwargs)))
        if forward.strategy is None and not self._stack:
            return
        # For this forward alone: compiled steps over a static cache are guarded by hooks of this
        # kind, and would be compiled again in every block.
        forward.handle = self.decoder.register_forward_hook(
            partial(self._after_forward, weakref.ref(forward)), always_call=True
        )
        self._stack.append(forward)

    def _after_attention(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Hand over what a layer has done."""
        if torch.compiler.is_compiling() or not self._stack:
            return  # a step over a static cache, which is compressed after its prefill alone
        forward = self._stack[-1]
        if forward.strategy is None:
            return
        hidden_states, cache = hook_arguments(kwargs, "hidden_states", "past_key_values")
        forward.strategy.take(
            Call(
                module,
                hidden_states,
                cache,
                kwargs,
                attentions_of(output),
                forward.queries.pop(module, None),
                forward.projected.pop(module, None),
            )
        )
        self._has_acted |= forward.strategy.is_done

    def _after_forward(
        self, forward_of: weakref.ref[Forward], module: nn.Module, args: Any, output: Any
    ) -> None:
        """Drop a forward's state; ``output`` is None where it has failed."""
        if not self._stack or self._stack[-1] is not forward_of():
            return  # the end of another one: in another thread, or inside this one
        forward = self._stack.pop()
        self._over.append(forward.handle)
        if output is not None:
            self._take_down()
        plan = None if forward.strategy is None else forward.strategy.plan
        if not self._end(forward) and output is not None and plan is not None and plan.evicts:
            raise RuntimeError(
                "MoERouterPress compressed nothing: the forward has ended, and not all attention "
                f"layers that carry the hooks were called (transformers {transformers.__version__})"
            )

    def _take_down(self) -> None:
        """Remove hooks of forwards that are over; not while torch runs through them."""
        over: list[Any] = self._over
        while over:
            over.pop().remove()

    @staticmethod
    def _end(forward: Forward) -> bool:
        """Give up what a forward has not finished; say whether there was nothing to give up."""
        if forward.strategy is None or forward.strategy.is_done:
            return True
        forward.strategy.abort()
        return False

    # --- What a forward calls for -----------------------------------------------------------------

    def _choose(self, given: Mapping[str, Any]) -> Strategy | None:
        wanted, self._local.wanted = getattr(self._local, "wanted", 0), 0
        options = self._options()
        cache = given.get("past_key_values")
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        num_tokens = 0 if tokens is None else tokens.shape[1]
        num_cached = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        self._check(options)
        goes_on = options.decoding is not None or self._context_length is not None
        if cache is not None and num_cached and goes_on:
            self._check_grown(options, cache)
        plan = self._plan(options, cache, wanted, num_tokens)
        view = ViewBuilder(self._rotary)
        if cache is not None and num_cached:
            self._check_more(plan, cache, num_cached, num_tokens, wanted, given)
            return Growth(plan, view) if plan.goes_on else None
        self._check_prefill(plan, cache, num_tokens, given)
        return Streaming(plan, view) if options.streaming else Prefill(plan, view)

    def _check_grown(self, options: Options, cache: Cache) -> None:
        """Refuse what cannot be compressed again; do without a router that has not seen all."""
        check_cache(cache, grown=True)
        layers = [cache.layers[index_of(module)] for module in self.layers]
        if not all(isinstance(x, CompressedLayer) and x.whole_notes() for x in layers):
            self._rater(options).see_unknown_tokens()

    def _plan(self, options: Options, cache: Any, wanted: int, num_tokens: int) -> Plan:
        rater = self._rater(options)
        budget = options.budget
        if budget == "auto":
            budget = "model" if self._may_be_ragged(options, rater, cache) else "uniform"
        # What may be taken back stays in every head, so that it can be: of the tokens whose
        # logits assisted decoding asks for, all but the first are guesses.
        guesses = wanted - 1 if 1 < wanted < num_tokens else 0
        recent = max(options.recent, min(guesses, options.window))
        return Plan(
            options,
            rater,
            self._statistics(),
            self.layers,
            budget,
            self._context_length,
            recent,
        )

    def _may_be_ragged(self, options: Options, rater: Rater, cache: Any) -> bool:
        if is_static(cache) or has_own_attention(self.layers[0]) or options.policy == "dominant":
            return False
        goes_on = options.decoding is not None or self._context_length is not None
        return rater.calibrated is not None or (not goes_on and rater.comparable)

    def _check_prefill(
        self, plan: Plan, cache: Any, num_tokens: int, given: Mapping[str, Any]
    ) -> None:
        mask, padded = given.get("attention_mask"), False
        if isinstance(mask, Tensor) and plan.evicts:
            padded = any(read_starts(mask[..., :num_tokens] if is_static(cache) else mask))
        if cache is not None:
            check_cache(cache, static=_not_for_static(plan, padded))
        if plan.context_length is not None:
            _check_chunk(plan.context_length, 0, num_tokens, given)
            if plan.evicts:
                check_attention(self.layers[0], "a prompt in chunks")
        if padded:
            check_attention(self.layers[0], "rows with padding")

    def _check_more(
        self,
        plan: Plan,
        cache: Cache,
        num_cached: int,
        num_tokens: int,
        wanted: int,
        given: Mapping[str, Any],
    ) -> None:
        """Refuse tokens for a cache that holds some, unless all that goes on can be right."""
        first_layer = cache.layers[index_of(self.layers[0])]
        serves = plan.goes_on or self._has_acted or _is_compressed(first_layer)
        if plan.evicts and not serves:
            raise RuntimeError(
                f"MoERouterPress compressed nothing: expected a prefill inside the block, got "
                f"{num_tokens} token(s) for a cache that holds {num_cached}, fed outside of it"
            )
        if num_tokens <= 1:
            return
        if plan.context_length is not None and num_cached < plan.context_length:
            _check_chunk(plan.context_length, num_cached, num_tokens, given)
            return
        if plan.options.decoding is None and wanted != num_tokens:
            raise RuntimeError(
                f"expected a prefill in one forward, got {num_tokens} tokens for a cache that "
                f"holds {num_cached}: leave the `with` block before feeding more than one "
                "token at a time, and feed the whole prompt at once, or give its length "
                "as context_length (moekv.prefill_in_chunks does)"
            )
        position = given.get("cache_position")
        first = num_cached if position is None else int(position[0])
        if _is_compressed(first_layer) and first != num_cached:
            raise RuntimeError(
                f"expected tokens at position {num_cached}, behind what the cache has seen, got "
                f"{num_tokens} at {first}: their masks would be wrong"
            )


def is_in_session(decoder: nn.Module) -> bool:
    """Say whether a press is at work on a decoder."""
    hooks = decoder._forward_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), Session) for hook in hooks)


def _bound(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Mapping[str, Any]:
    try:
        return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:
        return kwargs


def _is_compressed(layer: Any) -> bool:
    if isinstance(layer, CompressedLayer):
        return layer.context_length > 0
    return isinstance(layer, CompactStaticLayer)


def _not_for_static(plan: Plan, padded: bool) -> str | None:
    """Name what keeps the press from compressing a static cache."""
    options = plan.options
    if plan.goes_on:
        return "compression that goes on (decoding, context_length)"
    if options.streaming:
        return "streaming, which gives memory back while layers arrive"
    if plan.evicts and (plan.budget != "uniform" or options.policy != "mixture"):
        return f"budget {plan.budget!r} with policy {options.policy!r}"
    return "rows with padding" if padded else None


def _check_chunk(length: int, num_cached: int, num_tokens: int, given: Mapping[str, Any]) -> None:
    """Refuse a chunk beyond the prompt, and one at other positions than its own."""
    seen = num_cached + num_tokens
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
