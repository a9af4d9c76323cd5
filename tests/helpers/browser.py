"""Pages in a headless Chromium: what becomes of them, and what they complain of."""

import json
import re
import shutil
import subprocess
from base64 import b64decode
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")


def browser() -> str:
    """Path of a browser; skips where there is none."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")


def evaluate(page: Path, script: str, *options: str) -> Any:
    """Open a page, run a script whose ``result`` is JSON, and return it.

    Fails if the page, or the script, leaves a message in the console.
    """
    probe = page.with_name(f"probe-{page.name}")
    ending = (
        "<script>{ let result;"
        + script
        + "; const out = document.createElement('output'); out.id = 'probed';"
        "out.textContent = btoa(encodeURIComponent(JSON.stringify(result)));"
        "document.documentElement.append(out); }</script>"
    )
    probe.write_text(page.read_text() + ending)
    command = [
        browser(),
        *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--no-first-run", f"--user-data-dir={page.parent / 'profile'}"),
        *("--virtual-time-budget=5000", "--window-size=1200,900", *options),
        *("--dump-dom", probe.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints, complaints
    (found,) = re.findall(r'id="probed">([^<]*)<', done.stdout)
    return json.loads(unquote(b64decode(found).decode()))
