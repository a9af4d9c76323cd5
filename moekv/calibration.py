"""Calibration: fit routers so that mixed scores rank pairs as an expensive oracle does.

The oracle reads the text a second time, as KVzip does (Kim et al., 2025): behind the text and the
words "repeat the previous context", the text follows again, and what its tokens look at in the
cache is what a text's continuations, quotations and answers are likely to need. Of the attention
that a pair gets from all these queries a power mean is taken: KVzip's maximum keeps pairs that one
query needed, a mean those that many need; an exponent between follows both.

For each layer

1. the shared expert ``learned`` and the gains of the routed experts come from one ridge regression
   on the log of the oracle's scores, over all tokens, in closed form;
2. the gates are trained by gradient descent, through ``gating_topk``, on a sample of the tokens,
   with a load-balancing loss that keeps experts alive, until the ranking of held-out texts no
   longer improves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from moekv import ops
from moekv.cache import cached_pairs
from moekv.calibrated import CalibratedRouter, model_fingerprint, places
from moekv.chat import user_turn
from moekv.experts import build_experts
from moekv.files import whole_file
from moekv.hooks import find_layers, is_sliding
from moekv.mixing import stack_scores
from moekv.ops import ScoreKind
from moekv.queries import project_queries, rotate
from moekv.routers import entropy_loss
from moekv.view import LayerView, ViewBuilder

REPEAT = "\n\nRepeat the previous context exactly."
"""What the oracle says between the text and its second reading."""

_TILE = 128  # queries whose attention is in memory at a time
_JUDGED = 512  # tokens of a held-out text, at most
_FLOOR = 1e-6  # attention below which a pair is as good as not attended


@dataclass(frozen=True)
class CalibrationConfig:
    """How a router is fitted.

    Parameters
    ----------
    experts : tuple of str
        The routed experts.
    top_k : int
        Routed experts per token.
    length : int
        Tokens of each text, at most.
    exponent : float
        Of the power mean over the oracle's queries: 1 the mean, infinity KVzip's maximum.
    held_out : float
        Share of the texts that only judge.
    samples : int
        Tokens of the gates' training, drawn from all texts; they bound its memory.
    ridge : float
        Strength of the regression's penalty, in units of the features' mean squares.
    epochs, batch : int
        Passes over the sample, at most, and tokens of a step in each layer.
    learning_rate : float
        Its peak, for AdamW.
    aux_loss_weight : float
        Weight of the load-balancing loss (entropy of the mean gate probabilities).
    sinks, recent : int
        First and last pairs, which every press keeps and which nothing has to be learned of.
    window : int
        Last tokens whose queries the experts see, as in the press.
    seed : int
        Of everything that is drawn.

    Raises
    ------
    ValueError
        A number is out of range.
    """

    experts: tuple[str, ...] = ("selective", "semantic", "temporal")
    top_k: int = 3
    length: int = 1024
    exponent: float = 2.0
    held_out: float = 0.1
    samples: int = 8192
    ridge: float = 1e-3
    epochs: int = 16
    batch: int = 256
    learning_rate: float = 3e-4
    aux_loss_weight: float = 0.01
    sinks: int = 4
    recent: int = 16
    window: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (
            *(("top_k", 1), ("length", 64), ("samples", 1), ("epochs", 0), ("batch", 1)),
            *(("sinks", 0), ("recent", 0), ("window", 1), ("seed", 0)),
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(
                    f"expected {name} an integer >= {least}, got {getattr(self, name)!r}"
                )
        for name, low, high in (
            *(("exponent", 1, math.inf), ("held_out", 0, 0.5), ("ridge", 0, math.inf)),
            *(("learning_rate", 0, math.inf), ("aux_loss_weight", 0, math.inf)),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"expected {name} between {low} and {high}, got {getattr(self, name)!r}"
                )


# --- The oracle -----------------------------------------------------------------------------------


@dataclass
class Reading:
    """What one text gave. L layers, H KV heads, T tokens, E routed experts."""

    hidden: Tensor  # [L, T, hidden], inputs of the attention layers
    where: Tensor  # [T, 3], see places()
    scores: Tensor  # [L, E, H, T] of the routed experts
    target: Tensor  # [L, H, T], log of the attention that the oracle saw

    def at(self, tokens: slice | Tensor) -> Reading:
        """Take some tokens; indices copy them, a slice does not."""
        return Reading(
            self.hidden[:, tokens],
            self.where[tokens],
            self.scores[..., tokens],
            self.target[..., tokens],
        )

    @classmethod
    def join(cls, readings: Sequence[Reading]) -> Reading:
        """Put readings one behind the other."""
        return cls(
            torch.cat([r.hidden for r in readings], dim=1),
            torch.cat([r.where for r in readings]),
            torch.cat([r.scores for r in readings], dim=-1),
            torch.cat([r.target for r in readings], dim=-1),
        )


class Oracle:
    """Reads texts twice and sees what the second reading looks at.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    config : CalibrationConfig

    Raises
    ------
    TypeError
        The model has no decoder layers with attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: CalibrationConfig,
    ) -> None:
        self.model, self.config = model, config
        self.decoder, layers = find_layers(model)
        self.layers = [layer for layer in layers if not is_sliding(layer)]
        self.experts = build_experts(list(config.experts))
        self.view = ViewBuilder()
        before, after = user_turn(tokenizer) or ("", "\n")
        self.tokenizer = tokenizer
        self.before = self.encode(before)
        self.repeat = self.encode(REPEAT + after)

    def encode(self, text: str) -> list[int]:
        """Tokenise a piece of text, without special tokens of the tokenizer's own."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @torch.no_grad()
    def read(self, text: str, *, as_turn: bool) -> Reading:
        """Read a text twice.

        Parameters
        ----------
        text : str
            What is beyond ``length`` tokens is left out.
        as_turn : bool
            Whether it is the user's turn of a chat, or plain.
        """
        body = self.encode(text)[: self.config.length]
        prompt = [*(self.before if as_turn else ()), *body]
        cache = DynamicCache()
        first = self._run(prompt, cache)
        scores = [
            stack_scores(self.experts, self._look(layer, cache, *first[layer]))[:, 0]
            for layer in self.layers
        ]
        second = self._run([*self.repeat, *body], cache)
        target = [
            self._attention(layer, cache, *second[layer], len(prompt)) for layer in self.layers
        ]
        hidden = torch.stack([first[layer][0][0].cpu() for layer in self.layers])
        where = places((len(prompt),), len(prompt), hidden.device)[0].t()
        return Reading(hidden, where, torch.stack(scores).cpu(), torch.stack(target).cpu())

    def _run(
        self, ids: Sequence[int], cache: DynamicCache
    ) -> dict[nn.Module, tuple[Tensor, dict[str, Any]]]:
        """Feed tokens; return each layer's input and the arguments it was called with."""
        inputs = {}

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            inputs[module] = (kwargs["hidden_states"], kwargs)

        hooks = [x.register_forward_pre_hook(keep, with_kwargs=True) for x in self.layers]
        try:
            self.decoder(
                input_ids=torch.tensor([ids], device=self.model.device), past_key_values=cache
            )
        finally:
            for hook in hooks:
                hook.remove()
        return inputs

    def _look(
        self, layer: nn.Module, cache: DynamicCache, hidden: Tensor, kwargs: dict[str, Any]
    ) -> LayerView:
        kinds = sorted({ScoreKind.MASS}.union(*(expert.kinds for expert in self.experts)))
        keys, values = cached_pairs(cache.layers[layer.layer_idx])  # type: ignore[index]
        return self.view(
            layer,
            hidden,
            keys,
            values,
            None,
            kwargs,
            window=self.config.window,
            kinds=kinds,
            backend="auto",
        )

    def _attention(
        self,
        layer: nn.Module,
        cache: DynamicCache,
        hidden: Tensor,
        kwargs: dict[str, Any],
        num_keys: int,
    ) -> Tensor:
        """Log of the power mean of the attention [H, T] that the last tokens pay to the first."""
        keys, _ = cached_pairs(cache.layers[layer.layer_idx])  # type: ignore[index]
        keys = keys[0]
        num_heads, total, dim = keys.shape
        queries = rotate(layer, project_queries(layer, hidden), *kwargs["position_embeddings"])
        queries = queries[0].to(keys.dtype)
        num_queries = queries.shape[1]
        softcap = getattr(layer.config, "attn_logit_softcapping", None)
        scaling: float = layer.scaling  # type: ignore[assignment]
        exponent = self.config.exponent
        column = torch.arange(total, device=keys.device)
        seen = torch.zeros(num_heads, num_keys, device=keys.device)
        for begin in range(0, num_queries, _TILE):
            tile = queries[:, begin : begin + _TILE]
            position = total - num_queries + begin + torch.arange(tile.shape[1], device=keys.device)
            tile = tile.reshape(num_heads, -1, dim)
            logits = torch.bmm(tile, keys.transpose(1, 2)).float() * scaling
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.view(num_heads, -1, len(position), total)
            logits.masked_fill_(column > position[:, None], -torch.inf)
            attention = logits.softmax(-1)[..., :num_keys].flatten(1, 2)
            if math.isinf(exponent):
                seen = torch.maximum(seen, attention.amax(1))
            else:
                seen += attention.pow_(exponent).sum(1)
        if math.isinf(exponent):
            return seen.clamp(min=_FLOOR).log()
        mean = seen / (num_queries * queries.shape[0] // num_heads)
        # The floor is one of attention, below its power.
        return (mean.clamp(min=_FLOOR**exponent).log() / exponent).clamp(min=math.log(_FLOOR))


# --- Regression -----------------------------------------------------------------------------------


def features(reading: Reading, layer: int) -> Tensor:
    """Regression's features [T, F] of a layer: hidden state, place, scores of all heads, 1."""
    hidden = reading.hidden[layer].float()
    scores = reading.scores[layer].flatten(0, 1).t()
    return torch.cat([hidden, reading.where, scores, hidden.new_ones(len(hidden), 1)], dim=1)


@dataclass
class Sums:
    """Normal equations of all layers, and a sample of the tokens: all that outlives a text."""

    gram: Tensor  # [L, F, F] float64
    moment: Tensor  # [L, F, H] float64
    num_texts: int = 0
    sample: list[Reading] = field(default_factory=list)
    held_out: list[Reading] = field(default_factory=list)


def fit_ridge(sums: Sums, router: CalibratedRouter, strength: float) -> None:
    """Set the shared expert and the routed experts' gains: ridge regression, head by head.

    A head's features are the hidden state, the place and its own experts' scores.
    """
    num_layers, _, num_heads = sums.moment.shape
    num_experts, hidden = len(router.routed), router.hidden_size
    for row in range(num_layers):
        for head in range(num_heads):
            own = hidden + 3 + head + num_heads * torch.arange(num_experts)
            index = torch.cat([torch.arange(hidden + 3), own, torch.tensor([-1])])
            gram = sums.gram[row][index][:, index]
            penalty = strength * gram.diagonal().clone()
            penalty[hidden:-1] *= 1e-3  # a few numbers, known well; rotations do not mix them
            penalty[-1] = 0
            solved = torch.linalg.solve(
                gram + torch.diag(penalty), sums.moment[row][index, head]
            ).float()
            router.surrogate_weight[row, head] = solved[:hidden]
            router.surrogate_place[row, head] = solved[hidden : hidden + 3]
            # Half of the experts' weight is shared out among those that a token chooses; a gate
            # that knows nothing gives each of them the same.
            router.gain[row, :, head] = solved[hidden + 3 : -1] * num_experts
            router.surrogate_bias[row, head] = solved[-1]


# --- Gates ----------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """All layers' routers at once, differentiable: what the press computes from the same numbers.

    Inside, hidden states and scores have mean square 1 in every channel, so that one learning rate
    fits all.

    Parameters
    ----------
    router : CalibratedRouter
        Where training begins.
    sample : Reading
        For its spread.
    """

    def __init__(self, router: CalibratedRouter, sample: Reading) -> None:
        super().__init__()
        self.top_k = router.top_k
        self.hidden_scale = sample.hidden.float().square().mean(1).sqrt().clamp(min=1e-6)
        self.score_mean = sample.scores.mean(-1)
        self.score_scale = sample.scores.std(-1, correction=0).clamp(min=1e-6)

        def trained(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.detach().clone())

        self.gate_weight = trained(router.gate_weight * self.hidden_scale[:, None])
        self.gate_bias = trained(router.gate_bias)
        self.gain = trained(router.gain * self.score_scale)
        self.offset = trained(router.offset + router.gain * self.score_mean)
        self.place_scale = torch.tensor([6.0, 2.0, 6.0])  # near their spread in texts of any length
        self.place = trained(router.surrogate_place * self.place_scale)
        self.bias = trained(router.surrogate_bias)
        self.weight = router.surrogate_weight.detach().clone()

    def forward(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """Mix the scores of N tokens.

        Parameters
        ----------
        reading : Reading

        Returns
        -------
        mixed : Tensor [L, H, N]
        balance_loss : Tensor, scalar
            Mean over layers.
        """
        hidden = reading.hidden.float()
        where, scores = reading.where / self.place_scale, reading.scores.permute(0, 3, 1, 2)
        base = hidden @ self.weight.transpose(1, 2) + where @ self.place.transpose(1, 2)
        scaled = hidden / self.hidden_scale[:, None]
        logits = scaled @ self.gate_weight.transpose(1, 2) + self.gate_bias[:, None]
        routed = ops.gating_topk(logits, k=self.top_k)
        gates = torch.zeros_like(logits).scatter(-1, routed.experts.long(), routed.weights)
        standard = (scores - self.score_mean[:, None]) / self.score_scale[:, None]
        mapped = standard * self.gain[:, None] + self.offset[:, None]
        mixed = base + self.bias[:, None] + torch.einsum("lne,lneh->lnh", gates, mapped)
        balance = torch.stack([entropy_loss(p) for p in logits.softmax(-1).mean(1)]).mean()
        return mixed.transpose(1, 2), balance

    @torch.no_grad()
    def hand_over(self, router: CalibratedRouter) -> None:
        """Copy what was trained into a router."""
        gain = self.gain / self.score_scale
        router.gate_weight.copy_(self.gate_weight / self.hidden_scale[:, None])
        router.gate_bias.copy_(self.gate_bias)
        router.gain.copy_(gain)
        router.offset.copy_(self.offset - gain * self.score_mean)
        router.surrogate_place.copy_(self.place / self.place_scale)
        router.surrogate_bias.copy_(self.bias)


def ranking_loss(predicted: Tensor, target: Tensor) -> float:
    """Share of the oracle's choice that a prediction misses, under one threshold over all heads.

    Parameters
    ----------
    predicted, target : Tensor
        Of one shape.

    Returns
    -------
    float
        Mean over the shares 1/2, 1/4 and 1/10 of the pairs that a budget may keep; in [0, 1].
    """
    predicted, target = predicted.flatten(), target.flatten()
    missed = []
    for share in (0.5, 0.25, 0.1):
        count = max(int(len(target) * share), 1)
        wanted = torch.zeros_like(target, dtype=torch.bool)
        wanted[target.topk(count).indices] = True
        missed.append(1 - wanted[predicted.topk(count).indices].float().mean())
    return float(torch.stack(missed).mean())


def train_gates(
    sums: Sums,
    router: CalibratedRouter,
    config: CalibrationConfig,
    report: Callable[[int, float], None] = lambda epoch, loss: None,
    *,
    patience: int = 4,
) -> list[dict[str, float]]:
    """Train the gates, from what :func:`fit_ridge` found, and keep the best epoch's.

    Parameters
    ----------
    sums : Sums
    router : CalibratedRouter
        Is changed.
    config : CalibrationConfig
    report : callable, optional
        Gets each epoch and its held-out ranking loss.
    patience : int
        Epochs without a better loss before it stops.

    Returns
    -------
    list of dict
        For each epoch, from 0 (before training): ``ranking_loss`` of the held-out texts, and
        ``error``, the mean squared error of the log-attention on the sample.
    """
    sample = Reading.join(sums.sample)
    mixture = Mixture(router, sample)
    optimiser = torch.optim.AdamW(mixture.parameters(), lr=config.learning_rate, weight_decay=0.01)
    num_tokens = len(sample.where)
    steps = max(num_tokens // config.batch, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(config.epochs * steps, 1))
    generator = torch.Generator().manual_seed(config.seed)
    judged = sums.held_out or sums.sample

    def judge() -> float:
        with torch.no_grad():
            losses = [ranking_loss(mixture(reading)[0], reading.target) for reading in judged]
        return sum(losses) / len(losses)

    with torch.no_grad():
        start = (mixture(sample)[0] - sample.target).square().mean()
    curve = [{"epoch": 0.0, "ranking_loss": judge(), "error": float(start)}]
    best, since = curve[0]["ranking_loss"], 0
    report(0, best)
    for epoch in range(1, config.epochs + 1):
        order = torch.randperm(num_tokens, generator=generator)
        total = 0.0
        for step in range(steps):
            tokens = sample.at(order[step * config.batch : (step + 1) * config.batch])
            mixed, balance = mixture(tokens)
            error = (mixed - tokens.target).square().mean()
            loss = error + config.aux_loss_weight * balance
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(error.detach()) / steps
        curve.append({"epoch": float(epoch), "ranking_loss": judge(), "error": total})
        report(epoch, curve[-1]["ranking_loss"])
        if curve[-1]["ranking_loss"] < best:
            best, since = curve[-1]["ranking_loss"], 0
            mixture.hand_over(router)
        else:
            since += 1
            if since == patience:
                break
    return curve


# --- All of it ------------------------------------------------------------------------------------


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
    oracle = Oracle(model, tokenizer, config)
    texts = [text for text in texts if len(oracle.encode(text)) >= 64]
    if len(texts) < 2:
        raise ValueError(f"expected two or more texts of 64 tokens or more, got {len(texts)}")
    layer: Any = oracle.layers[0]
    keys = layer.config.num_key_value_heads
    router = CalibratedRouter(
        model=model_fingerprint(model),
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
    width = router.hidden_size + 3 + len(config.experts) * router.num_kv_heads + 1
    shape = (len(router.layers), width)
    sums = Sums(
        torch.zeros(*shape, width, dtype=torch.float64),
        torch.zeros(*shape, router.num_kv_heads, dtype=torch.float64),
    )
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
            _add(sums, reading)
            keep = torch.randperm(len(reading.where), generator=generator)[:share]
            sums.sample.append(reading.at(keep.sort().values))
        bars.advance(bar)
        sums.num_texts = number + 1
        if checkpoint is not None and ((number + 1) % 8 == 0 or number + 1 == len(texts)):
            _save(checkpoint, sums, identity)
    return sums


def _add(sums: Sums, reading: Reading) -> None:
    """Add a reading to the normal equations."""
    for row in range(len(sums.gram)):
        x = features(reading, row)
        sums.gram[row] += (x.t() @ x).double()
        sums.moment[row] += (x.t() @ reading.target[row].t()).double()


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
