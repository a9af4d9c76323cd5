"""Calibration: fit routers so that mixed scores rank pairs as an expensive oracle does.

The oracle reads the text a second time, as KVzip does (Kim et al., 2025): behind the text and the
words "repeat the previous context", the text follows again, and what its tokens look at in the
cache is what a text's continuations, quotations and answers are likely to need. Of the attention
that a pair gets from all these queries a power mean is taken: KVzip's maximum keeps pairs that one
query needed, a mean those that many need; an exponent between follows both.

For each layer

1. the expert ``learned`` comes from a ridge regression on the log of the oracle's scores, over all
   tokens, in closed form; the other experts are brought to its scale;
2. the gates are trained by gradient descent, through ``gating_topk``, on a sample of the tokens,
   with a load-balancing loss that keeps experts alive, until the ranking of held-out texts no
   longer improves. A fit is best where it was fitted, and gates that saw it there would trust it
   everywhere. So the texts are put into groups that are alike, and on a group's tokens the gates
   are trained with what ``learned`` would be without that group: they see it out of its domain.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from collections.abc import Iterator, Sequence
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
from moekv.calibration.oracle import Oracle, Reading
from moekv.calibration.ridge import Sums, fit_ridge
from moekv.calibration.router import CalibratedRouter
from moekv.files import whole_file
from moekv.models.chat import check_tokenizer
from moekv.models.fingerprint import fingerprint
from moekv.models.weights import language_model

_JUDGED = 512  # tokens of a held-out text, at most


def find_domains(vectors: Tensor, count: int) -> list[int]:
    """Put texts into groups that are alike: k-means on directions.

    Parameters
    ----------
    vectors : Tensor [N, hidden]
        Of each text the mean of its tokens' embeddings.
    count : int
        Groups, at most.

    Returns
    -------
    list of N int
        Group of each, from 0.
    """
    vectors = vectors.double() - vectors.double().mean(0)
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    chosen = [0]  # then always the one that is the least like those before
    while len(chosen) < min(count, len(vectors)):
        chosen.append(int((vectors @ vectors[chosen].t()).amax(1).argmin()))
    centres = vectors[chosen]
    for _ in range(20):
        groups = (vectors @ centres.t()).argmax(1)
        one_hot = nn.functional.one_hot(groups, len(centres)).double()
        centres = one_hot.t() @ vectors
        centres = centres / centres.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return [int(group) for group in groups]


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    config: CalibrationConfig | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    keep_checkpoint: bool = False,
    progress: bool = True,
) -> CalibratedRouter:
    """Fit a router to a model.

    Every second text is read as the user's turn of a chat, where the tokenizer knows chats.

    Parameters
    ----------
    model : PreTrainedModel
        On any device, in any floating dtype.
    tokenizer : PreTrainedTokenizerBase
    texts : sequence of str
        What the model is used for: prose, code, tables, dialogues; some dozens, of about `length`
        tokens. Longer ones are cut, those of fewer than 64 tokens left out.
    config : CalibrationConfig, optional
    checkpoint : path, optional
        A file to write after every eighth text and to go on from; removed at the end.
    keep_checkpoint : bool
        Whether to leave it, with all that was read.
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
        Fewer than two texts are long enough, or the checkpoint belongs to another calibration.
    TypeError
        The model has no decoder layers with attention.
    """
    config = config or CalibrationConfig()
    language_model(model)
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
        recipe={
            "model_name": model.config.name_or_path,
            "num_texts": len(texts),
            "texts_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
            "config": asdict(config),
        },
    )
    with _bars(progress) as bars:
        sums = _read_all(oracle, texts, router, Path(checkpoint) if checkpoint else None, bars)
        fit_ridge(sums, router, config.ridge)
        bar = bars.add_task("training gates", total=config.epochs + 1)

        def report(epoch: int, loss: float) -> None:
            bars.update(bar, advance=1, description=f"training gates, ranking loss {loss:.4f}")

        router.recipe["curve"] = train_gates(sums, router, config, report)
    if checkpoint and not keep_checkpoint:
        Path(checkpoint).unlink(missing_ok=True)
    return router


def _read_all(
    oracle: Oracle,
    texts: Sequence[str],
    router: CalibratedRouter,
    checkpoint: Path | None,
    bars: Progress,
) -> Sums:
    config = oracle.config
    identity = json.dumps([router.model, router.recipe["texts_sha256"], asdict(config)])
    num_held_out = min(max(round(len(texts) * config.held_out), 1), 16) if config.held_out else 0
    drawn = random.Random(config.seed)
    order = drawn.sample(range(len(texts)), len(texts))
    held_out = set(order[:num_held_out])
    domains = find_domains(oracle.describe(texts), config.domains)
    sums = Sums.empty(router, config.domains)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        sums, found = read_checkpoint(checkpoint)
        if found != json.loads(identity):
            raise ValueError(
                f"expected a checkpoint of this calibration in {checkpoint}, got one of another "
                "model, other texts or other settings; remove it to begin again"
            )
        first = sums.num_texts
    share = max(config.samples // max(len(texts) - num_held_out, 1), 1)
    bar = bars.add_task("reading texts", total=len(texts), completed=first)
    for number in range(first, len(texts)):
        as_turn = number % 2 == 0 and bool(oracle.before)
        reading = oracle.read(texts[number], as_turn=as_turn)
        skip = max(len(oracle.before) if as_turn else 0, config.sinks)
        reading = reading.at(slice(skip, len(reading.where) - config.recent))
        generator = torch.Generator().manual_seed(number)
        if number in held_out:
            keep = torch.randperm(config.length, generator=generator)[:_JUDGED]
            sums.held_out.append(reading.at(keep[keep < len(reading.where)].sort().values))
        else:
            sums.add(reading, domains[number])
            sums.domains.append(domains[number])
            keep = torch.randperm(len(reading.where), generator=generator)[:share]
            sums.sample.append(reading.at(keep.sort().values))
        bars.advance(bar)
        sums.num_texts = number + 1
        if checkpoint is not None and ((number + 1) % 8 == 0 or number + 1 == len(texts)):
            _save(checkpoint, sums, identity)
    return sums


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[Sums, list[Any]]:
    """Read what a calibration has read so far.

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
        The file is no checkpoint.
    """
    try:
        saved = torch.load(path, weights_only=True)
        sums = Sums(
            saved["gram"],
            saved["moment"],
            saved["num_texts"],
            [Reading(**parts) for parts in saved["sample"]],
            saved["domains"],
            [Reading(**parts) for parts in saved["held_out"]],
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
        "domains": sums.domains,
        "sample": [vars(reading) for reading in sums.sample],
        "held_out": [vars(reading) for reading in sums.held_out],
    }
    with whole_file(path) as temporary:
        torch.save(saved, temporary)


@contextmanager
def _bars(show: bool) -> Iterator[Progress]:
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn())
    with Progress(*columns, MofNCompleteColumn(), TimeRemainingColumn(), disable=not show) as bars:
        yield bars
