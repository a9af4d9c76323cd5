"""Routers that lack something: `python -m benchmarks.quality.ablations CHECKPOINT FOLDER`.

Fits the shipped router again without one of its parts, from what `moekv calibrate
--keep-checkpoint` has read, and writes each to a folder of its own for
`python -m benchmarks.quality run --routers FOLDER`. Experts that only ablations have, such as
`selective`, need a checkpoint that has read them: `moekv calibrate --expert expected --expert
selective --expert semantic --expert temporal --keep-checkpoint`; with the shipped router's own they
are left out.

``ranking_losses.json`` has each one's loss on held-out texts. Routers without a comparable expert
beside `learned` are judged by the oracle alone: their losses do not compare with the others'.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from moekv.calibration.calibrate import read_checkpoint
from moekv.calibration.config import CalibrationConfig
from moekv.calibration.gates import train_gates
from moekv.calibration.oracle import Reading
from moekv.calibration.ridge import PLACES, Sample, Sums, set_experts, solve
from moekv.calibration.router import SHIPPED, CalibratedRouter


def only(sums: Sums, read: list[str], experts: list[str], hidden: int, heads: int) -> Sums:
    """Leave those of the experts that were read out that are not named."""
    chosen = [read.index(name) for name in experts]
    first = hidden + PLACES + heads
    own = [first + heads * i + h for i in chosen for h in range(heads)]
    index = torch.tensor([*range(first), *own, sums.gram.shape[-1] - 1])

    def cut(reading: Reading) -> Reading:
        return dataclasses.replace(reading, scores=reading.scores[:, chosen])

    return dataclasses.replace(
        sums,
        gram=sums.gram[:, :, index][..., index],
        moment=sums.moment[:, :, index],
        sample=Sample(
            [cut(reading) for reading in sums.sample.readings],
            sums.sample.domains,
            [cut(reading) for reading in sums.sample.held_out],
        ),
    )


def without(sums: Sums, dropped: slice) -> Sums:
    """Take features out of the regression: their coefficients become 0."""
    gram, moment = sums.gram.clone(), sums.moment.clone()
    gram[:, :, dropped], gram[..., dropped] = 0, 0
    gram.diagonal(dim1=2, dim2=3)[..., dropped] = 1
    moment[:, :, dropped] = 0
    return dataclasses.replace(sums, gram=gram, moment=moment)


def together(sums: Sums) -> Sums:
    """Forget the domains: gates then see the fit where it was fitted."""
    return dataclasses.replace(
        sums,
        gram=sums.gram.sum(0, keepdim=True),
        moment=sums.moment.sum(0, keepdim=True),
        sample=dataclasses.replace(sums.sample, domains=[0] * len(sums.sample.domains)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    whole, (model, _, options) = read_checkpoint(args.checkpoint)
    read = list(options["experts"])
    config = CalibrationConfig(**options | {"experts": tuple(read)})
    shipped: CalibratedRouter = CalibratedRouter.from_pretrained(SHIPPED / model)
    hidden, heads = shipped.hidden_size, shipped.num_kv_heads
    own = [expert.name for expert in shipped.experts[1:]]
    sums = only(whole, read, own, hidden, heads)
    others = [name for name in read if name not in own]
    places = slice(hidden, hidden + PLACES)
    keys = slice(hidden + PLACES, hidden + PLACES + heads)

    def make(
        variant: str,
        sums: Sums,
        experts: list[str] = own,
        *,
        top_k: int = 1 + len(own),
        **changes: float,
    ) -> None:
        router = CalibratedRouter(
            model=model,
            layers=shipped.layers,
            hidden_size=hidden,
            num_kv_heads=heads,
            experts=experts,
            top_k=top_k,
            recipe={"model_name": shipped.recipe["model_name"]},
        )
        settings = dataclasses.replace(config, **changes)
        solved = solve(sums, router, settings.ridge)
        set_experts(router, solved)
        curve = train_gates(sums.sample, solved.without, router, settings)
        router.recipe["curve"] = curve
        losses[variant] = min(row["ranking_loss"] for row in curve)
        router.save_pretrained(args.folder / variant)
        first = curve[0]["ranking_loss"]
        print(f"{variant}: {losses[variant]:.4f} (even gates: {first:.4f})", flush=True)

    losses: dict[str, float] = {}
    make("all parts", sums)
    unscaled: CalibratedRouter = CalibratedRouter.from_pretrained(args.folder / "all parts")
    unscaled.gain.fill_(1), unscaled.offset.zero_()
    unscaled.save_pretrained(args.folder / "scales not fitted")
    make("even gates", sums, epochs=0)
    make("learned alone", only(whole, read, [], hidden, heads), [], top_k=1)
    alone = only(whole, read, [], hidden, heads)
    probe = without(without(alone, places), keys)
    make("hidden states alone", probe, [], top_k=1)
    make("learned without hidden states", without(sums, slice(0, hidden)))
    make("learned without places", without(sums, places))
    make("learned without keys", without(sums, keys))
    make("top-k 1", sums, top_k=1)
    make("no load balancing", sums, aux_loss_weight=0.0)
    make("one domain", together(sums))
    for name in others:
        joined = [*own, name]
        make(f"and {name}", only(whole, read, joined, hidden, heads), joined, top_k=len(joined) + 1)
        make(f"and {name}, top-k 2", only(whole, read, joined, hidden, heads), joined, top_k=2)
    if others:
        for top_k in range(1, len(read) + 2):
            make(f"all experts, top-k {top_k}", whole, read, top_k=top_k)
    (args.folder / "ranking_losses.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    main()
