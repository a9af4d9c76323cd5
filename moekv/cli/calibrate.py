"""Fit a router to a model: ``moekv calibrate --model NAME --texts FILES --out FOLDER``.

Each file is one text, read up to ``--length`` tokens. The folder is what
``MoERouterPress(router=FOLDER)`` takes. An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moekv.calibration.calibrate import calibrate
from moekv.calibration.config import CalibrationConfig
from moekv.cli.main import CommandError, make_console
from moekv.models.loading import DEFAULT_MODEL, ModelUnavailableError, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    default = CalibrationConfig()
    parser.add_argument("--model", default=DEFAULT_MODEL, help="hub id or folder [%(default)s]")
    parser.add_argument("--texts", nargs="+", type=Path, required=True, help="text files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the router")
    parser.add_argument("--length", type=int, default=default.length, help="[%(default)s]")
    parser.add_argument("--top-k", type=int, default=default.top_k, help="[%(default)s]")
    parser.add_argument(
        "--experts",
        nargs="+",
        default=list(default.experts),
        help=f"beside learned [{' '.join(default.experts)}]",
    )
    parser.add_argument("--exponent", type=float, default=default.exponent, help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=default.seed, help="[%(default)s]")
    parser.add_argument(
        "--keep-checkpoint", action="store_true", help="leave what was read, for ablations"
    )


def run(args: argparse.Namespace) -> None:
    """Fit, save, and say how well held-out texts are ranked.

    Raises
    ------
    CommandError
        An option is wrong, a text cannot be read, or the model is not to be had.
    """
    try:
        config = CalibrationConfig(
            experts=tuple(args.experts),
            top_k=args.top_k,
            length=args.length,
            exponent=args.exponent,
            seed=args.seed,
        )
        texts = [path.read_text(encoding="utf-8") for path in args.texts]
        model, tokenizer = load_model(args.model)
        router = calibrate(
            model,
            tokenizer,
            texts,
            config=config,
            checkpoint=args.out / "checkpoint.pt",
            keep_checkpoint=args.keep_checkpoint,
        )
    except (ValueError, TypeError, ModelUnavailableError, OSError) as error:
        raise CommandError(str(error)) from error
    router.save_pretrained(args.out)
    curve = [row["ranking_loss"] for row in router.recipe["curve"]]
    console = make_console()
    console.print(
        f"{len(texts)} texts; share of what should be kept that is missed on held-out texts: "
        f"{curve[0]:.4f} with even gates, {min(curve):.4f} trained"
    )
    console.print(f"router for {router.model} in {args.out}")
