"""vLLM's own server with the plug-in on."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from moekv.integrations.vllm.options import KEY, ServingOptions
from moekv.integrations.vllm.plugin import TESTED, check_version


def parse(model: str, options: dict[str, Any], arguments: Sequence[str]) -> tuple[Any, Namespace]:
    """Parse the arguments of vLLM's server.

    Parameters
    ----------
    model : str
        Name or folder.
    options : dict
        Of ``ServingOptions``.
    arguments : sequence of str
        Further ones, of ``vllm serve``.

    Returns
    -------
    tuple
        vLLM's command, and its arguments.

    Raises
    ------
    ImportError, RuntimeError
        There is no vLLM, or another version of it.
    ValueError, TypeError
        An option is out of range, or excludes another.
    SystemExit
        From vLLM: it does not know an argument, or was asked for help.
    """
    ServingOptions(**options)
    if find_spec("vllm") is None:
        raise ImportError(f"expected vLLM {TESTED}.* beside moekv, got none: pip install vllm")
    _share_metrics()
    check_version()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if not current_platform.is_cpu():
        raise RuntimeError(f"expected vLLM on CPUs, got {current_platform.device_type}")
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="moekv")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", model, *arguments])
    given = args.additional_config or {}
    if KEY in given:
        raise ValueError(f"expected moekv's options as options, got {KEY!r} in --additional-config")
    args.additional_config = {**given, KEY: options}
    command.validate(args)
    return command, args


_metrics: TemporaryDirectory[str] | None = None


def _share_metrics() -> None:
    """Make Prometheus collect over vLLM's processes; it reads this when it is imported."""
    global _metrics
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        _metrics = TemporaryDirectory()  # goes with the process
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics.name
