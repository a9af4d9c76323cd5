"""Serve a model with compressed prompts."""

from __future__ import annotations

from collections.abc import Sequence

from moekv.cli.common import CommandError
from moekv.integrations.vllm import serve


def run(
    *, model: str, ratio: float, budget: str, interval: int | None, arguments: Sequence[str]
) -> None:
    """Serve until interrupted.

    Raises
    ------
    CommandError
        There is no vLLM to serve with, or an option is wrong.
    """
    options = {"compression_ratio": ratio, "budget": budget, "interval": interval}
    try:
        command, args = serve.parse(model, options, arguments)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    command.cmd(args)
