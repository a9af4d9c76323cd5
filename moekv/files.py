"""Files that are written whole or not at all."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise unless a path is that of a regular file, or of none yet.

    Raises
    ------
    TypeError
        It is not a path.
    ValueError
        The path is empty, or there is a folder, a device or a pipe.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"expected the path of a file, got {type(path).__name__}")
    if not os.fspath(path):
        raise ValueError("expected the path of a file, got an empty one")
    if os.path.isdir(path):
        raise ValueError(f"expected a file, got the folder {os.fspath(path)}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"expected a file, got {os.fspath(path)}, a device or a pipe")


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Return a temporary name to write to, which is renamed at the end.

    A crash or an exception leaves the earlier file. The target of a symbolic link is replaced, and
    not the link. A replaced file passes its mode on; a new one has the mode that the umask gives.

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
    ValueError
        The path is empty, or there is a folder, a device or a pipe.
    OSError
        The file cannot be written, or links lead in a circle.
    """
    check_file(path)
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # real paths have no links
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"expected a file in a folder that is there, got {os.fspath(path)}: there is no folder "
            f"{target.parent}"
        )
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}")
    # Opened as any file is, and not by tempfile, so that the umask says who may read it.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield str(temporary)
        os.chmod(temporary, mode)  # safetensors writes a file of its own, which it renames to this
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
