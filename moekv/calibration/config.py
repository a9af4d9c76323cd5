"""How a router is fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
        Share of the texts that are held out.
    domains : int
        Groups of texts; the gates are trained on each with a ``learned`` fitted to the others.
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
        First and last pairs, which a press always retains, and which are left out of the fit.
    window : int
        Last tokens whose queries the experts observe, as in the press.
    seed : int
        Seed of all random numbers.
    expert_choice : bool
        In models that are mixtures of experts themselves: whether gates and ``learned`` read which
        experts the model sent a token to (``LayerView.expert_choice``).

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
    expert_choice: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not isinstance(self.expert_choice, bool):
            raise ValueError(f"expected expert_choice True or False, got {self.expert_choice!r}")
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
