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
from moekv.attention import last_queries
from moekv.cache import cached_pairs
from moekv.calibrated import CalibratedRouter, model_fingerprint, places
from moekv.chat import user_turn
from moekv.experts import build_experts
from moekv.files import whole_file
from moekv.hooks import find_layers, is_sliding, lent_rotary
from moekv.mixing import scores_by
from moekv.ops import ScoreKind
from moekv.queries import logit_options, project_queries, rotate
from moekv.routers import entropy_loss
from moekv.view import LayerView, ViewBuilder

REPEAT = "\n\nRepeat the previous context exactly."
"""What the oracle says between the text and its second reading."""

_TILE = 128  # queries whose attention is in memory at a time
_PATIENCE = 4  # epochs without a better loss, after which training stops
_JUDGED = 512  # tokens of a held-out text, at most
_FLOOR = 1e-6  # attention below which a pair is as good as not attended
_SOFT = 0.4  # log-attention from a threshold at which the training's choice is rather sure

PLACES = 3
"""Numbers of ``places``."""

SHARES = (0.5, 0.25, 0.1)
"""Shares of the pairs that a budget may keep, by which a ranking is judged."""

SAY = 0.5
"""Weight of comparable experts in what the gates are to rank by, beside the oracle."""


@dataclass(frozen=True)
class CalibrationConfig:
    """How a router is fitted.

    Parameters
    ----------
    experts : tuple of str
        Those beside ``learned``.
    top_k : int
        Experts per token.
    length : int
        Tokens of each text, at most.
    exponent : float
        Of the power mean over the oracle's queries: 1 the mean, infinity KVzip's maximum.
    held_out : float
        Share of the texts that only judge.
    domains : int
        Groups of texts, each of which ``learned`` is fitted without, for the gates' training.
    samples : int
        Tokens of the gates' training, drawn from all texts; they bound its memory.
    ridge : float
        Strength of the regression's penalty, in units of the features' mean squares.
    epochs, batch : int
        Passes over the sample, at most, and texts of a step.
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

    experts: tuple[str, ...] = ("expected",)
    top_k: int = 2
    length: int = 1024
    exponent: float = 2.0
    held_out: float = 0.1
    domains: int = 4
    samples: int = 8192
    ridge: float = 1e-3
    epochs: int = 12
    batch: int = 4
    learning_rate: float = 1e-4
    aux_loss_weight: float = 0.01
    sinks: int = 4
    recent: int = 16
    window: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (
            *(("top_k", 1), ("length", 64), ("samples", 1), ("epochs", 0), ("batch", 1)),
            *(("domains", 2), ("sinks", 0), ("recent", 0), ("window", 1), ("seed", 0)),
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
    """What one text gave. L layers, H KV heads, T tokens, E experts beside ``learned``."""

    hidden: Tensor  # [L, T, hidden], inputs of the attention layers
    where: Tensor  # [T, 3], see places()
    novelty: Tensor  # [L, H, T], how unlike the other keys each is
    scores: Tensor  # [L, E, H, T] of these experts
    target: Tensor  # [L, H, T], log of the attention that the oracle saw

    def at(self, tokens: slice | Tensor) -> Reading:
        """Take some tokens; indices copy them, a slice does not."""
        return Reading(
            self.hidden[:, tokens],
            self.where[tokens],
            self.novelty[..., tokens],
            self.scores[..., tokens],
            self.target[..., tokens],
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
    def describe(self, texts: Sequence[str]) -> Tensor:
        """Mean embeddings [N, hidden] of the tokens of texts: what they are about, at no cost."""
        embed = self.model.get_input_embeddings()
        rows = []
        for text in texts:
            ids = torch.tensor(self.encode(text)[: self.config.length], device=self.model.device)
            rows.append(embed(ids).float().mean(0).cpu())
        return torch.stack(rows)

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
        with lent_rotary(self.decoder, self.layers):
            with last_queries(self.layers, self.config.window) as queries:
                first = self._run(prompt, cache)
            scores, novelty = [], []
            for layer in self.layers:
                view = self._look(layer, cache, *first[layer], queries.get(layer))
                scores.append(torch.cat([scores_by(expert, view) for expert in self.experts]))
                novelty.append(view.scores_of(ScoreKind.DIVERSITY)[0])
        second = self._run([*self.repeat, *body], cache)
        target = [
            self._attention(layer, cache, *second[layer], len(prompt)) for layer in self.layers
        ]
        hidden = torch.stack([first[layer][0][0].cpu() for layer in self.layers])
        where = places((len(prompt),), len(prompt), hidden.device)[0].t()
        return Reading(
            hidden, where, *(torch.stack(parts).cpu() for parts in (novelty, scores, target))
        )

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
        self,
        layer: nn.Module,
        cache: DynamicCache,
        hidden: Tensor,
        kwargs: dict[str, Any],
        queries: Tensor | None,
    ) -> LayerView:
        kinds = sorted({ScoreKind.DIVERSITY}.union(*(expert.kinds for expert in self.experts)))
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
            queries=queries,
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
        scaling, softcap = (logit_options(layer)[name] for name in ("scaling", "softcap"))
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
    """Regression's features [T, F] of a layer: hidden state, place, then novelty and scores, 1.

    The latter of all heads.
    """
    hidden = reading.hidden[layer].float()
    heads = torch.cat([reading.novelty[layer], *reading.scores[layer]]).t()
    return torch.cat([hidden, reading.where, heads, hidden.new_ones(len(hidden), 1)], dim=1)


@dataclass
class Sums:
    """Normal equations of all layers, and a sample of the tokens: all that outlives a text.

    The equations are those of each of D domains. ``domains`` says of which each sample is.
    """

    gram: Tensor  # [D, L, F, F] float32
    moment: Tensor  # [D, L, F, H] float32
    num_texts: int = 0
    sample: list[Reading] = field(default_factory=list)
    domains: list[int] = field(default_factory=list)
    held_out: list[Reading] = field(default_factory=list)

    @classmethod
    def empty(cls, router: CalibratedRouter, num_domains: int) -> Sums:
        """Begin with nothing."""
        num_layers, num_heads = len(router.layers), router.num_kv_heads
        width = router.hidden_size + PLACES + len(router.experts) * num_heads + 1
        gram = torch.zeros(num_domains, num_layers, width, width)
        return cls(gram, torch.zeros(num_domains, num_layers, width, num_heads))

    def add(self, reading: Reading, domain: int) -> None:
        """Add a reading to the normal equations of its domain."""
        for row in range(self.gram.shape[1]):
            x = features(reading, row)
            self.gram[domain, row] += x.t() @ x
            self.moment[domain, row] += x.t() @ reading.target[row].t()

    def total(self, without: int | None = None) -> tuple[Tensor, Tensor]:
        """Sum the equations of all domains but one, in float64: gram [L, F, F], moment [L, F, H].

        All of them where there is no other.
        """
        kept = [i for i in range(len(self.gram)) if i != without and self.gram[i, 0, -1, -1] > 0]
        if not kept:
            return self.total()
        return self.gram[kept].double().sum(0), self.moment[kept].double().sum(0)


Fit = tuple[Tensor, Tensor, Tensor, Tensor]
"""What ``learned`` is: weight [L, H, hidden], place [L, H, 3], novelty and bias [L, H]."""


def solve_ridge(gram: Tensor, moment: Tensor, hidden_size: int, strength: float) -> Fit:
    """Fit ``learned``: ridge regression of the targets, head by head.

    Parameters
    ----------
    gram, moment : Tensor
        See :meth:`Sums.total`.
    hidden_size : int
    strength : float

    Returns
    -------
    Fit
        In float32.
    """
    end = hidden_size + PLACES
    rows = []
    for head in range(moment.shape[2]):
        index = torch.tensor([*range(end), end + head, gram.shape[1] - 1])
        own = gram[:, index][:, :, index]
        penalty = strength * own.diagonal(dim1=1, dim2=2)
        penalty[:, hidden_size:-1] *= 1e-3  # a few numbers, known well; rotations do not mix them
        penalty[:, -1] = 0
        wanted = moment[:, index, head : head + 1]
        rows.append(torch.linalg.solve(own + torch.diag_embed(penalty), wanted)[..., 0])
    solved = torch.stack(rows, dim=1).float()
    return solved[..., :hidden_size], solved[..., hidden_size:end], solved[..., -2], solved[..., -1]


def fit_of(router: CalibratedRouter) -> Fit:
    """Give what a router has of :func:`solve_ridge`."""
    return (
        router.surrogate_weight,
        router.surrogate_place,
        router.surrogate_novelty,
        router.surrogate_bias,
    )


def fit_ridge(sums: Sums, router: CalibratedRouter, strength: float) -> None:
    """Set the experts: ``learned`` by ridge regression, and the maps of the others to its scale.

    Comparable scores are moved by one number for the whole model. Of others each head's are brought
    to the scale by least squares.
    """
    gram, moment = sums.total()
    fit = solve_ridge(gram, moment, router.hidden_size, strength)
    for parameter, found in zip(fit_of(router), fit, strict=True):
        parameter.copy_(found)
    count, heads = gram[0, -1, -1], router.num_kv_heads
    wanted = moment[:, -1] / count  # [L, H], means
    for number, expert in enumerate(router.experts[1:], 1):
        own = router.hidden_size + PLACES + number * heads + torch.arange(heads)
        mean = gram[:, own, -1] / count
        if expert.comparable:
            gain, offset = torch.ones_like(mean), (wanted - mean).mean().expand_as(mean)
        else:
            square = gram[:, own, own] / count - mean.square()
            product = moment[:, own, torch.arange(heads)] / count - mean * wanted
            gain = product / square.clamp(min=1e-12)
            offset = wanted - gain * mean
        router.gain[:, number] = gain.float()
        router.offset[:, number] = offset.float()


# --- Gates ----------------------------------------------------------------------------------------


@dataclass
class Estimates:
    """What the gates are trained on: some tokens of one text. E experts, ``learned`` first."""

    hidden: Tensor  # [L, N, hidden]
    scores: Tensor  # [L, E, H, N], on the common scale
    target: Tensor  # [L, H, N], see estimate()


def estimate(router: CalibratedRouter, reading: Reading, fit: Fit | None = None) -> Estimates:
    """Let the experts of a router estimate what a reading has found.

    Parameters
    ----------
    router : CalibratedRouter
    reading : Reading
    fit : Fit, optional
        Instead of the router's.

    Returns
    -------
    Estimates
        Their target is the oracle's, and of comparable experts ``SAY`` times their scores: the
        oracle reads the text once, in order, and what is asked later may be something else.
    """
    weight, place, novelty, bias = fit or fit_of(router)
    learned = weight @ reading.hidden.float().mT + place @ reading.where.t()
    learned += novelty[..., None] * reading.novelty + bias[..., None]
    scores = torch.cat([learned[:, None], reading.scores], dim=1)
    scores = router.gain[..., None] * scores + router.offset[..., None]
    target = reading.target.clone()
    for number, expert in enumerate(router.experts[1:], 1):
        if expert.comparable:
            target += SAY * scores[:, number]
    return Estimates(reading.hidden, scores, target)


class Mixture(nn.Module):
    """All layers' gates at once, differentiable: what the press computes from the same numbers.

    Inside, hidden states have mean square 1 in every channel, so that one learning rate fits all.

    Parameters
    ----------
    router : CalibratedRouter
        Where training begins.
    spread : Tensor [L, hidden]
        Of the hidden states.
    """

    def __init__(self, router: CalibratedRouter, spread: Tensor) -> None:
        super().__init__()
        self.top_k, self.spread = router.top_k, spread
        self.weight = nn.Parameter(router.gate_weight * spread[:, None])
        self.bias = nn.Parameter(router.gate_bias.clone())

    def forward(self, given: Estimates) -> tuple[Tensor, Tensor]:
        """Mix the scores of N tokens.

        Parameters
        ----------
        given : Estimates

        Returns
        -------
        mixed : Tensor [L, H, N]
        balance_loss : Tensor, scalar
            Mean over layers.
        """
        logits = (given.hidden.float() / self.spread[:, None]) @ self.weight.mT
        logits = logits + self.bias[:, None]
        routed = ops.gating_topk(logits.flatten(0, 1), k=self.top_k)
        gates = torch.zeros_like(logits.flatten(0, 1))
        gates = gates.scatter(-1, routed.experts.long(), routed.weights).view_as(logits)
        mixed = torch.einsum("lne,lehn->lhn", gates, given.scores)
        balance = torch.stack([entropy_loss(p) for p in logits.softmax(-1).mean(1)]).mean()
        return mixed, balance

    @torch.no_grad()
    def hand_over(self, router: CalibratedRouter) -> None:
        """Copy what was trained into a router."""
        router.gate_weight.copy_(self.weight / self.spread[:, None])
        router.gate_bias.copy_(self.bias)


def choice_loss(mixed: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the choices that a budget makes: the loss that training can follow.

    Parameters
    ----------
    mixed, target : Tensor
        Of one shape.

    Returns
    -------
    Tensor, scalar
        Mean over the pairs, and over the shares of :func:`ranking_loss`: how surely a threshold
        that keeps so many tells those that the target would keep.
    """
    mixed, target = mixed.flatten(), target.flatten()
    losses = []
    for share in SHARES:
        rank = max(int(len(target) * (1 - share)), 1)
        wanted = (target > target.kthvalue(rank).values).float()
        margin = (mixed - mixed.detach().kthvalue(rank).values) / _SOFT
        losses.append(nn.functional.binary_cross_entropy_with_logits(margin, wanted))
    return torch.stack(losses).mean()


def ranking_loss(predicted: Tensor, target: Tensor) -> float:
    """Share of the target's choice that a prediction misses, under one threshold over all heads.

    Parameters
    ----------
    predicted, target : Tensor
        Of one shape.

    Returns
    -------
    float
        Mean over the ``SHARES`` of the pairs that a budget may keep; in [0, 1].
    """
    predicted, target = predicted.flatten(), target.flatten()
    missed = []
    for share in SHARES:
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

    Returns
    -------
    list of dict
        For each epoch, from 0 (before training): ``ranking_loss`` of the held-out texts, and
        ``choice_loss``, what training follows, on the sample; of the targets of
        :func:`estimate`, which other experts make others.
    """
    fits = [
        solve_ridge(*sums.total(without=domain), router.hidden_size, config.ridge)
        for domain in range(len(sums.gram))
    ]
    sample = [
        estimate(router, reading, fits[domain])
        for reading, domain in zip(sums.sample, sums.domains, strict=True)
    ]
    judged = [estimate(router, reading) for reading in sums.held_out or sums.sample]
    square = sum(given.hidden.float().square().sum(1) for given in sample)
    count = sum(given.hidden.shape[1] for given in sample)
    mixture = Mixture(router, (square / count).sqrt().clamp(min=1e-6))  # type: ignore[union-attr]
    optimiser = torch.optim.AdamW(mixture.parameters(), lr=config.learning_rate, weight_decay=0.01)
    steps = math.ceil(len(sample) / config.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(config.epochs * steps, 1))
    generator = torch.Generator().manual_seed(config.seed)

    @torch.no_grad()
    def judge() -> float:
        losses = [ranking_loss(mixture(given)[0], given.target) for given in judged]
        return sum(losses) / len(losses)

    with torch.no_grad():
        start = sum(float(choice_loss(mixture(x)[0], x.target)) for x in sample) / len(sample)
    curve = [{"epoch": 0.0, "ranking_loss": judge(), "choice_loss": start}]
    best, since = curve[0]["ranking_loss"], 0
    report(0, best)
    for epoch in range(1, config.epochs + 1):
        order = torch.randperm(len(sample), generator=generator).tolist()
        total = 0.0
        for step in range(steps):
            batch = order[step * config.batch : (step + 1) * config.batch]
            optimiser.zero_grad()
            for number in batch:
                mixed, balance = mixture(sample[number])
                missed = choice_loss(mixed, sample[number].target)
                ((missed + config.aux_loss_weight * balance) / len(batch)).backward()
                total += float(missed.detach()) / len(sample)
            optimiser.step()
            schedule.step()
        curve.append({"epoch": float(epoch), "ranking_loss": judge(), "choice_loss": total})
        report(epoch, curve[-1]["ranking_loss"])
        if curve[-1]["ranking_loss"] < best:
            best, since = curve[-1]["ranking_loss"], 0
            mixture.hand_over(router)
        else:
            since += 1
            if since == _PATIENCE:
                break
    return curve


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
