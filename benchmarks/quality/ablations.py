"""Routers that lack something: `python -m benchmarks.quality.ablations CHECKPOINT FOLDER`.

Fits the shipped router again without one of its parts, from what `moekv calibrate
--keep-checkpoint` has read, and writes each to a folder of its own for
`python -m benchmarks.quality run --routers FOLDER`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moekv.calibrated import SHIPPED, CalibratedRouter
from moekv.calibration import CalibrationConfig, Sums, fit_ridge, read_checkpoint, train_gates

PLACES = 3  # features between the hidden state and the experts' scores


def without(sums: Sums, dropped: Tensor) -> Sums:
    """Take features out of a regression: their coefficients become 0."""
    gram, moment = sums.gram.clone(), sums.moment.clone()
    gram[:, dropped], gram[:, :, dropped] = 0, 0
    gram[:, dropped, dropped] = 1
    moment[:, dropped] = 0
    return dataclasses.replace(sums, gram=gram, moment=moment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    sums, (model, _, options) = read_checkpoint(args.checkpoint)
    config = CalibrationConfig(**options | {"experts": tuple(options["experts"])})
    shipped: CalibratedRouter = CalibratedRouter.from_pretrained(SHIPPED / model)
    hidden, heads = shipped.hidden_size, shipped.num_kv_heads
    names = [expert.name for expert in shipped.routed]
    place = torch.arange(hidden, hidden + PLACES)
    scores = {
        name: hidden + PLACES + heads * i + torch.arange(heads) for i, name in enumerate(names)
    }
    nothing = torch.tensor([], dtype=torch.long)
    every = torch.cat(list(scores.values()))

    def make(top_k: int = len(names), shared: tuple[str, ...] = ("expected",)) -> CalibratedRouter:
        return CalibratedRouter(
            model=model,
            layers=shipped.layers,
            hidden_size=hidden,
            num_kv_heads=heads,
            experts=names,
            top_k=top_k,
            shared=shared,
            recipe={"model_name": shipped.recipe["model_name"]},
        )

    variants: dict[str, Callable[[], Tensor]] = {
        "all parts, even gates": lambda: nothing,
        "hidden states alone": lambda: torch.cat([place, every]),
        "learned alone": lambda: every,
        "no expected": lambda: nothing,
        "no hidden states": lambda: torch.arange(hidden),
        "no places": lambda: place,
        **{f"no {name}": lambda name=name: scores[name] for name in names},
    }
    losses = {}
    for variant, dropped in variants.items():
        fitted_alone = variant in ("hidden states alone", "learned alone", "no expected")
        router = make(shared=() if fitted_alone else ("expected",))
        fit_ridge(without(sums, dropped()), router, config.ridge)
        (judged,) = train_gates(sums, router, dataclasses.replace(config, epochs=0))
        losses[variant] = judged["ranking_loss"]
        router.save_pretrained(args.folder / variant)
        print(f"{variant}: {losses[variant]:.4f}", flush=True)
    for top_k in range(1, len(names) + 1):
        router = make(top_k)
        fit_ridge(sums, router, config.ridge)
        curve = train_gates(sums, router, config, patience=config.epochs)[1:]
        best = min(curve, key=lambda row: row["ranking_loss"])
        losses[f"gates trained, top-k {top_k}"] = best["ranking_loss"]
        print(f"top-k {top_k}: {best}", flush=True)
        if top_k < len(names):
            router.save_pretrained(args.folder / f"gates trained, top-k {top_k}")
    (args.folder / "ranking_losses.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    main()
