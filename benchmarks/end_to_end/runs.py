"""What the end-to-end benchmarks share: models, prompts, options, and the file of results."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.measure import RESULTS, write_results
from moekv.models.loading import load_model


def _random_llama(**sizes: int) -> PreTrainedModel:
    """Two layers, randomly initialised."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
    return model.to(torch.bfloat16).eval()


def llama_shape() -> PreTrainedModel:
    """Two layers with the attention of Llama-3.1-8B."""
    return _random_llama(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )


def small_shape() -> PreTrainedModel:
    """Two layers of four heads: 128k tokens in one forward take a minute."""
    return _random_llama(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=262144,
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "smollm2": lambda: load_model()[0],
    "llama-shape": llama_shape,
    "small-shape": small_shape,
}


def random_ids(model: PreTrainedModel, length: int) -> Tensor:
    """Token ids [1, length] that depend on the length alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, model.config.vocab_size, (1, length), generator=generator)


class Run:
    """One run of a benchmark: its options, its model, and the rows measured so far.

    Parameters
    ----------
    name : str
        Of the benchmark's module, and where its results go.
    description : str
        First line of the help.
    methods : sequence of str
        The default.
    more : sequence of str
        Further ones that may be asked for.
    lengths : sequence of int
        The default.
    ratio : float
        Share of the cache that all methods remove, for the record.
    """

    def __init__(
        self,
        name: str,
        description: str,
        *,
        methods: Iterable[str],
        lengths: Sequence[int],
        ratio: float,
        more: Iterable[str] = (),
    ) -> None:
        names = list(methods)
        self.name, self.ratio = name, ratio
        self.parser = parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--model", choices=list(MODELS), default="smollm2")
        parser.add_argument("--lengths", type=int, nargs="+", default=list(lengths))
        parser.add_argument(
            "--methods", nargs="+", choices=[*names, *more], default=names, metavar="METHOD"
        )
        parser.add_argument("--threads", type=int, default=torch.get_num_threads())
        parser.add_argument(
            "--out", type=Path, help=f"JSON (default: benchmarks/results/{name}-MODEL)"
        )
        self.args = argparse.Namespace()
        self.model: PreTrainedModel
        self._rows: list[dict[str, Any]] = []

    def begin(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Read the options and load the model."""
        given = sys.argv[1:] if arguments is None else list(arguments)
        self.args = args = self.parser.parse_args(given)
        module = f"python -m benchmarks.end_to_end.{self.name}"
        self._command = f"{module} {shlex.join(given)}".strip()
        self._out: Path = args.out or RESULTS / f"{self.name}-{args.model}.json"
        torch.set_num_threads(args.threads)
        self.model = MODELS[args.model]()
        return args

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write further rows: what has been measured is there, whatever becomes of the rest."""
        common = {"model": self.args.model, "threads": self.args.threads, "ratio": self.ratio}
        self._rows += [common | row for row in rows]
        write_results(self._out, self._command, self._rows)

    def end(self) -> None:
        """Say where the results are."""
        print(f"written to {self._out}")
