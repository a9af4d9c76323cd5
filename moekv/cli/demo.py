"""Compress the KV cache of a real model, and answer questions from it.

The model reads a story of about 1,900 tokens with facts in it. Its cache is compressed before any
question is known; then it answers greedily. Every figure is measured: bytes on the storages of
the cache's tensors, times on the clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moekv import MoERouterPress
from moekv.cli.common import CommandError, load, make_console, make_progress, reason
from moekv.cli.tables import answers_table, costs_table, outcome, run_title
from moekv.cli.trial import Prompt, Question, Result, ask, read
from moekv.contexts.documents import read_document
from moekv.models.index import DEFAULT_MODEL

# On facts of data/lighthouse.txt, from its beginning to its end.
QUESTIONS = (
    Question("In which year was the lighthouse built?", ("1764",)),
    Question("What is the name of the keeper's sister?", ("Agnes",)),
    Question("What was the name of the ship that was wrecked on the reef?", ("Ottoline",)),
    Question("Which language did the parrot speak?", ("Portuguese",)),
    Question("Which city did the keeper always want to see?", ("Lisbon",)),
    Question("How many crates did the machinery come in?", ("eleven crates", "eleven", "11")),
)


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
        text = _story() if context is None else read_document(context)
        for ratio in ratios:
            make_press(ratio)  # a wrong option shows before the model is loaded
        with console.status(f"Loading {name}"):
            loaded, tokenizer = load(name, dtype, device)
        prompt = Prompt(tokenizer, text, context_tokens)
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(reason(error)) from error
    asked = [Question(question) for question in questions] or [
        question for question in QUESTIONS if question.facts[0] in prompt.text
    ]
    if not asked:
        raise CommandError(f"the first {context_tokens} tokens have no fact to ask for")

    layers = loaded.config.get_text_config().num_hidden_layers
    console.print(
        f"[bold]{name}[/], {layers} layers, {_dtype_of(loaded)} on {loaded.device}, "
        f"loaded in {time.perf_counter() - begin:.1f} s; {torch.get_num_threads()} threads"
    )
    console.print(f"{prompt.ids.shape[1]:,} tokens of context, {len(asked)} questions")

    results: list[Result] = []
    with make_progress(console) as progress:
        # The first pass pays for memory and kernels that the others find ready.
        read(loaded, prompt, None, progress, "Warming up")
        for ratio in sorted({0.0, *ratios}):
            run_name = run_title(ratio)
            press = make_press(ratio) if ratio > 0 else None
            try:
                result, cache = read(loaded, prompt, press, progress, f"{run_name}: reading")
            except (TypeError, ValueError) as error:  # the press cannot serve this model
                raise CommandError(reason(error)) from error
            if results:
                _check_compressed(result, results[0])
            ask(
                loaded,
                prompt,
                asked,
                cache,
                result,
                progress,
                f"{run_name}: answering",
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


def _dtype_of(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _story() -> str:
    return resources.files("moekv").joinpath("data/lighthouse.txt").read_text(encoding="utf-8")


def _check_compressed(result: Result, full: Result) -> None:
    """Raise if the press left the cache as it was: nothing is worse than doing so silently."""
    rated = result.stats is not None and result.stats["forward_count"]
    if result.cache_bytes >= full.cache_bytes or not rated:
        raise CommandError(
            f"the press did nothing: {run_title(result.ratio)} was asked for, but the cache has "
            f"{result.cache_bytes:,} bytes, and {full.cache_bytes:,} without a press"
        )
