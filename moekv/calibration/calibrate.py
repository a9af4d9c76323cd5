"""Calibration: fit routers so that mixed scores rank pairs as an expensive oracle does.

The oracle reads the text a second time, as KVzip does (Kim et al., 2025): after the text and the
words "repeat the previous context", the text follows again. Pairs that its tokens attend to are
those that continuations, quotations and answers are likely to need. The score of a pair is the
power mean of the attention from all these queries: KVzip's maximum retains pairs that one query
needed, a mean those that many need; an exponent between does both.

For each layer

1. the expert ``learned`` comes from a ridge regression on the log of the oracle's scores, over all
   tokens, in closed form; the other experts are brought to its scale;
2. the gates are trained by gradient descent, through ``gating_topk``, on a sample of the tokens,
   with a load-balancing loss, until the ranking of held-out texts no longer improves. ``learned``
   is best on the texts that it was fitted to, so gates trained on these would weigh it too high.
   Therefore texts are clustered into domains, and on the tokens of a domain the gates are trained
   with a ``learned`` fitted to the other domains.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moekv.calibration.config import CalibrationConfig
from moekv.calibration.gates import train_gates
from moekv.calibration.needs import JUDGED, MAX_HELD_OUT, MEMORY, Needs, calibration_needs
from moekv.calibration.oracle import Oracle, Reading
from moekv.calibration.ridge import Sample, Solved, Sums, set_experts, solve
from moekv.calibration.router import CalibratedRouter
from moekv.files import whole_file
from moekv.models.chat import check_tokenizer
from moekv.models.fingerprint import fingerprint
from moekv.models.traceless import traceless
from moekv.models.weights import device_of, language_model


def find_domains(vectors: Tensor, count: int) -> list[int]:
    """Cluster texts into domains: k-means on directions.

    Parameters
    ----------
    vectors : Tensor [N, hidden]
        Mean of the token embeddings of each text.
    count : int
        Groups, at most.

    Returns
    -------
    list of N int
        Group of each, from 0.
    """
    vectors = vectors.double() - vectors.double().mean(0)
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    chosen = [0]  # then always the one farthest from those before
    while len(chosen) < min(count, len(vectors)):
        chosen.append(int((vectors @ vectors[chosen].t()).amax(1).argmin()))
    centres = vectors[chosen]
    for _ in range(20):
        groups = (vectors @ centres.t()).argmax(1)
        one_hot = nn.functional.one_hot(groups, len(centres)).double()
        centres = one_hot.t() @ vectors
        centres = centres / centres.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return [int(group) for group in groups]


def _undisturbed(function: Callable[..., CalibratedRouter]) -> Callable[..., CalibratedRouter]:
    """Have a function read a model in eval mode, with gradients, and in the model's own dtypes."""

    @functools.wraps(function)
    def run(model: PreTrainedModel, *args: Any, **kwargs: Any) -> CalibratedRouter:
        language_model(model)
        with (
            traceless(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast(device_of(model).type, enabled=False),
        ):
            return function(model, *args, **kwargs)

    return run


@_undisturbed
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    config: CalibrationConfig | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    keep_checkpoint: bool = False,
    memory: int = MEMORY,
    announce: Callable[[Needs], None] | None = None,
    progress: bool = True,
) -> CalibratedRouter:
    """Fit a router to a model.

    Every second text is read as the user's turn of a chat, where the tokenizer knows chats. The
    layers are fitted together as far as `memory` allows, else in groups, for each of which all
    texts are read again: the result is the same. The model is read in eval mode, whatever it is in,
    and without autocast.

    Parameters
    ----------
    model : PreTrainedModel
        On any device, in any floating dtype.
    tokenizer : PreTrainedTokenizerBase
    texts : sequence of str
        Texts as the model will see them: prose, code, tables, dialogues; some dozens, of about
        `length` tokens. Longer ones are cut, those of fewer than 64 tokens left out.
    config : CalibrationConfig, optional
    checkpoint : path, optional
        A file that is written after every eighth text, from which a calibration resumes; removed at
        the end. Each group of layers has its own, with the layers' numbers in its name.
    keep_checkpoint : bool
        Whether to leave it, with the sums over all texts.
    memory : int
        Bytes that calibration may hold beside the model, 8 GiB by default.
    announce : callable, optional
        Called first, with the memory and disk space that the calibration takes.
    progress : bool
        Whether to show progress bars.

    Returns
    -------
    CalibratedRouter
        For ``MoERouterPress(router=...)``; its ``recipe`` holds the settings and the curve of the
        held-out ranking loss.

    Raises
    ------
    ValueError
        Fewer than two texts are long enough, the checkpoint belongs to another calibration, or
        one layer at a time takes more than `memory`.
    TypeError
        The model has no decoder layers with attention.
    RuntimeError
        A press's block is open on the model, so that its caches lack pairs.
    """
    config = config or CalibrationConfig()
    check_tokenizer(tokenizer)
    if isinstance(texts, str):
        raise TypeError("expected a list of texts, got one str")
    oracle = Oracle(model, tokenizer, config)
    texts = [text for text in texts if len(oracle.encode(text)) >= 64]
    if len(texts) < 2:
        raise ValueError(f"expected two or more texts of 64 tokens or more, got {len(texts)}")
    layer: Any = oracle.layers[0]
    keys = layer.config.num_key_value_heads
    router = CalibratedRouter(
        model=fingerprint(model),
        layers=[int(x.layer_idx) for x in oracle.layers],  # type: ignore[arg-type]
        hidden_size=int(layer.config.hidden_size),
        num_kv_heads=keys,
        experts=list(config.experts),
        top_k=config.top_k,
        choices=oracle.choices,
        recipe={
            "model_name": model.config.name_or_path,
            "num_texts": len(texts),
            "texts_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
            "config": asdict(config),
        },
    )
    needs = calibration_needs(router, config, itemsize=model.dtype.itemsize, memory=memory)
    files = _checkpoints(Path(checkpoint), needs) if checkpoint else [None] * len(needs.groups)
    if announce is not None:
        announce(needs)
    plan = _Plan(oracle, texts, router)
    solved, samples = [], []
    with _bars(progress) as bars:
        for rows, file in zip(needs.groups, files, strict=True):
            sums = plan.read(rows, file, bars)
            solved.append(solve(sums, router, config.ridge))
            samples.append(sums.sample)
            del sums  # the next group's take its place
        found = Solved.join(solved)
        set_experts(router, found)
        bar = bars.add_task("training gates", total=config.epochs + 1)

        def report(epoch: int, loss: float) -> None:
            bars.update(bar, advance=1, description=f"training gates, ranking loss {loss:.4f}")

        sample = Sample.join(samples)
        router.recipe["curve"] = train_gates(sample, found.without, router, config, report)
    if not keep_checkpoint:
        for file in files:
            if file is not None:
                file.unlink(missing_ok=True)
    return router


def _checkpoints(path: Path, needs: Needs) -> list[Path]:
    """Name a file for each group of layers.

    Raises
    ------
    ValueError
        There are checkpoints of other groups, which could not be used.
    """
    files = [path]
    if len(needs.groups) > 1:
        files = [
            path.with_stem(f"{path.stem}-layers-{rows.start}-{rows.stop - 1}")
            for rows in needs.groups
        ]
    there = {*path.parent.glob(f"{path.stem}-layers-*{path.suffix}"), *path.parent.glob(path.name)}
    if other := sorted(there.difference(files)):
        raise ValueError(
            f"expected checkpoints of groups of {len(needs.groups[0])} layers, got {other[0]}: "
            "give as much memory as when it began, or remove it to begin again"
        )
    return files


class _Plan:
    """Which texts are held out and of which domain each is: the same for every group of layers."""

    def __init__(self, oracle: Oracle, texts: Sequence[str], router: CalibratedRouter) -> None:
        config = oracle.config
        self._oracle, self._texts, self._router = oracle, texts, router
        self._identity = json.dumps([router.model, router.recipe["texts_sha256"], asdict(config)])
        count = max(round(len(texts) * config.held_out), 1)
        count = min(count, MAX_HELD_OUT) if config.held_out else 0
        order = random.Random(config.seed).sample(range(len(texts)), len(texts))
        self._held_out = set(order[:count])
        self._domains = find_domains(oracle.describe(texts), config.domains)
        self._share = max(config.samples // max(len(texts) - count, 1), 1)

    def read(self, rows: range, checkpoint: Path | None, bars: Progress) -> Sums:
        """Read all texts for a group of layers, from where a checkpoint ends."""
        texts = self._texts
        sums = Sums.empty(self._router, len(rows), self._oracle.config.domains)
        if checkpoint is not None and checkpoint.exists():
            sums, found = read_checkpoint(checkpoint)
            if found != json.loads(self._identity):
                raise ValueError(
                    f"expected a checkpoint of this calibration in {checkpoint}, got one of "
                    "another model, other texts or other settings; remove it to begin again"
                )
        name = "reading texts"
        if len(rows) < len(self._router.layers):
            name += f" for layers {rows.start} to {rows.stop - 1}"
        bar = bars.add_task(name, total=len(texts), completed=sums.num_texts)
        for number in range(sums.num_texts, len(texts)):
            self._add(sums, number, rows)
            bars.advance(bar)
            sums.num_texts = number + 1
            if checkpoint is not None and ((number + 1) % 8 == 0 or number + 1 == len(texts)):
                _save(checkpoint, sums, self._identity)
        return sums

    def _add(self, sums: Sums, number: int, rows: range) -> None:
        oracle, config = self._oracle, self._oracle.config
        as_turn = number % 2 == 0 and bool(oracle.before)
        reading = oracle.read(self._texts[number], as_turn=as_turn, rows=rows)
        skip = max(len(oracle.before) if as_turn else 0, config.sinks)
        reading = reading.at(slice(skip, len(reading.where) - config.recent))
        generator = torch.Generator().manual_seed(number)
        if number in self._held_out:
            keep = torch.randperm(config.length, generator=generator)[:JUDGED]
            kept = reading.at(keep[keep < len(reading.where)].sort().values)
            sums.sample.held_out.append(kept)
        else:
            sums.add(reading, self._domains[number])
            keep = torch.randperm(len(reading.where), generator=generator)[: self._share]
            sums.sample.domains.append(self._domains[number])
            sums.sample.readings.append(reading.at(keep.sort().values))


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[Sums, list[Any]]:
    """Read a checkpoint.

    Parameters
    ----------
    path : path
        A checkpoint of :func:`calibrate`.

    Returns
    -------
    sums : Sums
    identity : list
        Fingerprint of the model, digest of the texts, the configuration as a dict.

    Raises
    ------
    ValueError
        The file is not a checkpoint.
    """
    try:
        saved = torch.load(path, weights_only=True)
        sums = Sums(
            saved["gram"],
            saved["moment"],
            saved["num_texts"],
            Sample(
                [Reading(**parts) for parts in saved["sample"]],
                saved["domains"],
                [Reading(**parts) for parts in saved["held_out"]],
            ),
        )
        return sums, json.loads(saved["identity"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"expected a checkpoint of a calibration in {path}: {error}") from error


def _save(path: Path, sums: Sums, identity: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        "identity": identity,
        "num_texts": sums.num_texts,
        "gram": sums.gram,
        "moment": sums.moment,
        "domains": sums.sample.domains,
        "sample": [vars(reading) for reading in sums.sample.readings],
        "held_out": [vars(reading) for reading in sums.sample.held_out],
    }
    with whole_file(path) as temporary:
        torch.save(saved, temporary)


@contextmanager
def _bars(show: bool) -> Iterator[Progress]:
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn())
    with Progress(*columns, MofNCompleteColumn(), TimeRemainingColumn(), disable=not show) as bars:
        yield bars
