"""Read documents once, compress their cache, and answer questions from it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moekv.cli import common
from moekv.cli.common import CommandError, check_output, make_console, make_progress, reason
from moekv.contexts.context import CompressedContext, compress, load_context
from moekv.contexts.documents import read_document
from moekv.models.index import DEFAULT_MODEL
from moekv.press.press import MoERouterPress
from moekv.units import size

STANDARD_INPUT = "-"


def run(
    *,
    files: Sequence[str],
    questions: Sequence[str],
    ratio: float | None,
    save: Path | None,
    load: Path | None,
    html: Path | None,
    compare: bool,
    chunk_size: int | None,
    model: str | None,
    max_new_tokens: int,
    options: dict[str, Any],
    device: str | None,
    dtype: str,
) -> None:
    """Compress, save, answer.

    Raises
    ------
    CommandError
        A file cannot be read or written, an option is wrong, or the model is not to be had.
    """
    if bool(files) == (load is not None):
        got = "both" if files else "neither"
        raise CommandError(f"expected files to read, or --load with a saved context, got {got}")
    if load is not None:
        given = {
            "--ratio": ratio is not None,
            "--save": save,
            "--html": html,
            "--compare": compare,
            "--chunk-size": chunk_size,
            "--router": options["router_type"],
            "--budget": options["budget"] != "auto",
            "--pairs": options["pairs"] != "16",
            "--backend": options["backend"] != "auto",
        }
        if wrong := [name for name, is_given in given.items() if is_given]:
            raise CommandError(
                f"expected files to read with {', '.join(wrong)}, got --load: a saved context is "
                "compressed already"
            )
    if html is not None and chunk_size is not None:
        raise CommandError(
            "expected --html or --chunk-size, got both: a page shows a prefill in one forward"
        )
    if STANDARD_INPUT in files and not questions and save is None and html is None:
        raise CommandError("expected a --question, as the document is standard input, got none")
    if compare and not questions and (save is not None or html is not None):
        raise CommandError("expected a --question, whose answers --compare shows, got none")
    if not all(question.strip() for question in questions):
        raise CommandError("expected a --question, got an empty one")
    for output in (save, html):
        if output is not None:
            check_output(output)
    if load is not None and not load.is_file():
        raise CommandError(f"expected a saved context, got {load}, which is no file")
    getLogger("pypdf").setLevel(ERROR)  # what it warns of, it reads
    try:
        presses = [MoERouterPress(compression_ratio=0.75 if ratio is None else ratio, **options)]
        document = "\n\n".join(map(_read, files))
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(reason(error)) from error
    if compare:
        presses.append(MoERouterPress(compression_ratio=0.0, backend=options["backend"]))

    console = make_console()
    name = model or DEFAULT_MODEL
    with console.status(f"Loading {name}"):
        loaded = common.load(name, dtype, device)
    try:
        if load is not None:
            contexts = [load_context(load, *loaded)]
            console.print(f"{load}: {_describe(contexts[0])}")
        else:
            contexts = [
                _compress(console, loaded, document, press, chunk_size, record=record)
                for press, record in zip(presses, (html is not None, False), strict=False)
            ]
    except (OSError, TypeError, ValueError) as error:
        raise CommandError(reason(error)) from error
    if save is not None:
        try:
            contexts[0].save(save)
        except OSError as error:
            raise CommandError(reason(error)) from error
        console.print(f"saved: {save}, {size(save.stat().st_size)}")
    if html is not None:
        try:
            contexts[0].report(html)
        except OSError as error:
            raise CommandError(reason(error)) from error
        console.print(f"report: {html}")
    written = save is not None or html is not None
    for question in questions or ([] if written else _asked(console)):
        _answer(console, contexts, question, max_new_tokens, titled=bool(questions))


def _read(file: str) -> str:
    if file != STANDARD_INPUT:
        return read_document(file)
    text = sys.stdin.read().strip()
    if not text:
        raise ValueError("expected text at standard input, got none")
    return text


def _compress(
    console: Console,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    document: str,
    press: MoERouterPress,
    chunk_size: int | None,
    *,
    record: bool,
) -> CompressedContext:
    begin = time.perf_counter()
    with make_progress(console) as progress:
        task = progress.add_task("Reading", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        context = compress(
            *loaded,
            document,
            press=press,
            chunk_size=chunk_size,
            record=record,
            progress=advance,
        )
    seconds = time.perf_counter() - begin
    console.print(f"{_describe(context)}, read in {seconds:.1f} s")
    return context


def _describe(context: CompressedContext) -> str:
    share = 100 * context.nbytes / context.full_nbytes
    return (
        f"{len(context):,} tokens; cache {size(context.full_nbytes)} -> {size(context.nbytes)} "
        f"({share:.0f} %)"
    )


def _asked(console: Console) -> Iterator[str]:
    """Read questions from the terminal until there are no more."""
    if sys.stdin.isatty():
        console.print("Ask what you like; an empty line ends.")
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def _answer(
    console: Console,
    contexts: Sequence[CompressedContext],
    question: str,
    max_new_tokens: int,
    *,
    titled: bool,
) -> None:
    if titled:
        console.print(f"\n[bold]{escape(question)}[/]")
    for context, title in zip(contexts, ("", "full cache: "), strict=False):
        begin = time.perf_counter()
        answer = context.ask(question, max_new_tokens=max_new_tokens)
        shown = f"{title}{escape(answer)}  [dim]{time.perf_counter() - begin:.1f} s[/]"
        console.print(shown, soft_wrap=not console.is_terminal)
