"""The command line: ``moekv info``, ``demo``, ``ask``, ``serve``, ``bench``, ``calibrate``.

This module has the commands' options and help. Each command is a module of its own, which is
imported when it runs: ``moekv --help`` loads neither torch nor transformers.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from moekv import __version__
from moekv.cli.common import CommandError
from moekv.cli.options import (
    Backend,
    Budget,
    Device,
    DType,
    Experts,
    Model,
    NewTokens,
    Pairs,
    Router,
    TopK,
    Weights,
    completing,
)

_HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="moekv",
    no_args_is_help=True,
    # Plain text: the same in every terminal, in pipes and in documents.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"moekv {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Mixture-of-experts compression of KV caches."""


@app.command()
def info() -> None:
    """Show versions, instruction sets, libraries and backends.

    \b
    Example:
      moekv info
    """
    from moekv.cli.info import run

    run()


@app.command()
def demo(
    model: Model = None,
    ratio: Annotated[
        list[float],
        typer.Option(
            "--ratio",
            "-r",
            metavar="R",
            min=0,
            help="Share of the cache to remove, in [0, 1); may be repeated. 0 always runs.",
        ),
    ] = [0.5, 0.75],  # noqa: B006
    context: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text of your own instead of the story.")
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            "-q",
            metavar="TEXT",
            help="A question of your own, may be repeated; --context needs one.",
        ),
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Read the text's first N tokens only.")
    ] = None,
    max_new_tokens: NewTokens = 24,
    num_experts: Experts = None,
    top_k: TopK = None,
    router: Router = None,
    budget: Budget = "auto",
    pairs: Pairs = "16",
    backend: Backend = "auto",
    device: Device = None,
    dtype: Weights = DType.auto,
) -> None:
    """Compress a real model's cache, and answer from it.

    The model reads a story of about 1,900 tokens with facts in it. Its cache is compressed before
    any question is known; then it answers. All figures are measured: bytes on the storages of the
    cache's tensors, times on the clock.

    \b
    Examples:
      moekv demo
      moekv demo --ratio 0.9 --question "Who keeps the lighthouse?"
    """
    from moekv.cli.demo import run

    run(
        model=model,
        ratios=ratio,
        context=context,
        questions=question or [],
        context_tokens=context_tokens,
        max_new_tokens=max_new_tokens,
        options={
            "num_experts": num_experts,
            "top_k": top_k,
            "router_type": router,
            "budget": budget,
            "pairs": pairs,
            "backend": backend,
        },
        device=device,
        dtype=dtype.value,
    )


@app.command()
def ask(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="Text, Markdown, HTML or PDF; - is standard input."),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            "-q",
            metavar="TEXT",
            help="May be repeated. Without one, questions are read from the terminal.",
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio",
            "-r",
            min=0,
            metavar="R",
            help="Share of the cache to remove, in [0, 1).",
            show_default="0.75",
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the compressed context to a file.")
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Load a context that --save wrote, instead of reading documents."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a page that shows which tokens were retained, and why."
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the full cache's answers as well.")
    ] = False,
    chunk_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Read N tokens at a time, for long documents."),
    ] = None,
    model: Model = None,
    max_new_tokens: NewTokens = 128,
    router: Router = None,
    budget: Budget = "auto",
    pairs: Pairs = "16",
    backend: Backend = "auto",
    device: Device = None,
    dtype: Weights = DType.auto,
) -> None:
    """Answer questions about documents, which are read once.

    The default model is small, and often wrong with the full cache as well: --compare shows what
    the full cache answers, and --model takes a larger one.

    \b
    Examples:
      moekv ask report.pdf -q "Who signed it?" -q "What did it cost?"
      moekv ask notes/*.md --save notes.safetensors --html notes.html
      moekv ask --load notes.safetensors -q "What is left to do?"
    """
    from moekv.cli.ask import run

    run(
        files=files or [],
        questions=question or [],
        ratio=ratio,
        save=save,
        load=load,
        html=html,
        compare=compare,
        chunk_size=chunk_size,
        model=model,
        max_new_tokens=max_new_tokens,
        options={"router_type": router, "budget": budget, "pairs": pairs, "backend": backend},
        device=device,
        dtype=dtype.value,
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or local folder.")],
    compression_ratio: Annotated[
        float,
        typer.Option(min=0, metavar="R", help="Share of each prompt's pairs to remove, in [0, 1)."),
    ] = 0.5,
    budget: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Scope of the budget: uniform or model.",
            autocompletion=completing(("uniform", "model")),
        ),
    ] = "model",
    interval: Annotated[
        int | None,
        typer.Option(
            min=32,
            metavar="N",
            help="Compress after every N tokens, too; takes --no-enable-prefix-caching.",
        ),
    ] = None,
) -> None:
    """Serve a model with vLLM, and compress its prompts.

    This is vLLM's own OpenAI-compatible server. All further options are vLLM's; `vllm serve --help`
    lists them.

    \b
    Example:
      moekv serve HuggingFaceTB/SmolLM2-135M-Instruct --compression-ratio 0.75 --block-size 32
    """
    from moekv.cli.serve import run

    run(
        model=model,
        ratio=compression_ratio,
        budget=budget,
        interval=interval,
        arguments=context.args,
    )


@app.command(
    add_help_option=False,
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def bench(context: typer.Context) -> None:
    """Measure quality: `moekv bench run`, `moekv bench report`.

    The benchmark is part of the source tree; `moekv bench run --help` lists its options.

    \b
    Example:
      moekv bench run --tasks facts --ratios 0.75 --samples 1 --methods moekv --out facts
    """
    from moekv.cli.bench import run

    run(context.args)


@app.command()
def calibrate(
    texts: Annotated[
        list[Path],
        typer.Argument(metavar="TEXT", help="Files of text (or HTML, PDF), one text each."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to save the router in.")],
    model: Model = None,
    length: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens of a text at most.", show_default="1024"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Experts per token.", show_default="2"),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An expert beside learned, may be repeated.",
            show_default="expected",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens to train the gates on.", show_default="8192"),
    ] = None,
    exponent: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Of the power mean over the oracle's queries.", show_default="2.0"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Random seed.", show_default="0")
    ] = None,
    keep_checkpoint: Annotated[
        bool,
        typer.Option("--keep-checkpoint", help="Keep the checkpoint at the end, for ablations."),
    ] = False,
    memory: Annotated[
        float,
        typer.Option(min=0, metavar="GIB", help="Memory to use beside the model."),
    ] = 8.0,
    device: Device = None,
    dtype: Weights = DType.auto,
) -> None:
    """Fit a router to a model.

    Use it with `MoERouterPress(router=FOLDER)`. The memory that the run takes is printed before it
    begins; an interrupted run resumes from a checkpoint in the folder. With less memory, layers are
    fitted in groups, and the texts are read once for each group.

    \b
    Example:
      moekv calibrate texts/*.txt --out router
    """
    from moekv.cli.calibrate import run

    settings = {
        "length": length,
        "top_k": top_k,
        "experts": tuple(expert) if expert else None,
        "samples": samples,
        "exponent": exponent,
        "seed": seed,
    }
    run(
        texts=texts,
        out=out,
        model=model,
        settings={name: value for name, value in settings.items() if value is not None},
        keep_checkpoint=keep_checkpoint,
        memory=memory,
        device=device,
        dtype=dtype.value,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, by default those of the process.

    Returns
    -------
    int
        The exit status: 0; 2 where a command failed or its arguments are wrong; 130 where the user
        interrupted it.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    # Accepted anywhere: people add it at the end of a line that failed.
    given = [argument for argument in given if argument != "--debug"]
    name = f"moekv {given[0]}" if given and not given[0].startswith("-") else "moekv"
    try:
        return int(app(given, prog_name="moekv", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # `moekv ... | head`
        sys.stderr.close()
        return 0
    except Exception as error:
        if debug and not hasattr(error, "format_message"):
            traceback.print_exc()
            return 2
        print(_explain(name, error, bool(given)), file=sys.stderr)
        return 2


def _explain(name: str, error: Exception, anything: bool) -> str:
    if isinstance(error, CommandError):
        return f"{name}: error: {error}"
    if not hasattr(error, "format_message"):
        kind, what = type(error).__name__, " ".join(str(error).split())
        return f"{name}: error: {kind}: {what} (--debug shows where)"
    message = str(error.format_message())
    if not anything:
        return message  # the help
    commands = {
        f"moekv {each.callback.__name__}" for each in app.registered_commands if each.callback
    }
    helps = name if name in commands else "moekv"
    return f"{name}: error: {message.rstrip('.')}; see {helps} --help"
