"""One JSON and one Markdown file that always hold all that is known so far."""

from __future__ import annotations

import dataclasses
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

OK, FAILED, HANG, CRASHED, SKIPPED, NOT_RUN = (
    "ok",
    "FAILED",
    "HANG",
    "CRASHED",
    "skipped",
    "not run",
)
BAD = (FAILED, HANG, CRASHED)


@dataclasses.dataclass
class Line:
    """What came of one item of a step."""

    item: str
    status: str
    seconds: float = 0.0
    message: str = ""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class StepReport:
    """The lines of one step."""

    what: str
    limit: float  # seconds
    seconds: float | None = None  # None: it has not ended
    lines: list[Line] = dataclasses.field(default_factory=list)

    @property
    def status(self) -> str:
        """Of the step: the worst of its items."""
        for line in self.lines:
            if line.status in BAD:
                return FAILED
        if self.seconds is None:
            return "running"
        if any(line.status == NOT_RUN for line in self.lines):
            return "cut short"
        return OK if any(line.status == OK for line in self.lines) else SKIPPED


class Report:
    """All steps, in the files ``gpu-check.json`` and ``gpu-check.md`` of a folder."""

    def __init__(self, folder: Path, about: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.json, self.markdown = folder / "gpu-check.json", folder / "gpu-check.md"
        self.about = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **about,
        }
        self.steps: dict[str, StepReport] = {}

    @property
    def passed(self) -> bool:
        """Whether nothing failed and nothing was cut short; what was skipped could not run."""
        return all(step.status in (OK, SKIPPED) for step in self.steps.values())

    def write(self) -> None:
        """Write both files, each whole or not at all."""
        steps = {
            name: {"status": step.status, **dataclasses.asdict(step)}
            for name, step in self.steps.items()
        }
        text = json.dumps({"about": self.about, "steps": steps}, indent=1) + "\n"
        for path, content in ((self.json, text), (self.markdown, self.render())):
            part = path.with_suffix(".part")
            part.write_text(content)
            os.replace(part, path)

    def render(self) -> str:
        """Return the Markdown."""
        parts = ["# GPU check\n", _table(["", ""], [[key, x] for key, x in self.about.items()])]
        summary = [
            [name, step.what, step.status, _number(step.seconds), _number(step.limit)]
            for name, step in self.steps.items()
        ]
        parts.append(_table(["step", "", "", "seconds", "at most"], summary))
        for name, step in self.steps.items():
            parts.append(f"## {name}: {step.what}\n")
            parts.append(_lines(step.lines))
        return "\n".join(parts)


def _lines(lines: list[Line]) -> str:
    columns = list(dict.fromkeys(key for line in lines for key in line.data))
    header = ["", *columns, "", "seconds", "message"]
    empty = [not any(line.message for line in lines)]
    rows = [
        [
            line.item,
            *(_number(line.data.get(column)) for column in columns),
            line.status,
            _number(line.seconds),
            *([] if empty[0] else [line.message]),
        ]
        for line in lines
    ]
    return _table(header[:-1] if empty[0] else header, rows)


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(_cell(x) for x in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
