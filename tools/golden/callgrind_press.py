"""How many instructions the press executes in a prefill, counted by valgrind's callgrind.

Counts hardly depend on what else a machine does, where times do::

    python callgrind_press.py --tree old > old.json
    python callgrind_press.py --tree new > new.json

The model has SmolLM2's attention layers: as many, of its sizes, in bfloat16. What the press has no
part in is left out, or valgrind would take hours: there are neither norms nor feed-forward layers,
projections pick channels, attention gives the values back. A prefill without a press is counted as
well; the difference is the press's own. How often layers projected is reported, since a projection
that was made once more would hardly show in the count.

Callgrind begins when a short prefill of each kind has run (what comes before is faster without): a
small library, built here with cc, asks for it. It needs valgrind and its headers. Instruction sets
are held low: valgrind knows no AVX-512, and emulates fused products of AVX2 a hundred times slower.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

LENGTH = 2048
VOCABULARY = 4096

SOURCE = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void begin(void) { CALLGRIND_ZERO_STATS; }
void end(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""

ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "HF_HUB_OFFLINE": "1",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "MKL_NUM_THREADS": "1",
    "MOEKV_CPU_CAPABILITY": "default",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
}

PRESSES: dict[str, dict[str, Any]] = {
    "default": {},
    "pikv": {"num_experts": 4, "top_k": 2, "router_type": "pikv"},
}


def build_model() -> Any:
    """Build SmolLM2's attention layers, and next to nothing else."""
    import torch
    from torch import Tensor, nn
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    class Pick(nn.Module):
        """Picks channels, from an offset on."""

        calls = 0

        def __init__(self, like: nn.Linear, offset: int) -> None:
            super().__init__()
            self.weight = like.weight
            self.in_features, self.out_features = like.in_features, like.out_features
            self.offset = offset

        def forward(self, x: Tensor) -> Tensor:
            """Give as many channels as a projection would."""
            Pick.calls += 1
            return x.roll(-self.offset, -1)[..., : self.out_features].contiguous()

    def give_values(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // value.shape[1]
        return (value / 8).repeat_interleave(groups, 1).transpose(1, 2).contiguous(), None

    class Nothing(nn.Module):
        """Adds nothing to the residual stream."""

        def forward(self, x: Tensor) -> Tensor:
            """Give zeros, of no memory."""
            return x.new_zeros(()).expand_as(x)

    ALL_ATTENTION_FUNCTIONS["give_values"] = give_values
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=16,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        initializer_range=1.0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for number, layer in enumerate(model.model.layers):
        for i, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            pick = Pick(getattr(layer.self_attn, name), (100 * i + 37 * number) % 576)
            setattr(layer.self_attn, name, pick)
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
        layer.mlp = Nothing()
    model.model.norm = nn.Identity()
    model.set_attn_implementation("give_values")
    return model, Pick


def work(library: Path, length: int) -> None:
    """Run prefills, each of which ends with a dump; print what was counted, a line each."""
    import torch
    from transformers import DynamicCache

    import moekv
    from moekv import MoERouterPress

    torch.set_num_threads(1)
    valgrind = ctypes.CDLL(str(library))
    model, pick = build_model()
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))[None, :length]

    @torch.no_grad()
    def prefill(ids: torch.Tensor, press: Any) -> DynamicCache:
        cache = DynamicCache()
        with nullcontext() if press is None else press(model):
            model.model(ids, past_key_values=cache)
        return cache

    makers: dict[str, Any] = {"no press": lambda: None}
    for name, options in PRESSES.items():
        makers[name] = lambda options=options: MoERouterPress(0.5, **options)
    for make in makers.values():
        prefill(ids[:, :128], make())
    _say("begun")
    gc.collect()
    gc.disable()
    valgrind.start()
    for name, make in makers.items():
        press = make()
        pick.calls = 0
        valgrind.begin()
        cache = prefill(ids, press)
        valgrind.end(name.encode())
        pairs = sum(_num_pairs(layer) for layer in cache.layers)
        row = {"name": name, "projections": pick.calls, "pairs": pairs}
        print(json.dumps(row | {"moekv": moekv.__file__}), flush=True)
        _say(f"{name} is counted")
        del cache, press


def _say(what: str) -> None:
    print(f"{time.process_time():.0f} s: {what}", file=sys.stderr, flush=True)


def _num_pairs(layer: Any) -> int:
    """Count what a cache layer holds, to see that the press was at work."""
    stored = getattr(layer, "stored_keys", None)
    return len(stored) if stored is not None else layer.keys.shape[:3].numel()


def read_totals(folder: Path) -> dict[str, int]:
    """Return the instructions of each dump, by name."""
    totals = {}
    for dump in folder.glob("counts.*"):
        text = dump.read_text()
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        if name is not None and total is not None:
            totals[name[1]] = int(total[1])
    return totals


def count(tree: Path, length: int, folder: Path) -> dict[str, Any]:
    """Count the instructions of one tree's presses; dumps stay in a folder."""
    library = folder / "toggle.so"
    built = subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(library)],
        input=SOURCE,
        capture_output=True,
        text=True,
    )
    if built.returncode != 0:
        sys.exit(f"callgrind_press: the helper was not built\n{built.stderr}")
    command = [
        *("valgrind", "--tool=callgrind", "--instr-atstart=no", "--error-limit=no"),
        *(f"--callgrind-out-file={folder}/counts", sys.executable, __file__),
        *("--worker", str(library), "--length", str(length)),
    ]
    begun = time.perf_counter()
    ran = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(tree.resolve())},
        stdout=subprocess.PIPE,
        text=True,
    )
    if ran.returncode != 0:
        sys.exit(f"callgrind_press: {tree}: the worker failed\n{ran.stdout[-2000:]}")
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    totals = read_totals(folder)
    if sorted(totals) != sorted(row["name"] for row in rows):
        sys.exit(f"callgrind_press: {tree}: dumps of {sorted(totals)} only")
    without, *pressed = rows
    return {
        "tree": str(tree),
        "moekv": without["moekv"],
        "length": length,
        "without_press": totals[without["name"]],
        "pairs_without_press": without["pairs"],
        "presses": {
            row["name"]: {
                "with_press": totals[row["name"]],
                "press": totals[row["name"]] - totals[without["name"]],
                "further_projections": row["projections"] - without["projections"],
                "pairs": row["pairs"],
            }
            for row in pressed
        },
        "seconds": round(time.perf_counter() - begun),
    }


def main() -> None:
    """Count, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=Path, help="folder that has the package moekv in it")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of the prefill")
    parser.add_argument("--dumps", type=Path, help="keep callgrind's dumps here, to annotate")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return work(args.worker, args.length)
    if args.tree is None or not (args.tree / "moekv").is_dir():
        parser.error(f"expected --tree to be a folder with moekv in it, got {args.tree}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if args.dumps is None else args.dumps
        Path(folder).mkdir(parents=True, exist_ok=True)
        print(json.dumps(count(args.tree, args.length, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
