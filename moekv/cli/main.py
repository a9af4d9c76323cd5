"""The command line: ``moekv info``, ``demo``, ``calibrate``, ``bench``.

A command is a module with ``add_arguments(parser)`` and ``run(args)``; the first line of its
docstring is its summary. ``run`` raises :class:`CommandError` for what the user can mend; any other
exception is a bug, and shows its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from rich.console import Console

from moekv import __version__

COMMANDS = {
    "info": "moekv.cli.info",
    "demo": "moekv.cli.demo",
    "calibrate": "moekv.cli.calibrate",
    "bench": "moekv.cli.bench",
}


class CommandError(Exception):
    """A failure that a message explains; the command exits with status 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, by default those of the process.

    Returns
    -------
    int
        The exit status: 0, 1 for a failed command, 130 where the user interrupted it. Wrong
        arguments exit with status 2.
    """
    parser = argparse.ArgumentParser(
        prog="moekv", description="Mixture-of-experts compression of KV caches."
    )
    parser.add_argument("--version", action="version", version=f"moekv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
        description = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=description.partition("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["bench"] and given[1:2] not in (["run"], ["report"], ["-h"], ["--help"]):
        given.insert(1, "run")  # options alone are those of a run
    args = parser.parse_args(given)
    try:
        args.run(args)
    except CommandError as error:
        print(f"moekv {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def make_console() -> Console:
    """Return where commands print to; not too narrow for tables where there is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    return console
