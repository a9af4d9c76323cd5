"""Whom the gates trust, and where: `python -m benchmarks.quality.trust [--router FOLDER]`.

Prefills texts of several kinds under a press with a calibrated router, and prints how much of the
pairs' scores came from each expert. `learned` was fitted to the calibration's kinds of text; the
others here are kinds that it never saw.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import string
from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from moekv import MoERouterPress
from moekv.models.index import DEFAULT_MODEL
from moekv.models.loading import load_model

from .calibration_texts import make_text
from .tasks import TASKS, make_sample

GERMAN = """
Am frühen Morgen ging der Bäcker durch die leeren Straßen zu seinem Laden. Es hatte in der Nacht
geregnet, und in den Pfützen spiegelten sich die Laternen. Vor der Tür wartete schon eine alte
Frau mit einem Korb, die jeden Tag zwei Brötchen und ein halbes Roggenbrot kaufte. Sie erzählte
ihm von ihrem Enkel, der in einer fernen Stadt Schiffe baute und nur selten schrieb. Der Bäcker
hörte zu, während er den Ofen anheizte, und dachte an seinen eigenen Sohn. Später kamen die
Kinder auf dem Weg zur Schule, drückten die Nasen an die Scheibe und zählten ihre Münzen. Gegen
Mittag brachte der Müller sechs Säcke Mehl und klagte über den niedrigen Wasserstand im Bach. So
verging ein Tag wie der andere, bis im Herbst ein Brief eintraf, der alles ändern sollte.
"""


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits + "     ", k=2400))


def _digests(rng: random.Random) -> str:
    rows = (f"{i} {hashlib.sha256(rng.randbytes(8)).hexdigest()}" for i in range(24))
    return "\n".join(rows)


def _words(rng: random.Random, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(rng.choices(range(100, len(tokenizer)), k=900))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="auto", help="folder [the one of the package]")
    parser.add_argument("--texts", type=int, default=4, help="of each kind [%(default)s]")
    args = parser.parse_args()
    model, tokenizer = load_model(DEFAULT_MODEL)
    rng = random.Random(1)

    def task(name: str) -> Callable[[int], str]:
        return lambda i: make_sample(name, tokenizer, length=1000, index=i, seed=1).context

    kinds: dict[str, Callable[[int], str]] = {
        "like the calibration's": lambda i: make_text(i, seed=1),
        **{f"task {name}": task(name) for name in TASKS},
        "German": lambda i: GERMAN,
        "SHA-256 digests": lambda i: _digests(rng),
        "random letters": lambda i: _letters(rng),
        "random tokens": lambda i: _words(rng, tokenizer),
    }
    for kind, make in kinds.items():
        press = MoERouterPress(0.5, router=args.router)
        for index in range(args.texts):
            ids = tokenizer(make(index), return_tensors="pt").input_ids[:, :1024]
            with press(model), torch.no_grad():
                model.model(input_ids=ids, past_key_values=DynamicCache())
        layers = press.get_stats()["layer_stats"].values()
        usage = [layer["expert_compression_stats"]["expert_usage"] for layer in layers]
        shares = {name: sum(row[name] for row in usage) / len(usage) for name in usage[0]}
        print(f"{kind:28}", *(f"{name} {share:.3f}" for name, share in shares.items()), flush=True)


if __name__ == "__main__":
    main()
