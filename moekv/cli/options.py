"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Annotated

import typer

# As the press has them, which a command's help and completion do not import.
ROUTERS = ("base", "topk_balanced", "adaptive", "pikv", "eplb", "hierarchical")
BUDGETS = ("auto", "uniform", "layer", "head", "model")
PAIRS = ("16", "k8v8", "k8v4", "k4v4", "auto")
BACKENDS = ("auto", "cpu", "cuda", "torch")


def completing(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return what a shell's completion asks for the choices that begin as a word does."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


class DType(str, Enum):
    """Dtypes of weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Hub id or local folder.", show_default="SmolLM2-135M-Instruct"
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE", help="Where the model runs.", show_default="the GPU if there is one"
    ),
]
Weights = Annotated[
    DType,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Dtype of the weights: bfloat16, float16, float32, or auto: bfloat16, but float32 on "
        "CPUs that compute it faster.",
    ),
]
Experts = Annotated[
    int | None,
    typer.Option(
        "--num-experts", min=1, metavar="N", help="Routed experts.", show_default="as the press"
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k", min=1, metavar="K", help="Experts per token.", show_default="as the press"
    ),
]
Router = Annotated[
    str | None,
    typer.Option(
        "--router",
        metavar="TYPE",
        help="base, topk_balanced, adaptive, pikv, eplb or hierarchical.",
        show_default="as the press",
        autocompletion=completing(ROUTERS),
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="Scope of the budget: uniform, layer, head, model, or auto.",
        autocompletion=completing(BUDGETS),
    ),
]
Pairs = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help="Storage of pairs: 16 (bits), k8v8, k8v4, k4v4 or auto.",
        autocompletion=completing(PAIRS),
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Kernels to use: cpu, cuda, torch, or auto.",
        autocompletion=completing(BACKENDS),
    ),
]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens of an answer at most.")
]
