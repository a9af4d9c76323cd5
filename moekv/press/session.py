"""One ``with`` block on one model: its hooks, and the state of the forwards that run in it."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import EarlyExitCandidateGenerator

from moekv.cache.attention import install
from moekv.cache.static import is_compact
from moekv.models.hooks import (
    attentions_of,
    by_name,
    cache_of,
    check_prompt_learning,
    check_transformers,
    first_position,
    hook_arguments,
    is_pressed,
    is_sliding,
    lent_rotary,
    option,
    rotary_in,
    routers_in,
    why_left_alone,
)
from moekv.models.watching import Asked, watched
from moekv.models.weights import mesh_of
from moekv.press.forward import Call, Forward, Strategy
from moekv.press.options import Options
from moekv.press.planning import Planner
from moekv.press.rater import Rater
from moekv.press.stats import Statistics
from moekv.report.recording import Recording

_BEGINNING = threading.Lock()
"""Held while a block puts up the hook by which others know of it."""


def _between_graphs(function: Callable[..., None]) -> Callable[..., None]:
    """Keep a function out of the graph of a model that is being compiled."""
    reason = "a press acts between the graphs of a compiled model"
    disabled: Callable[..., None] = torch.compiler.disable(function, reason=reason)  # type: ignore[no-untyped-call]
    return disabled


class Session:
    """A block in which prefills of a model are compressed.

    A forward's state is an object on a stack of its thread: made before the decoder runs, and
    dropped after it, whether it fails or not. One hook on the decoder drops it. That hook is there
    while forwards run, and not for decoding steps: dynamo guards compiled steps over a static cache
    by hooks of this kind, and would compile them again in every block. Where threads share a block,
    the hook stays until the block ends: when a forward fails, torch iterates over the decoder's
    hooks, and no other thread may change them meanwhile. It outlives the block while forwards of
    other threads run: these raise, as what they have read has not been compressed.

    Parameters
    ----------
    model : PreTrainedModel
    decoder, layers
        See ``moekv.models.hooks.find_layers``.
    options : callable
        Returns the press's options when a forward begins.
    rater : callable
        Returns the rater for options.
    statistics : callable
        Returns those that a forward adds to.
    context_length : int, optional
        Length of a prompt in chunks, padding included.
    note : callable, optional
        Takes the record of every prefill.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        See ``MoERouterPress.__call__``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: nn.Module,
        layers: Sequence[nn.Module],
        *,
        options: Callable[[], Options],
        rater: Callable[[Options], Rater],
        statistics: Callable[[], Statistics],
        context_length: int | None = None,
        note: Callable[[Recording], None] | None = None,
    ) -> None:
        check_transformers()
        install()  # reports the queries of attention layers
        self.model = model
        self.decoder: Any = decoder
        self._name = next((name for name, x in model.named_children() if x is decoder), "")
        self.all_layers = layers
        self._check_free()
        config = model.config.get_text_config(decoder=True)
        self.layers = [layer for layer in layers if not is_sliding(layer, config)]
        if not self.layers:
            raise ValueError(
                f"expected layers with full attention, got none: {why_left_alone(layers, config)} "
                f"({type(layers[0]).__name__})"
            )
        self._planner = Planner(
            self.layers,
            rotary_in(self.decoder),
            options=options,
            rater=rater,
            statistics=statistics,
            context_length=context_length,
            note=note,
            mesh=mesh_of(model),
            shares=any(vars(x).get("is_kv_shared_layer") for x in decoder.modules()),
            origin=first_position(model),
        )
        self._depth = option(self.decoder.config, "num_hidden_layers")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._threads: set[int] = set()  # that have run forwards in the block
        self._busy: set[threading.Thread] = set()  # in whose forwards there is something to do
        self._is_over = False
        self._dropping: Any = None  # handle of the hook that drops states

    # --- The block --------------------------------------------------------------------------------

    def _check_free(self) -> None:
        if is_in_session(self.decoder) or any(is_pressed(layer) for layer in self.all_layers):
            raise RuntimeError(
                "expected a model without an open press, got one inside another press's block; "
                "kvpress.ComposedPress chains presses"
            )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Install the hooks for a block.

        Raises
        ------
        RuntimeError
            Another thread has begun a block on the model meanwhile.
        """
        rater = self._planner.rater
        with ExitStack() as stack:

            def hook(handle: Any) -> None:
                stack.callback(handle.remove)

            stack.callback(self._close)
            with _BEGINNING:
                self._check_free()
                hook(self.decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True))
            if self.model is not self.decoder:
                hook(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
            for layer in self.layers:
                hook(layer.register_forward_hook(self._after_attention, with_kwargs=True))
            for router in routers_in(self.decoder) if rater.reads_choice else ():
                hook(router.register_forward_hook(self._after_router))
            if rater.borrows:
                stack.enter_context(lent_rotary(self.decoder, self.all_layers))
            stack.enter_context(watched(self.layers, self._notice))
            yield

    def _close(self) -> None:
        """Abort forwards that were interrupted, for which no hook was called."""
        self._is_over = True
        while self._stack:
            self._end(self._stack.pop())
        self._busy.discard(threading.current_thread())
        self._take_down()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse: a copy of the model would have hooks of a block that is not its own.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError(
            "expected a model to be copied or pickled outside of a press's block, whose hooks it "
            "carries, got one inside; model.save_pretrained(...) works anywhere"
        )

    # --- State of this thread ---------------------------------------------------------------------

    @property
    def _stack(self) -> list[Forward]:
        """Forwards that run in this thread, the innermost last."""
        found: list[Forward] | None = getattr(self._local, "stack", None)
        if found is None:
            found = self._local.stack = []
        return found

    def _notice(self, module: nn.Module, asked: Asked) -> None:
        stack = self._stack
        if not _has_hook(module._forward_hooks, self):
            raise RuntimeError(
                "expected the block's hooks where it has put them, got "
                f"{type(module).__name__} without: somebody has removed them, and MoERouterPress "
                "would compress nothing. Begin another block"
            )
        if stack and stack[-1].strategy is not None:
            forward = stack[-1]
            forward.asked[module] = asked

    def _after_router(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack[-1].choice = output

    @property
    def _is_draft(self) -> bool:
        """Whether the first layers run alone, for a cache of its own (assistant_early_exit).

        Raises
        ------
        RuntimeError
            Somebody has added layers, or left some out, in the model or in its config.
        """
        depth = option(self.decoder.config, "num_hidden_layers")
        if depth == self._depth:
            return False
        if not _exits_early() or not set(self.all_layers) <= set(self.decoder.modules()):
            _changed(f"{self._depth} layers", f"{depth}")
        return True

    # --- Hooks ------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note how many tokens the caller asks logits of: all but the first may be rejected."""
        if not torch.compiler.is_compiling():
            is_here = getattr(module, self._name, None) is self.decoder  # or further inside
            if not is_here and not any(part is self.decoder for part in module.modules()):
                _changed(f"its {type(self.decoder).__name__}", "another")
            wanted = kwargs.get("logits_to_keep")
            self._local.wanted = wanted if isinstance(wanted, int) else 0

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Choose the strategy of a forward, or raise, before anything runs."""
        tokens = kwargs.get("input_ids")
        if not _is_compiled_step(kwargs.get("inputs_embeds") if tokens is None else tokens, kwargs):
            self._begin(module, args, kwargs)

    @_between_graphs
    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        _check_numbers()
        check_prompt_learning(self.model)
        if (thread := threading.get_ident()) not in self._threads:
            with self._lock:
                self._threads.add(thread)
        self._take_down()  # if a forward of this thread has failed
        wanted, self._local.wanted = getattr(self._local, "wanted", 0), 0
        stack, forward = self._stack, Forward(None)
        # If the hook is there, it takes this one off again, whatever is raised here.
        was_there = self._dropping is not None
        stack.append(forward)
        try:
            if not self._is_draft:
                forward.strategy = self._planner.choose(_bound(module, args, kwargs), wanted)
        finally:
            if not was_there and forward.strategy is None:
                stack.pop()
        if forward.strategy is not None:
            with self._lock:
                self._busy.add(threading.current_thread())
            if not was_there:
                self._put_up()

    def _after_attention(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Hand a layer's call to the strategy."""
        if not _is_compiled_step(kwargs.get("hidden_states"), kwargs):
            self._hand_over(module, args, kwargs, output)

    @_between_graphs
    def _hand_over(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self._stack:
            if module is self.layers[0] and not self._is_draft:
                self._check_announced(by_name(module, args, kwargs))
            return
        forward = self._stack[-1]
        if forward.strategy is None:
            return
        kwargs = by_name(module, args, kwargs)
        hidden_states, cache = hook_arguments(kwargs)
        forward.strategy.take(
            Call(
                module,
                hidden_states,
                cache,
                kwargs,
                attentions_of(output),
                forward.asked.pop(module, None),
                forward.choice,
            )
        )
        if forward.strategy.is_done:
            self._planner.note(cache)

    def _check_announced(self, given: Mapping[str, Any]) -> None:
        """Raise if the decoder's hooks were passed by where there was something to do."""
        cache, hidden_states = cache_of(given), given.get("hidden_states")
        if cache is None or hidden_states is None:
            return
        if self._planner.misses(cache, given, hidden_states.shape[1]):
            raise RuntimeError(
                "expected the model or its decoder to be called, got an attention layer at work in "
                "neither: MoERouterPress would compress nothing. Call model(...) or "
                "model.model(...), whose hooks model.model.forward(...) and layers that are called "
                "one by one pass by"
            )

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Drop a forward's state; ``output`` is None if it failed."""
        # None: a step that began before the hook was there.
        forward = self._stack.pop() if self._stack else None
        if not self._stack:
            with self._lock:
                self._busy.discard(threading.current_thread())
        if output is not None:
            self._take_down()
            if forward is not None and forward.strategy is not None:
                self._finish(forward.strategy)
        plan = None if forward is None or forward.strategy is None else forward.strategy.plan
        if forward is None or self._end(forward) or output is None or plan is None:
            return
        if plan.acts:
            why = (
                "the block has ended before this forward of another thread; have it wait"
                if self._is_over
                else "the forward has ended, and not all attention layers that carry the hooks "
                f"were called (transformers {transformers.__version__})"
            )
            raise RuntimeError(f"MoERouterPress compressed nothing: {why}")

    @_between_graphs
    def _finish(self, strategy: Strategy) -> None:
        cache = strategy.finish()
        if cache is not None:
            self._planner.note(cache)

    def _put_up(self) -> None:
        with self._lock:
            if self._dropping is None:
                self._dropping = self.decoder.register_forward_hook(
                    self._after_forward, always_call=True
                )

    def _take_down(self) -> None:
        """Remove the hook, unless a forward may need it or torch iterates over the hooks."""
        if self._dropping is None or self._stack:
            return
        with self._lock:
            if self._is_over:
                others = any(thread.is_alive() for thread in self._busy)
            else:
                others = len(self._threads) > 1
            if self._dropping is not None and not others:
                self._dropping.remove()
                self._dropping = None

    @staticmethod
    def _end(forward: Forward) -> bool:
        """Abort what a forward has not finished; return whether it had finished."""
        if forward.strategy is None or forward.strategy.is_done:
            return True
        forward.strategy.abort()
        return False


def _exits_early() -> bool:
    """Whether transformers is drafting with the first layers, for which it changes the config."""
    drafts = EarlyExitCandidateGenerator.get_candidates.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not drafts:
        frame = frame.f_back
    return frame is not None


def _changed(had: str, has: str) -> NoReturn:
    raise RuntimeError(
        f"expected a model with {had}, as when the block began, got {has}: MoERouterPress would "
        "compress nothing. Begin another block"
    )


def _check_numbers() -> None:
    """Raise where tensors have no numbers by which pairs could be chosen."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        what = "a transform of torch.func (vmap, grad, vjp, jvp)"
    elif torch.compiler.is_exporting():
        what = "torch.export"
    elif torch._C._get_tracing_state() is not None:
        what = "torch.jit.trace"
    else:
        return
    raise RuntimeError(
        f"expected a forward that runs in a press's block, got one under {what}, where pairs "
        "cannot be chosen. Leave the block for it; torch.compile is served"
    )


def _is_compiled_step(tokens: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a step over a compressed static cache is being traced.

    Such steps need no hook, and the graph has to stay whole.
    """
    if not torch.compiler.is_compiling() or tokens is None or tokens.shape[1] != 1:
        return False
    return is_compact(cache_of(kwargs))


def is_in_session(decoder: nn.Module) -> bool:
    """Return whether a press is open on a decoder."""
    hooks = decoder._forward_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), Session) for hook in hooks)


def _has_hook(hooks: Mapping[int, Any], session: Session) -> bool:
    return any(getattr(hook, "__self__", None) is session for hook in hooks.values())


def _bound(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Mapping[str, Any]:
    signature = inspect.signature(module.forward)
    try:
        given = dict(signature.bind_partial(*args, **kwargs).arguments)
    except TypeError:
        return kwargs
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given
