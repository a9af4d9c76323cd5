"""Whether a mixture's own choice of experts helps a press: ``python -m benchmarks.quality.choice``.

On models that :mod:`.trained` trains, three seeds: a router calibrated with the choice beside one
without, and, training-free, the press with an expert that scores tokens by how seldom their
experts are chosen beside the press without it. Prints a table for docs/models.md.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from moekv import CalibrationConfig, Expert, LayerView, MoERouterPress, calibrate

from .metrics import compare
from .tasks import encode
from .trained import TASKS, make_sample, make_text, make_tokenizer, right, save, train

RATIOS = (0.5, 0.75, 0.9)
TEXTS = 64


class Seldom(Expert):
    """Scores a token by how seldom the model chooses its experts, in this text."""

    name = "seldom"
    needs_hidden_states = True
    reads_choice = True

    def scores(self, view: LayerView) -> Tensor:
        """Score: minus the log of the mean share of a token's experts, weighted by its weights."""
        choice = view.expert_choice
        if choice is None:  # before the first router
            return torch.zeros(view.keys.shape[:3], device=view.keys.device)
        if view.token_mask is not None:
            choice = choice * view.token_mask[..., None]
        shares = choice.sum(1) / choice.sum((1, 2)).clamp(min=1e-6)[:, None]
        seldom = -(choice * shares.clamp(min=1e-6).log()[:, None]).sum(-1)
        return seldom[:, None].expand(view.keys.shape[:3])


def presses(routers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name the options of the presses that are compared."""
    listed = ["selective", "semantic"]
    free = {"router": None, "shared": "expected", "top_k": 2}
    return {
        "calibrated": {"router": routers["without"]},
        "calibrated, choice read": {"router": routers["with"]},
        "training-free": free | {"experts": listed},
        "training-free, an expert that reads it": free | {"experts": [*listed, Seldom()]},
    }


@torch.no_grad()
def answer(model: Any, prompts: tuple[list[int], ...], press: MoERouterPress | None) -> Tensor:
    """Logits [A, vocabulary] of the answer's words, from a cache that a press has compressed."""
    context, question, reply = (torch.tensor([ids]) for ids in prompts)
    cache = DynamicCache()
    if press is None:
        model(context, past_key_values=cache)
    else:
        with press(model):
            model(context, past_key_values=cache)
    fed = torch.cat([question, reply[:, :-1]], 1)
    places = torch.arange(context.shape[1], context.shape[1] + fed.shape[1])[None]
    logits: Tensor = model(fed, past_key_values=cache, position_ids=places).logits
    return logits[0, question.shape[1] - 1 :]


def measure(
    model: Any, tokenizer: PreTrainedTokenizerFast, options: Mapping[str, Any], samples: int
) -> list[float]:
    """Mean KL divergence from the full cache at each ratio, nats per word of the answers."""
    sums = [0.0] * len(RATIOS)
    for task in TASKS:
        for index in range(samples):
            prompts = encode(make_sample(task, index, seed=-1), tokenizer)
            full, reply = answer(model, prompts, None), torch.tensor(prompts[2])
            for number, ratio in enumerate(RATIOS):
                press = MoERouterPress(ratio, **options)
                sums[number] += compare(answer(model, prompts, press), full, reply).kl
    return [total / (len(TASKS) * samples) for total in sums]


def fitted(model: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, Any]:
    """Calibrate a router that reads the choice, and one that does not, on the same texts."""
    rng = random.Random(f"texts/{seed}")
    texts = [make_text(rng, 384) for _ in range(TEXTS)]
    return {
        name: calibrate(
            model,
            tokenizer,
            texts,
            config=CalibrationConfig(length=384, samples=4096, expert_choice=reads),
            progress=False,
        )
        for name, reads in (("without", False), ("with", True))
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, calibrate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=Path(".cache/trained"), help="kept there")
    parser.add_argument("--kind", choices=("mixtral", "olmoe"), default="mixtral")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=8, help="of each task")
    args = parser.parse_args(argv)
    found: dict[str, list[list[float]]] = {}
    for seed in args.seeds:
        folder = args.models / f"{args.kind}-{seed}"
        if not folder.is_dir():
            save(train(args.kind, seed), folder, seed=seed)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), make_tokenizer()
        answered = ", ".join(f"{task} {right(model, tokenizer, task, 32):.0%}" for task in TASKS)
        print(f"seed {seed}, full cache: {answered}", flush=True)
        for name, options in presses(fitted(model, tokenizer, seed)).items():
            kls = measure(model, tokenizer, options, args.samples)
            found.setdefault(name, []).append(kls)
            print(f"seed {seed}, {name}: {' / '.join(f'{kl:.4f}' for kl in kls)}", flush=True)
    print(f"| | {' | '.join(f'{ratio:.0%} removed' for ratio in RATIOS)} |")
    print(f"|---|{'---:|' * len(RATIOS)}")
    for name, rows in found.items():
        means = (sum(kls) / len(kls) for kls in zip(*rows, strict=True))
        spreads = ((min(kls), max(kls)) for kls in zip(*rows, strict=True))
        parts = (
            f"{mean:.4f}, {low:.4f} to {high:.4f}"
            for mean, (low, high) in zip(means, spreads, strict=True)
        )
        print(f"| {name} | {' | '.join(parts)} |")


if __name__ == "__main__":
    main()
