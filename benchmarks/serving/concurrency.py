"""The same blocks, plain and compressed: how many requests run at once, and what it costs.

Eight prompts of about 1,970 tokens, the story and a question each, wait for a pool of 160 blocks of
32 tokens; each is answered with 64 tokens. Runs in an environment with vLLM (`make test-vllm` makes
one), each case in a process of its own, in which one thread does everything: all times but the last
are of that thread, so that what else the machine does is not in them. What is compared with the
same pairs in transformers is in `benchmarks.serving.fidelity`.

In float32: without instructions for bfloat16, vLLM's CPU build multiplies such matrices four times
slower.

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

from benchmarks.measure import RESULTS, quartiles, write_results
from benchmarks.serving import fidelity
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

    def __init__(self, model: Path, case: dict[str, Any] | None) -> None:
        from vllm import LLM

        llm = LLM(
            model=str(model),
            dtype="float32",
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

    def feed(
        self, prompts: list[list[int]], new: int, logprobs: int | None = None
    ) -> dict[str, Any]:
        """Let prompts come together, and step until all are answered."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=logprobs)
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


def measure(model: Path, case: dict[str, Any] | None) -> dict[str, Any]:
    """Measure one case in this process."""
    run = Run(model, case)
    prompts = run.prompts()
    run.feed([prompts[0][:200]], 4)  # first touches
    alone = [run.feed([prompts[0]], 2)["step_s"][0] for _ in range(5)]
    pair = run.feed(prompts[:2], 33)["step_s"]
    decode = pair[-32:]  # two requests run in each
    crowd = run.feed(prompts, NEW)
    del crowd["step_s"]
    answers = [answer.text for answer in crowd.pop("answers")]
    right = [asked.is_right(said) for asked, said in zip(ASKED, answers, strict=True)]
    return {
        "case": name_of(case),
        "options": case,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        **crowd,
        "fidelity": fidelity.measure(run, model, prompts[:3], NEW),
        "right": sum(map(bool, right)),
        "asked": len(right),
        "prompt_step_s": quartiles(alone),
        "decode_step_of_two_s": quartiles(decode),
        "answers": [said.strip().split("\n")[0][:100] for said in answers],
    }


def _in_a_process(model: Path, index: int) -> dict[str, Any]:
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.serving.concurrency", "--model", str(model)]
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
    parser.add_argument("--out", type=Path, default=RESULTS / "serving-smollm2.json")
    args = parser.parse_args()
    if args.case is not None:
        args.out.write_text(json.dumps(measure(args.model, CASES[args.case])))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = Path(folder)
            loaded, tokenizer = load_model(dtype=torch.bfloat16)
            loaded.save_pretrained(model)
            tokenizer.save_pretrained(model)
            del loaded
        rows = []
        for index in args.cases:
            rows.append(_in_a_process(model, index))
            row = rows[-1]
            print(
                f"{row['case']}: {row['most_running']} at once, {row['steps']} steps, "
                f"{row['tokens_per_second']:.1f} tokens/s, first token "
                f"{statistics.median(row['first_token_s']):.1f} s, right {row['right']} of "
                f"{row['asked']}, prompt {1e3 * row['prompt_step_s'][1]:.0f} ms, decode of two "
                f"{1e3 * row['decode_step_of_two_s'][1]:.1f} ms, {row['fidelity']}",
                flush=True,
            )
            command = "python -m benchmarks.serving.concurrency"
            write_results(args.out, command, rows)
    print(f"vLLM {version('vllm-cpu')}")


if __name__ == "__main__":
    main()
