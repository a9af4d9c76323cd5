"""Fit a router to a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moekv.calibration.calibrate import calibrate
from moekv.calibration.config import CalibrationConfig
from moekv.cli.common import CommandError, make_console
from moekv.models.loading import DEFAULT_MODEL, load_model


def run(
    *,
    texts: Sequence[Path],
    out: Path,
    model: str | None,
    settings: dict[str, Any],
    keep_checkpoint: bool,
) -> None:
    """Fit, save, and say how well held-out texts are ranked.

    Parameters
    ----------
    settings : dict
        Of :class:`CalibrationConfig`, where they are not the defaults.

    Raises
    ------
    CommandError
        An option is wrong, a text cannot be read, or the model is not to be had.
    """
    if out.exists() and not out.is_dir():
        raise CommandError(f"expected a folder for the router, got the file {out}")
    try:
        config = CalibrationConfig(**settings)
        read = [path.read_text(encoding="utf-8") for path in texts]
        loaded, tokenizer = load_model(model or DEFAULT_MODEL)
        router = calibrate(
            loaded,
            tokenizer,
            read,
            config=config,
            checkpoint=out / "checkpoint.pt",
            keep_checkpoint=keep_checkpoint,
        )
    except (ValueError, TypeError, OSError) as error:
        raise CommandError(str(error)) from error
    router.save_pretrained(out)
    curve = [row["ranking_loss"] for row in router.recipe["curve"]]
    console = make_console()
    console.print(
        f"{len(texts)} texts; share of what should be kept that is missed on held-out texts: "
        f"{curve[0]:.4f} with even gates, {min(curve):.4f} trained"
    )
    console.print(f"router for {router.model} in {out}")
