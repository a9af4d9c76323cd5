"""How far an answer moved, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import stats
from torch import Tensor

LEAST_KL = 1e-3
"""Nats per token; ratios of less would compare rounding."""


@dataclass
class Quality:
    """Quality of one answer.

    `kl` is the mean over answer tokens of KL(full cache || this cache), `nll` the mean negative
    log-likelihood of the reference answer, both in nats. `tv` is the mean total variation: the
    share of the next tokens, drawn at the best coupling, that differ from the full cache's.
    `exact`: greedy decoding gives the reference answer, which is the case where every token is the
    most likely one behind the reference tokens before it.
    """

    kl: float
    tv: float
    nll: float
    exact: bool


def compare(logits: Tensor, full_logits: Tensor, answer: Tensor) -> Quality:
    """Compare logits `[A, vocabulary]` with those of the full cache, on answer tokens `[A]`."""
    log_probs, full = logits.log_softmax(-1), full_logits.log_softmax(-1)
    kl = (full.exp() * (full - log_probs)).sum(-1)
    nll = -log_probs.gather(-1, answer[:, None])
    exact = bool((logits.argmax(-1) == answer).all())
    tv = (full.exp() - log_probs.exp()).abs().sum(-1) / 2
    return Quality(kl=kl.mean().item(), tv=tv.mean().item(), nll=nll.mean().item(), exact=exact)


@dataclass(frozen=True)
class Mean:
    """A mean over samples, with what is known of its error.

    Intervals are Student's, of as many degrees of freedom as the variance has. They hold where
    samples are about normal: KL divergences are on the scale of their logs, and less so on their
    own, where one sample of four often outweighs the others.

    Attributes
    ----------
    value : float
    variance : float or None
        Of the mean. None: of one sample, of which nothing is known.
    freedom : float
        Degrees of freedom of the variance.
    """

    value: float
    variance: float | None
    freedom: float

    def interval(self) -> tuple[float, float] | None:
        """Give the 95 % interval; None where nothing is known."""
        if self.variance is None:
            return None
        reach = math.sqrt(self.variance) * float(stats.t.ppf(0.975, self.freedom))
        return self.value - reach, self.value + reach


def mean(values: Sequence[float]) -> Mean:
    """Average samples of one task."""
    count, value = len(values), sum(values) / len(values)
    if count == 1:
        return Mean(value, None, 0)
    square = sum((x - value) ** 2 for x in values) / (count - 1)
    return Mean(value, square / count, count - 1)


def over_tasks(means: Sequence[Mean]) -> Mean:
    """Average means of tasks, which count alike.

    Variances differ from task to task, so degrees of freedom are those of [1]_ and [2]_.

    References
    ----------
    .. [1] Satterthwaite, "An Approximate Distribution of Estimates of Variance Components",
       Biometrics Bulletin 2 (1946).
    .. [2] Welch, "The Generalization of 'Student's' Problem when Several Different Population
       Variances are Involved", Biometrika 34 (1947).
    """
    value = sum(m.value for m in means) / len(means)
    known = [(m.variance, m.freedom) for m in means if m.variance is not None]
    if len(known) < len(means):
        return Mean(value, None, 0)
    total = sum(variance for variance, _ in known)
    spread = sum(variance**2 / freedom for variance, freedom in known)
    return Mean(value, total / len(means) ** 2, total**2 / spread if spread else 1)


def log_kl(kl: float) -> float:
    """Take the log of a KL divergence, of which nothing below ``LEAST_KL`` counts as less."""
    return math.log(max(kl, LEAST_KL))


def geometric(kls: Iterable[float]) -> float:
    """Geometric mean of KL divergences, see :func:`log_kl`."""
    logs = [log_kl(kl) for kl in kls]
    return math.exp(sum(logs) / len(logs))


def exponential(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """Turn an interval of logs into one of ratios."""
    return None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))


def share_interval(right: int, count: int) -> tuple[float, float] | None:
    """Give Wilson's 95 % interval of a share; None for one sample."""
    if count == 1:
        return None
    found = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)
