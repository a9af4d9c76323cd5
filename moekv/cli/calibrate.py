"""Fit a router to a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moekv.calibration.calibrate import calibrate
from moekv.calibration.config import CalibrationConfig
from moekv.calibration.needs import Needs
from moekv.cli.common import CommandError, check_folder, load, make_console, reason
from moekv.contexts.documents import read_document
from moekv.models.fingerprint import short
from moekv.models.index import DEFAULT_MODEL


def run(
    *,
    texts: Sequence[Path],
    out: Path,
    model: str | None,
    settings: dict[str, Any],
    keep_checkpoint: bool,
    memory: float,
    device: str | None,
    dtype: str,
) -> None:
    """Fit, save, and print how well held-out texts are ranked.

    Parameters
    ----------
    settings : dict
        Of :class:`CalibrationConfig`, where they are not the defaults.
    memory : float
        GiB that calibration may hold beside the model.

    Raises
    ------
    CommandError
        An option is wrong, a text cannot be read, or the model is not to be had.
    """
    check_folder(out)
    console = make_console()

    def announce(needs: Needs) -> None:
        console.print(f"{len(texts)} texts; takes {needs}")

    try:
        config = CalibrationConfig(**settings)
        read = [read_document(path) for path in texts]
        loaded, tokenizer = load(model or DEFAULT_MODEL, dtype, device)
        router = calibrate(
            loaded,
            tokenizer,
            read,
            config=config,
            checkpoint=out / "checkpoint.pt",
            keep_checkpoint=keep_checkpoint,
            memory=int(memory * 2**30),
            announce=announce,
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise CommandError(reason(error)) from error
    router.save_pretrained(out)
    curve = [row["ranking_loss"] for row in router.recipe["curve"]]
    console.print(
        f"{len(texts)} texts; share of what should be kept that is missed on held-out texts: "
        f"{curve[0]:.4f} with even gates, {min(curve):.4f} trained"
    )
    console.print(f"router for {short(router.model)} in {out}")
