"""Install moekv into another environment as it is installed here, without building it again.

`install_editable.py PYTHON`: an editable install is a few files that name the sources; what
belongs to it stands in its record.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path


def install(python: str) -> None:
    """Copy the files of the editable install beside the packages of another interpreter."""
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    target = Path(done.stdout.strip())
    for file in distribution("moekv").files or ():
        # Not the commands, which name the interpreter, nor what that has compiled.
        if ".." not in file.parts and file.suffix != ".pyc":
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(str(file.locate())), target / file)


if __name__ == "__main__":
    install(sys.argv[1])
