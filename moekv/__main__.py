"""``python -m moekv`` and the ``moekv`` command."""

from moekv.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
