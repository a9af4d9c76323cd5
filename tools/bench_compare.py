"""Two versions of moekv side by side: what one takes of the other's time.

    make bench-compare BASE=v0.1.0
    python tools/bench_compare.py HEAD~5 --cases prefill decode --rounds 20

The other version is checked out into ``build/compare`` and its library built there, unless its
native sources are the same. Each version runs in a process of its own, which does nothing until it
is its turn: round after round both run a case, now one first and then the other, so that whatever
else the machine does meets both alike. What counts are the ratios of each round: their median and
quartiles. Processor time of one thread, or, with more (``OMP_NUM_THREADS``), time by the clock.

Both versions get the same inputs. Where their results differ the line says so: a change that makes
something faster by doing something else is found. A case that a version does not know is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ("csrc", "cmake", "CMakeLists.txt")
LENGTH, HEADS, GROUP, DIM = 8192, 8, 4, 128  # of the ops: Llama 3.1 8B's attention
PROMPT, LAYERS, RATIO = 2048, 4, 0.75  # of the model: SmolLM2's layers


# --- One version, in its process ------------------------------------------------------------------


def cases() -> dict[str, Callable[[], Callable[[], Any]]]:
    """Functions that prepare a case and return what is timed, which returns tensors to compare."""
    import torch

    from moekv import ops

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(dtype)

    keys = random(1, HEADS, LENGTH, DIM)
    values = random(1, HEADS, LENGTH, DIM) * 2
    queries = random(1, HEADS * GROUP, LENGTH, DIM)
    scores = random(1, HEADS, LENGTH, dtype=torch.float32)
    kept = LENGTH // 4

    def gating() -> Callable[[], Any]:
        logits = random(LENGTH, 8, dtype=torch.float32)
        return lambda: ops.gating_topk(logits, k=2)

    def all_kinds() -> Callable[[], Any]:
        window = queries[:, :, -64:].contiguous()
        kinds = list(ops.ScoreKind)
        return lambda: ops.expert_scores(keys, values, window, kinds=kinds, scaling=DIM**-0.5)

    def expected() -> Callable[[], Any]:
        return lambda: ops.expected_attention(queries, keys, scaling=DIM**-0.5)

    def project() -> Callable[[], Any]:
        states, weight = random(1, LENGTH, 4096), random(9, 4096)
        return lambda: ops.project_tokens(states, weight)

    def mix() -> Callable[[], Any]:
        several = scores.expand(4, -1, -1, -1).contiguous()
        weights = torch.full((1, LENGTH, 2), 0.5)
        experts = torch.arange(2, dtype=torch.int32).expand(1, LENGTH, 2).contiguous()
        return lambda: ops.mix_scores(several, weights, experts)

    def select() -> Callable[[], Any]:
        return lambda: ops.select_kept(scores, total=[HEADS * kept], sinks=4, window=16)

    def chosen() -> torch.Tensor:
        places = torch.arange(0, LENGTH, LENGTH // kept, dtype=torch.int32)
        return places.repeat(HEADS)

    def compact() -> Callable[[], Any]:
        indices = chosen().view(1, HEADS, kept)

        def run() -> Any:
            own = keys.clone(), values.clone()
            ops.kv_compact_(*own, indices)
            return own[0][:, :, :kept]

        return run

    def quantise(pairs: str) -> Callable[[], Any]:
        return lambda: ops.quantize_pairs(keys.view(-1, DIM), values.view(-1, DIM), pairs=pairs)

    def attend(pairs: str, count: int = 1) -> Callable[[], Any]:
        query = queries[:, :, -count:].contiguous()
        begin = torch.arange(HEADS, dtype=torch.int32).view(1, HEADS) * LENGTH
        stored: Sequence[Any] = keys.view(-1, DIM), values.view(-1, DIM)
        options: dict[str, Any] = {"scaling": DIM**-0.5}
        if pairs != "16":
            *stored, options["scales"] = ops.quantize_pairs(*stored, pairs=pairs)
            options["pairs"] = pairs
        ends = begin + LENGTH
        return lambda: ops.ragged_attention(query, *stored, begin, ends, **options)

    found: dict[str, Callable[[], Callable[[], Any]]] = {
        "gating_topk": gating,
        "expert_scores": all_kinds,
        "expected_attention": expected,
        "project_tokens": project,
        "mix_scores": mix,
        "select_kept": select,
        "kv_compact_": compact,
        **{f"quantize_pairs {p}": lambda p=p: quantise(p) for p in ("k8v8", "k8v4", "k4v4")},
        **{f"ragged_attention {p}": lambda p=p: attend(p) for p in ("16", "k8v8", "k8v4", "k4v4")},
        "ragged_attention, 64 queries": lambda: attend("16", 64),
        "prefill": lambda: prefill(None),
        "prefill, 25 % retained": lambda: prefill({}),
        "prefill, four experts": lambda: prefill({"num_experts": 4, "router_type": "pikv"}),
        "prefill, k8v4": lambda: prefill({"pairs": "k8v4"}),
        "decode": decode,
    }
    return found


def small_model() -> Any:
    """Layers of SmolLM2's shape, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=512,
        max_position_embeddings=2 * PROMPT,
        dtype=torch.bfloat16,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def prompt() -> Any:
    """Tokens, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 512, (1, PROMPT), generator=generator)


def prefill(options: dict[str, Any] | None) -> Callable[[], Any]:
    """Time a prefill of the model; None: without a press."""
    import torch

    from moekv import MoERouterPress

    model, tokens = small_model(), prompt()
    press = None if options is None else MoERouterPress(RATIO, router=None, **options)

    @torch.no_grad()
    def run() -> Any:
        if press is None:
            return model(tokens, use_cache=True, logits_to_keep=1).logits
        with press(model):
            return model(tokens, use_cache=True, logits_to_keep=1).logits

    return run


def decode() -> Callable[[], Any]:
    """Time four steps over a cache of which a quarter is left."""
    import copy

    import torch

    from moekv import MoERouterPress

    model, tokens = small_model(), prompt()
    with torch.no_grad(), MoERouterPress(RATIO, router=None)(model):
        cache = model(tokens, use_cache=True).past_key_values

    @torch.no_grad()
    def run() -> Any:
        own = copy.deepcopy(cache)
        for step in range(4):
            out = model(tokens[:, step : step + 1], past_key_values=own)
        return out.logits

    return run


def serve() -> None:
    """Answer requests for cases, line by line, until there are no more."""
    import torch

    out, sys.stdout = sys.stdout, sys.stderr
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    known, ready = cases(), {}
    for line in sys.stdin:
        name = json.loads(line)
        answer: dict[str, Any]
        try:
            if name not in ready:
                ready.clear()  # one case at a time
                ready[name] = known[name]()
                ready[name]()
            begin = clock()
            result = ready[name]()
            answer = {"seconds": clock() - begin, "sums": _sums(result)}
        except Exception as error:  # another version may not know a case
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(answer), file=out, flush=True)


def _sums(result: Any) -> list[float]:
    """Sum what came out, with signs, so that two versions can be compared."""
    import torch

    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    found = []
    for tensor in tensors:
        numbers = tensor.detach().flatten().double()
        signs = torch.arange(len(numbers)) % 7 - 3.0
        found.append(float((numbers * signs).sum()) / max(float(numbers.abs().sum()), 1e-30))
    return found


# --- Both versions --------------------------------------------------------------------------------


@dataclass
class Version:
    """One version, at work in a process of its own."""

    name: str
    tree: Path

    def __post_init__(self) -> None:
        """Start it."""
        environment = os.environ | {
            "PYTHONPATH": str(self.tree),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self.tree,
            env=environment,
            text=True,
        )

    def run(self, case: str) -> dict[str, Any]:
        """Run a case once."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(case), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"bench-compare: {self.name} ended while {case!r} ran")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Comparison:
    """A case in both versions."""

    case: str
    base: list[float]
    own: list[float]
    differs: bool = False
    error: str = ""

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Quartiles of this version's time over the other's, round by round."""
        found = [a / b for a, b in zip(self.own, self.base, strict=True)]
        if len(found) == 1:
            return found[0], found[0], found[0]
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        return low, middle, high

    def line(self) -> str:
        """Write a row of the table."""
        if self.error:
            return f"| {self.case} | | | {self.error} |"
        low, middle, high = self.ratios
        times = " / ".join(f"{1e3 * statistics.median(x):.3g}" for x in (self.base, self.own))
        verdict = "results differ" if self.differs else ""
        return f"| {self.case} | {times} | **{middle:.3f}** ({low:.3f} to {high:.3f}) | {verdict} |"


def compare(base: Version, own: Version, case: str, rounds: int) -> Comparison:
    """Run a case in both versions, in turn."""
    found = Comparison(case, [], [])
    for turn in range(rounds):
        order = (base, own) if turn % 2 else (own, base)
        answers = {version.name: version.run(case) for version in order}
        for version in (base, own):
            if error := answers[version.name].get("error"):
                return Comparison(case, [], [], error=f"{version.name}: {error}")
        found.base.append(answers[base.name]["seconds"])
        found.own.append(answers[own.name]["seconds"])
        sums = [answers[version.name]["sums"] for version in (base, own)]
        near = len(sums[0]) == len(sums[1]) and all(
            abs(a - b) < 1e-3 for a, b in zip(*sums, strict=True)
        )
        found.differs |= not near
    return found


def check_out(commit: str) -> Path:
    """Check a commit out into ``build/compare``, with its library."""
    name = _git("rev-parse", "--verify", f"{commit}^{{commit}}")
    tree = ROOT / "build" / "compare" / name[:12]
    if not tree.exists():
        _git("worktree", "prune")
        _git("worktree", "add", "--quiet", "--detach", str(tree), name)
    libraries = tree / "moekv" / "lib"
    if list(libraries.glob("*")):
        return tree
    same = subprocess.run(["git", "diff", "--quiet", name, "--", *NATIVE], cwd=ROOT).returncode == 0
    if same:
        shutil.copytree(ROOT / "moekv" / "lib", libraries, dirs_exist_ok=True)
        return tree
    print(f"building the library of {commit}", file=sys.stderr)
    environment = os.environ | {"MOEKV_CUDA": "OFF", "PYTHONPATH": str(tree / "tools")}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench-compare: {commit} was not built\n{done.stdout}{done.stderr}")
    return tree


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench-compare: git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def table(base: str, found: Sequence[Comparison]) -> Iterator[str]:
    """Write the comparison, in Markdown."""
    yield f"| case | ms, {base} / here | time here over {base}: median (quartiles) | |"
    yield "|---|--:|--:|---|"
    yield from (one.line() for one in found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return how many cases gave other results."""
    if arguments is None and sys.argv[1:] == ["--serve"]:
        serve()
        return 0
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("base", help="commit, branch or tag to compare with")
    parser.add_argument("--cases", nargs="+", help="beginnings of names; default: all")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"expected --rounds of at least 1, got {given.rounds}")
    known = list(cases())
    chosen = [x for x in known if not given.cases or x.startswith(tuple(given.cases))]
    if not chosen:
        parser.error(f"expected --cases that begin names among {', '.join(known)}")
    base, own = Version(given.base, check_out(given.base)), Version("here", ROOT)
    found = []
    try:
        for case in chosen:
            found.append(compare(base, own, case, given.rounds))
            print(found[-1].line(), file=sys.stderr)
    finally:
        base.end()
        own.end()
    print("\n".join(table(given.base, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
