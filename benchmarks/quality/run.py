"""Run methods on tasks, one line of JSON per answer, so that an interrupted run goes on."""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kvpress import BasePress
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from moekv import MoERouterPress

from .metrics import compare
from .presses import EAGER, LIVE, METHODS, spare_windows
from .replay import Recording, answer_logits, attending, footprint, prefill, record, replay, write
from .scores import score
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


Samples = Callable[[Cell], Sample]
"""Where the samples of a run come from."""


def from_seed(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, make: Callable[..., Sample] = make_sample
) -> Samples:
    """Make the samples of the benchmark's own tasks, or of others that are made alike."""
    return lambda cell: make(cell.task, tokenizer, length=cell.length, index=cell.index, seed=seed)


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
    samples: Samples | None = None,
    *,
    live: bool = False,
    seen: bool = False,
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
        (of the replayed prefill, press included), or the cell and `error`. Where a sample has a
        metric, `text`, what the model wrote, and its `score`.
    samples : callable, optional
        Makes the sample of a cell; None: see :func:`from_seed`.
    live : bool
        Prefill with the whole model for every cell instead of replaying, which methods in ``EAGER``
        always do, under eager attention.
    seen : bool
        Compress the question with its context, see :func:`encode`.
    """
    samples = samples or from_seed(tokenizer)
    done = {Cell(**row["cell"]) for row in read_results(path)}
    todo = [cell for cell in wanted if cell not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_cut_line(path)
    bench: _Bench | None = None
    name = model.config.name_or_path
    columns = ("[progress.description]{task.description}",)
    with (
        path.open("a") as file,
        _findable_tokenizer(model, tokenizer) as folder,
        Progress(
            *map(TextColumn, columns), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        ) as progress,
    ):
        bar = progress.add_task("", total=len(todo))
        for cell in todo:
            progress.update(bar, description=f"{cell.task} {cell.method} {cell.ratio:.0%}")
            if bench is None or bench.sample != cell.sample:
                bench = _Bench(model, tokenizer, cell, samples(cell), live=live, seen=seen)
            row = {"cell": asdict(cell)} | bench.measure(cell)
            if "error" in row:
                row["error"] = row["error"].replace(folder, name)
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
        *,
        live: bool,
        seen: bool,
    ) -> None:
        self.model, self.tokenizer, self.sample, self.live = model, tokenizer, cell.sample, live
        self.asked = sample
        parts = encode(sample, tokenizer, seen=seen)
        ids = (torch.tensor([part], device=model.device) for part in parts)
        self.context, self.question, self.answer = ids
        self.recording: Recording = record(model, self.context)
        self._full_logits: dict[bool, Tensor] = {}

    def measure(self, cell: Cell) -> dict[str, Any]:
        eager = cell.method in EAGER
        torch.manual_seed(zlib.crc32(repr(cell).encode()))  # some presses draw random numbers
        try:
            press = None if cell.method == FULL else METHODS[cell.method](cell.ratio)
            if press is not None and not isinstance(press, MoERouterPress):
                press = spare_windows(press)
            begin = time.perf_counter()
            cache = self._prefill(press, eager, live=cell.method in LIVE)
            seconds = time.perf_counter() - begin
            size = footprint(self.model, cache, self.recording)
            written = self._written(cell, cache) if self.asked.metric else {}
            quality = compare(self._answer(cache), self._full(eager), self.answer[0])
        except Exception as error:  # a method that fails is a result
            gc.collect()
            first = next(iter(str(error).strip().splitlines()), "")
            return {"error": f"{type(error).__name__}: {first}"}
        return asdict(quality) | asdict(size) | {"seconds": seconds} | written

    def _written(self, cell: Cell, cache: Cache) -> dict[str, Any]:
        """What the model writes, and its score; the cache is left as it is."""
        length, most = self.context.shape[1], self.asked.max_new_tokens
        tokens = write(self.model, copy.deepcopy(cache), length, self.question, most)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return {"text": text, "score": score(text, self.asked, cell.task)}

    def _prefill(self, press: BasePress | None, eager: bool, *, live: bool = False) -> Cache:
        own = self.model.config._attn_implementation
        with attending(self.model, "eager" if eager else own):
            if self.live or eager or live:
                return prefill(self.model, self.context, press)
            return replay(self.model, self.recording, press)

    def _full(self, eager: bool) -> Tensor:
        """Logits from the full cache that the same kind of attention prefilled."""
        if eager not in self._full_logits:
            self._full_logits[eager] = self._answer(self._prefill(None, eager))
        return self._full_logits[eager]

    def _answer(self, cache: Cache) -> Tensor:
        length = self.context.shape[1]
        return answer_logits(self.model, cache, length, self.question, self.answer)


@contextmanager
def _findable_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Let presses that load the tokenizer by the model's name find this one, in a folder."""
    name = model.config.name_or_path
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        model.config.name_or_path = folder
        try:
            yield folder
        finally:
            model.config.name_or_path = name
