"""The demo's run: a model reads a text once and answers questions; both are measured."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from moekv import MoERouterPress
from moekv.cache.rows import Rows
from moekv.contexts.context import encode, turn
from moekv.models.hooks import cache_argument
from moekv.press.reports import Stats

INSTRUCTION = "Answer the question in a few words, from the text above."


@dataclass(frozen=True)
class Question:
    """A question, and words of which a right answer has one (none: not known).

    The first is how the text has it.
    """

    text: str
    facts: tuple[str, ...] = ()

    def is_right(self, answer: str) -> bool | None:
        """Return whether an answer is right, None where that is not known."""
        if not self.facts:
            return None
        return any(fact.lower() in answer.lower() for fact in self.facts)


@dataclass
class Result:
    """Results of one run: of reading the context, and of every question."""

    ratio: float
    cache_bytes: int
    prefill_seconds: float
    press_seconds: float
    stats: Stats | None
    answers: list[str] = field(default_factory=list)
    decode_steps: int = 0
    decode_seconds: float = 0.0


class Prompt:
    """A text as the context of a chat, cut where the question begins.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    text : str
    max_tokens : int or None
        Read only so many tokens of the text.

    Attributes
    ----------
    text : str
        What is read.
    ids : Tensor [1, T]
        The token ids of the context.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None
    ) -> None:
        self.tokenizer = tokenizer
        self.text = text.strip()
        if max_tokens is not None:
            ids = tokenizer(self.text, add_special_tokens=False)["input_ids"]
            if max_tokens > len(ids):
                raise ValueError(f"expected at most {len(ids)} --context-tokens, got {max_tokens}")
            self.text = str(tokenizer.decode(ids[:max_tokens]))
        before, self._after = turn(tokenizer)
        self.ids = encode(tokenizer, before + self.text)

    def question_ids(self, question: str) -> Tensor:
        """Token ids [1, n] of a question, after the context."""
        return encode(self.tokenizer, f"\n\n{INSTRUCTION} {question}{self._after}")


def read(
    model: PreTrainedModel,
    prompt: Prompt,
    press: MoERouterPress | None,
    progress: Progress,
    title: str,
) -> tuple[Result, DynamicCache]:
    """Prefill the context, under a press or without.

    Returns
    -------
    result : Result
        Without answers yet.
    cache : DynamicCache
        Of the context alone.
    """
    layers = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    task = progress.add_task(title, total=len(layers))
    cache = DynamicCache()
    clock = _PressClock(model, lambda: progress.advance(task))
    with torch.no_grad(), contextlib.ExitStack() as stack:
        # Hooks run in the order of their registration: the press's between these two.
        for layer in layers:
            stack.callback(layer.register_forward_hook(clock.start).remove)
        if press is not None:
            stack.enter_context(press(model))
        for layer in layers:
            stack.callback(layer.register_forward_hook(clock.stop).remove)
        begin = _now(model)
        model(
            input_ids=prompt.ids.to(model.device), **cache_argument(model, cache), logits_to_keep=1
        )
        seconds = _now(model) - begin
    progress.remove_task(task)
    result = Result(
        ratio=press.compression_ratio if press else 0.0,
        cache_bytes=cache_bytes(cache),
        prefill_seconds=seconds,
        press_seconds=clock.seconds,
        stats=press.get_stats() if press else None,
    )
    return result, cache


def ask(
    model: PreTrainedModel,
    prompt: Prompt,
    questions: Sequence[Question],
    cache: DynamicCache,
    result: Result,
    progress: Progress,
    title: str,
    max_new_tokens: int,
) -> None:
    """Ask each question of a copy of the cache, greedily, and add the answers to the result."""
    stop = model.generation_config.eos_token_id if model.generation_config else None
    stops = set(stop) if isinstance(stop, list) else {stop}
    task = progress.add_task(title, total=len(questions))
    for question in questions:
        own = cache_argument(model, copy.deepcopy(cache))
        ids = prompt.question_ids(question.text).to(model.device)
        # Positions stay those of the full context, however short the cache is.
        position = prompt.ids.shape[1]
        answer: list[int] = []
        for step in range(max_new_tokens):
            positions = torch.arange(position, position + ids.shape[1], device=ids.device)
            begin = _now(model)
            with torch.no_grad():
                logits = model(
                    input_ids=ids,
                    **own,
                    position_ids=positions[None],
                    logits_to_keep=1,
                ).logits
            token = int(logits[0, -1].argmax())
            if step:  # the first reads the question
                result.decode_steps += 1
                result.decode_seconds += _now(model) - begin
            if token in stops:
                break
            answer.append(token)
            position += ids.shape[1]
            ids = ids.new_tensor([[token]])
        text = str(prompt.tokenizer.decode(answer, skip_special_tokens=True))
        result.answers.append(text.strip())
        progress.advance(task)
    progress.remove_task(task)


class _PressClock:
    """Times what lies between two forward hooks of the attention layers."""

    def __init__(self, model: PreTrainedModel, done: Callable[[], None]) -> None:
        self.seconds = 0.0
        self._model = model
        self._done = done
        self._begin = 0.0

    def start(self, module: nn.Module, args: Any, output: Any) -> None:
        self._begin = _now(self._model)

    def stop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seconds += _now(self._model) - self._begin
        self._done()


def _now(model: PreTrainedModel) -> float:
    """Seconds on the clock, once the model's device has done its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _tensors_of(value: object) -> tuple[torch.Tensor, ...]:
    """Tensors that a layer holds together, as rows in one format."""
    return value.tensors if isinstance(value, Rows) else ()


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the storages under all tensors that a cache's layers hold."""
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in (value,) if isinstance(value, torch.Tensor) else _tensors_of(value):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
