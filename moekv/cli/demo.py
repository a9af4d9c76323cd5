"""Compress the KV cache of a real model, and ask it about what it has read.

The model reads a story of about 1,900 tokens with facts in it. Its cache is compressed before any
question is known; then it answers greedily. Every figure is measured: bytes on the storages of
the cache's tensors, times on the clock.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from moekv import MoERouterPress
from moekv.cache.rows import Rows
from moekv.cli.common import CommandError, load, make_console, make_progress, size
from moekv.contexts.context import encode, turn
from moekv.models.hooks import cache_argument
from moekv.models.loading import DEFAULT_MODEL
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
        """Say whether an answer is right, None where that is not known."""
        if not self.facts:
            return None
        return any(fact.lower() in answer.lower() for fact in self.facts)


# On facts of data/lighthouse.txt, from its beginning to its end.
QUESTIONS = (
    Question("In which year was the lighthouse built?", ("1764",)),
    Question("What is the name of the keeper's sister?", ("Agnes",)),
    Question("What was the name of the ship that was wrecked on the reef?", ("Ottoline",)),
    Question("Which language did the parrot speak?", ("Portuguese",)),
    Question("Which city did the keeper always want to see?", ("Lisbon",)),
    Question("How many crates did the machinery come in?", ("eleven crates", "eleven", "11")),
)


@dataclass
class Result:
    """What one run gave: the context read once, and every question asked of its cache."""

    ratio: float
    cache_bytes: int
    prefill_seconds: float
    press_seconds: float
    stats: Stats | None
    answers: list[str] = field(default_factory=list)
    decode_steps: int = 0
    decode_seconds: float = 0.0


# --- Command --------------------------------------------------------------------------------------


def run(
    *,
    model: str | None,
    ratios: Sequence[float],
    context: Path | None,
    questions: Sequence[str],
    context_tokens: int | None,
    max_new_tokens: int,
    options: dict[str, Any],
    device: str | None,
    dtype: str,
) -> None:
    """Run the demo.

    Parameters
    ----------
    options : dict
        Of the press, but for the ratio.

    Raises
    ------
    CommandError
        An option is wrong, a file cannot be read, or the model is not to be had.
    """

    def make_press(ratio: float) -> MoERouterPress:
        return MoERouterPress(compression_ratio=ratio, **options)

    console = make_console()
    name = model or DEFAULT_MODEL
    begin = time.perf_counter()
    try:
        if context is not None and not questions:
            raise ValueError("expected a --question about --context")
        text = _story() if context is None else context.read_text(encoding="utf-8")
        for ratio in ratios:
            make_press(ratio)  # a wrong option shows before the model is loaded
        with console.status(f"Loading {name}"):
            loaded, tokenizer = load(name, dtype, device)
        prompt = Prompt(tokenizer, text, context_tokens)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    asked = [Question(question) for question in questions] or [
        question for question in QUESTIONS if question.facts[0] in prompt.text
    ]
    if not asked:
        raise CommandError(f"the first {context_tokens} tokens have no fact to ask for")

    layers = loaded.config.get_text_config().num_hidden_layers
    console.print(
        f"[bold]{name}[/], {layers} layers, {dtype} on {loaded.device}, "
        f"loaded in {time.perf_counter() - begin:.1f} s; {torch.get_num_threads()} threads"
    )
    console.print(f"{prompt.ids.shape[1]:,} tokens of context, {len(asked)} questions")

    results: list[Result] = []
    with make_progress(console) as progress:
        # The first pass pays for memory and kernels that the others find ready.
        read(loaded, prompt, None, progress, "Warming up")
        for ratio in sorted({0.0, *ratios}):
            title = _title(ratio)
            press = make_press(ratio) if ratio > 0 else None
            try:
                result, cache = read(loaded, prompt, press, progress, f"{title}: reading")
            except (TypeError, ValueError) as error:  # the press cannot serve this model
                raise CommandError(str(error)) from error
            if results:
                _check_compressed(result, results[0])
            ask(
                loaded,
                prompt,
                asked,
                cache,
                result,
                progress,
                f"{title}: answering",
                max_new_tokens,
            )
            results.append(result)

    plain = console.options.ascii_only
    for table in (answers_table(asked, results, plain), costs_table(asked, results)):
        console.print()
        console.print(table)
    console.print()
    for line in outcome(asked, results):
        console.print(line)


def _story() -> str:
    return resources.files("moekv").joinpath("data/lighthouse.txt").read_text(encoding="utf-8")


def _check_compressed(result: Result, full: Result) -> None:
    """Raise if the press left the cache as it was: nothing is worse than doing so silently."""
    rated = result.stats is not None and result.stats["forward_count"]
    if result.cache_bytes >= full.cache_bytes or not rated:
        raise CommandError(
            f"the press did nothing: {_title(result.ratio)} was asked for, but the cache has "
            f"{result.cache_bytes:,} bytes, and {full.cache_bytes:,} without a press"
        )


# --- Reading and asking ---------------------------------------------------------------------------


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
        """Token ids [1, n] of what follows the context when a question is asked."""
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


# --- Showing --------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _title(ratio: float) -> str:
    return f"{100 * ratio:g} % removed" if ratio else "Full cache"


def _results_table(title: str, first: str, results: Sequence[Result], **options: Any) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", **options)
    table.add_column(first, ratio=1, overflow="fold")
    for result in results:
        table.add_column(_title(result.ratio), ratio=1, overflow="fold")
    return table


_MARKS = {None: ("", "", ""), True: ("✓ ", "right: ", "green"), False: ("✗ ", "wrong: ", "red")}


def answers_table(
    questions: Sequence[Question], results: Sequence[Result], plain: bool = False
) -> Table:
    """Show the answers side by side; a right one is green, a wrong one red; plain in ASCII."""
    table = _results_table("Answers", "Question", results, show_lines=True, expand=True)
    for number, question in enumerate(questions):
        cells = []
        for result in results:
            answer = " ".join(result.answers[number].split())
            mark, word, style = _MARKS[question.is_right(answer)]
            cells.append(Text((word if plain else mark) + answer, style))
        table.add_row(question.text, *cells)
    return table


def costs_table(questions: Sequence[Question], results: Sequence[Result]) -> Table:
    """Show what each run cost: bytes and times."""
    full = results[0].cache_bytes
    table = _results_table("Costs, measured", "", results)

    def row(name: str, cells: Iterable[str]) -> None:
        table.add_row(name, *cells)

    row("KV cache", (f"{result.cache_bytes / 2**20:.2f} MiB" for result in results))
    row("  of the full cache's bytes", (_percent(result.cache_bytes / full) for result in results))
    row("Prefill", (f"{result.prefill_seconds:.2f} s" for result in results))
    row(
        "  of it in the press",
        (
            f"{result.press_seconds:.3f} s "
            f"({_percent(result.press_seconds / result.prefill_seconds)})"
            if result.ratio
            else "-"
            for result in results
        ),
    )
    row(
        "Decoding",
        (
            f"{result.decode_steps / result.decode_seconds:.1f} tokens/s"
            if result.decode_steps
            else "-"
            for result in results
        ),
    )
    if all(question.facts for question in questions):
        right = (_count_right(questions, result) for result in results)
        row("Right answers", (f"{count} of {len(questions)}" for count in right))
    return table


def outcome(questions: Sequence[Question], results: Sequence[Result]) -> list[str]:
    """Say in three lines what the smallest cache costs and gives."""
    full, last = results[0], results[-1]
    if last is full:
        return []
    lines = [
        f"Cache   {size(full.cache_bytes)} -> {size(last.cache_bytes)}, "
        f"{_percent(last.cache_bytes / full.cache_bytes)} of the full one",
        f"Press   {_percent(last.press_seconds / last.prefill_seconds)} of the prefill's time",
    ]
    if all(question.facts for question in questions):
        right, before = (_count_right(questions, result) for result in (last, full))
        lines.append(f"Answers {right} of {len(questions)} right, {before} with the full cache")
    else:
        same = sum(a == b for a, b in zip(last.answers, full.answers, strict=True))
        lines.append(f"Answers {same} of {len(questions)} word for word as with the full cache")
    return lines


def _count_right(questions: Sequence[Question], result: Result) -> int:
    pairs = zip(questions, result.answers, strict=True)
    return sum(bool(question.is_right(answer)) for question, answer in pairs)
