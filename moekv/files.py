"""Files that are there whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give a temporary name to write to; at the end the file takes its place.

    A crash or an exception leaves what was there before.

    Parameters
    ----------
    path : path
        The file to write or replace; its folder is there.

    Yields
    ------
    str
        Beside `path`.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
