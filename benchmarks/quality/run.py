"""Run methods on tasks, one line of JSON per answer, so that an interrupted run goes on."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .metrics import compare
from .presses import METHODS
from .replay import Recording, answer_logits, footprint, prefill, record, replay
from .tasks import Sample, encode, make_sample

FULL = "full cache"


@dataclass(frozen=True)
class Cell:
    """One answer: a method at a ratio on a sample."""

    task: str
    length: int
    index: int
    method: str
    ratio: float

    @property
    def sample(self) -> tuple[str, int, int]:
        return self.task, self.length, self.index


def cells(
    tasks: Sequence[str],
    lengths: Sequence[int],
    num_samples: int,
    methods: Sequence[str],
    ratios: Sequence[float],
) -> Iterator[Cell]:
    """Go through samples, the full cache first, then every method at every ratio."""
    for index in range(num_samples):
        for length in lengths:
            for task in tasks:
                yield Cell(task, length, index, FULL, 0.0)
                for method in methods:
                    for ratio in ratios:
                        yield Cell(task, length, index, method, ratio)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a results file; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def _drop_cut_line(path: Path) -> None:
    """Remove what an interruption left of a line, before another is appended."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def forget(path: Path, methods: Sequence[str]) -> None:
    """Drop the answers of methods that changed since they were measured."""
    _drop_cut_line(path)
    if path.exists():
        lines = path.read_text().splitlines(True)
        kept = [line for line in lines if json.loads(line)["cell"]["method"] not in methods]
        path.write_text("".join(kept))


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[Cell],
    path: Path,
    *,
    seed: int = 0,
    live: bool = False,
    suite: Mapping[str, Sequence[Sample]] | None = None,
) -> None:
    """Answer all wanted cells that `path` does not hold yet, and append them.

    Parameters
    ----------
    model, tokenizer
        The language model.
    wanted : sequence of Cell
        In the order of :func:`cells`.
    path : Path
        File of JSON lines: the cell, `kl`, `nll`, `exact`, `kept`, `pairs`, `bytes`, `seconds`
        (of the replayed prefill, press included), or the cell and `error`.
    seed : int
        Of the samples.
    live : bool
        Prefill with the whole model for every cell instead of replaying.
    suite : mapping, optional
        Samples of each task, by index, instead of those that are made from the seed.
    """
    done = {Cell(**row["cell"]) for row in read_results(path)}
    todo = [cell for cell in wanted if cell not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_cut_line(path)
    bench: _Bench | None = None
    columns = ("[progress.description]{task.description}",)
    with (
        path.open("a") as file,
        _findable_tokenizer(model, tokenizer),
        Progress(
            *map(TextColumn, columns), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        ) as progress,
    ):
        bar = progress.add_task("", total=len(todo))
        for cell in todo:
            progress.update(bar, description=f"{cell.task} {cell.method} {cell.ratio:.0%}")
            if bench is None or bench.sample != cell.sample:
                sample = (
                    make_sample(
                        cell.task, tokenizer, length=cell.length, index=cell.index, seed=seed
                    )
                    if suite is None
                    else suite[cell.task][cell.index]
                )
                bench = _Bench(model, tokenizer, cell, sample, live)
            row = {"cell": asdict(cell)} | bench.measure(cell)
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress.advance(bar)


class _Bench:
    """One sample, prefilled."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cell: Cell,
        sample: Sample,
        live: bool,
    ) -> None:
        self.model, self.sample, self.live = model, cell.sample, live
        ids = (torch.tensor([part], device=model.device) for part in encode(sample, tokenizer))
        self.context, self.question, self.answer = ids
        self.recording: Recording = record(model, self.context)
        self.full_logits = self._answer(replay(model, self.recording, None))

    def measure(self, cell: Cell) -> dict[str, Any]:
        try:
            press = None if cell.method == FULL else METHODS[cell.method](cell.ratio)
            begin = time.perf_counter()
            if self.live:
                cache = prefill(self.model, self.context, press)
            else:
                cache = replay(self.model, self.recording, press)
            seconds = time.perf_counter() - begin
            size = footprint(self.model, cache, self.recording)
            quality = compare(self._answer(cache), self.full_logits, self.answer[0])
        except Exception as error:  # a method that fails is a result
            gc.collect()
            return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
        return asdict(quality) | asdict(size) | {"seconds": seconds}

    def _answer(self, cache: Any) -> Tensor:
        length = self.context.shape[1]
        return answer_logits(self.model, cache, length, self.question, self.answer)


@contextmanager
def _findable_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[None]:
    """Let presses that load the tokenizer by the model's name find this one."""
    name = model.config.name_or_path
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        model.config.name_or_path = folder
        try:
            yield
        finally:
            model.config.name_or_path = name
