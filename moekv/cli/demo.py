"""Compress the KV cache of a real model, and ask it about what it has read.

The model reads a story of about 1,900 tokens with facts in it. Its cache is compressed before any
question is known; then it answers greedily. Every figure is measured: bytes on the storages of
the cache's tensors, times on the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from moekv import MoERouterPress
from moekv.cli.main import CommandError, make_console
from moekv.models.chat import user_turn
from moekv.models.hooks import cache_argument
from moekv.models.loading import DEFAULT_MODEL, load_model

INSTRUCTION = "Answer the question in a few words, from the text above."
DTYPES = ("bfloat16", "float16", "float32")


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
    stats: dict[str, Any]
    answers: list[str] = field(default_factory=list)
    decode_steps: int = 0
    decode_seconds: float = 0.0


# --- Command --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--model", metavar="NAME", help="hub id or local folder (default: SmolLM2-135M-Instruct)")
    add(
        "--ratios",
        type=_ratio,
        nargs="+",
        default=[0.5, 0.75],
        metavar="R",
        help="shares of the cache to remove (default: 0 0.5 0.75); 0, the full cache, always runs",
    )
    add("--context", type=Path, metavar="FILE", help="a text of your own instead of the story")
    add(
        "--question",
        action="append",
        metavar="TEXT",
        help="a question of your own, may be repeated; --context needs one",
    )
    add("--context-tokens", type=_positive, metavar="N", help="read the text's first N tokens only")
    add("--max-new-tokens", type=_positive, default=24, metavar="N", help="default: %(default)s")
    add("--num-experts", type=_positive, metavar="N", help="default: what the press takes")
    add("--top-k", type=_positive, metavar="K", help="default: what the press takes")
    add("--router", metavar="TYPE", help="default: what the press takes")
    add("--budget", default="auto", help="auto, uniform, head or model (default: %(default)s)")
    add("--backend", default="auto", help="auto, cpu, cuda or torch (default: %(default)s)")
    add("--device", help="where the model runs (default: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Run the demo."""

    def make_press(ratio: float) -> MoERouterPress:
        return MoERouterPress(
            compression_ratio=ratio,
            num_experts=args.num_experts,
            top_k=args.top_k,
            router_type=args.router,
            budget=args.budget,
            backend=args.backend,
        )

    console = make_console()
    name = args.model or DEFAULT_MODEL
    begin = time.perf_counter()
    try:
        if args.context is not None and not args.question:
            raise ValueError("expected a --question about --context")
        text = _story() if args.context is None else args.context.read_text(encoding="utf-8")
        make_press(0.5)  # a wrong option shows before the model is loaded
        with console.status(f"Loading {name}"), _quiet():
            model, tokenizer = load_model(name, getattr(torch, args.dtype), args.device)
        prompt = Prompt(tokenizer, text, args.context_tokens)
    except (ValueError, RuntimeError, OSError) as error:
        raise CommandError(str(error)) from error
    questions = [Question(question) for question in args.question or ()] or [
        question for question in QUESTIONS if question.facts[0] in prompt.text
    ]
    if not questions:
        raise CommandError(f"the first {args.context_tokens} tokens have no fact to ask for")

    layers = model.config.get_text_config().num_hidden_layers
    console.print(
        f"[bold]{name}[/], {layers} layers, {args.dtype} on {model.device}, "
        f"loaded in {time.perf_counter() - begin:.1f} s; {torch.get_num_threads()} threads"
    )
    console.print(f"{prompt.ids.shape[1]:,} tokens of context, {len(questions)} questions")

    results: list[Result] = []
    with _progress(console) as progress:
        # The first pass pays for memory and kernels that the others find ready.
        read(model, prompt, None, progress, "Warming up")
        for ratio in sorted({0.0, *args.ratios}):
            title = _title(ratio)
            press = make_press(ratio) if ratio > 0 else None
            try:
                result, cache = read(model, prompt, press, progress, f"{title}: reading")
            except (TypeError, ValueError) as error:  # the press cannot serve this model
                raise CommandError(str(error)) from error
            if results:
                _check_compressed(result, results[0])
            ask(
                model,
                prompt,
                questions,
                cache,
                result,
                progress,
                f"{title}: answering",
                args.max_new_tokens,
            )
            results.append(result)

    for table in (
        answers_table(questions, results),
        costs_table(questions, results),
        *(router_table(result) for result in results[-1:] if result.ratio > 0),
    ):
        console.print()
        console.print(table)


def _ratio(text: str) -> float:
    ratio = float(text)
    if not 0 <= ratio < 1:
        raise argparse.ArgumentTypeError(f"expected a ratio in [0, 1), got {text}")
    return ratio


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return number


def _story() -> str:
    return resources.files("moekv").joinpath("data/lighthouse.txt").read_text(encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the progress bars of transformers, which has several kinds of them."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_compressed(result: Result, full: Result) -> None:
    """Raise if the press left the cache as it was: nothing is worse than doing so silently."""
    if result.cache_bytes >= full.cache_bytes or not result.stats["forward_count"]:
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
        plain = (tokenizer.bos_token or "", "\nAnswer:")
        before, self._after = user_turn(tokenizer) or plain
        self.ids = self._encode(before + self.text)

    def question_ids(self, question: str) -> Tensor:
        """Token ids [1, n] of what follows the context when a question is asked."""
        return self._encode(f"\n\n{INSTRUCTION} {question}{self._after}")

    def _encode(self, text: str) -> Tensor:
        ids: Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids


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
        stats=press.get_stats() if press else {},
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


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the storages under all tensors that a cache's layers hold."""
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# --- Showing --------------------------------------------------------------------------------------


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
    )


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


def answers_table(questions: Sequence[Question], results: Sequence[Result]) -> Table:
    """Show the answers side by side; a right one is green, a wrong one red."""
    table = _results_table("Answers", "Question", results, show_lines=True, expand=True)
    for number, question in enumerate(questions):
        cells = []
        for result in results:
            answer = " ".join(result.answers[number].split())
            mark, style = {None: ("", ""), True: ("✓ ", "green"), False: ("✗ ", "red")}[
                question.is_right(answer)
            ]
            cells.append(Text(mark + answer, style))
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
        right = (
            sum(bool(q.is_right(answer)) for q, answer in zip(questions, r.answers, strict=True))
            for r in results
        )
        row("Right answers", (f"{count} of {len(questions)}" for count in right))
    return table


def router_table(result: Result) -> Table:
    """Show the say of the experts in each layer, and what each alone would have kept."""
    layers = result.stats["layer_stats"]
    names = list(layers[min(layers)]["router_stats"]["expert_usage_ratios"])
    table = Table(
        title=f"Experts at {_title(result.ratio)}: their share of the weight, and the share of the "
        "last tokens' attention on what each alone would keep (hit rate); the router is "
        f"{result.stats['router']}",
        title_justify="left",
        title_style="bold",
        padding=0,
    )
    table.add_column("Layer", justify="right")
    for name in names:
        table.add_column(name, min_width=_HEAT_WIDTH)
    for index, stats in layers.items():
        measured = stats["expert_compression_stats"]
        say, hits = measured["expert_usage"], measured["cache_hit_rates"]
        table.add_row(str(index), *(_heat(say[name], hits[name]) for name in names))
    return table


_HEAT_WIDTH = 13


def _heat(share: float, hits: float) -> Text:
    """Weight and hit rate in percent, on a ground that is the bluer the more it hits."""
    red, green, blue = (round(20 + hits * (top - 20)) for top in (40, 110, 255))
    text = f"{100 * share:.0f} %, {100 * hits:.0f} %"
    return Text(text.center(_HEAT_WIDTH), f"white on rgb({red},{green},{blue})")
