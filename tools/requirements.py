"""Print what moekv needs to run, and for an extra, as pip takes it: `requirements.py test`."""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement


def requirements(extra: str) -> list[str]:
    """List what the installed moekv and one of its extras require."""
    found = []
    for line in requires("moekv") or ():
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        if marker is None or marker.evaluate({"extra": extra}):
            found.append(str(requirement))
    return found


if __name__ == "__main__":
    print(*requirements(sys.argv[1]), sep="\n")
