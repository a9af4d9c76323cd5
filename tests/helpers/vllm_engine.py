"""vLLM's engine in this process, over tiny models, and the same model in transformers."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read when vLLM is imported. Nothing is worth compiling for models as small as these.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines run at once
    "VLLM_HOST_IP": "127.0.0.1",  # it would look for a way out of the machine
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
}

import pytest
import torch
from character_tokenizer import character_tokenizer
from masked_reference import show
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 128
BLOCK = 32  # tokens
LAYERS, HEADS = 3, 2

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
    "initializer_range": 0.2,  # the default, 0.02, makes attention all but uniform
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "llama3": lambda: LlamaConfig(
        **_SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=None),
    "mistral_windows": lambda: MistralConfig(**_SHAPE, sliding_window=64),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=64),
}


def write_model(folder: Path, name: str = "llama") -> Path:
    """Write a model of random weights, and a tokenizer, where vLLM can load them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    # Some heads say more than others, so that a budget over the model moves blocks between them.
    for i, layer in enumerate(model.model.layers):
        projection = layer.self_attn.v_proj
        for head, rows in enumerate(projection.weight.data.view(2, -1, projection.in_features)):
            rows *= 30.0 ** ((i + 2 * head) % 3 - 1)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def tokens(length: int, seed: int = 0) -> list[int]:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


@contextmanager
def engine(folder: Path, moekv: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """An engine whose steps a test can take one by one."""
    from vllm import LLM

    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "block_size": BLOCK,
        "num_gpu_blocks_override": 65,  # one of them stands for those that have left
        "additional_config": {} if moekv is None else {"moekv": moekv},
    }
    llm = LLM(model=str(folder), **given | options)
    try:
        yield llm.llm_engine
    finally:
        # Now, and not when it is collected: the process's groups would be the next engine's.
        llm.llm_engine.engine_core._finalizer()


def params(count: int, **options: Any) -> Any:
    """Greedy sampling of so many tokens."""
    from vllm import SamplingParams

    given = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**given | options)


def answers(engine: Any, prompts: Sequence[list[int]], count: int = 24, **options: Any) -> Any:
    """What the engine answers to prompts that come together: vLLM's completions."""
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params(count, **options))
    done = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output.outputs[0]
    return [done[str(i)] for i in range(len(prompts))]


def pool(engine: Any) -> Any:
    """The blocks of an engine."""
    return engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool


def blocks_in_use(engine: Any) -> int:
    """Count blocks that are not free."""
    blocks = pool(engine)
    return blocks.num_gpu_blocks - 1 - blocks.get_num_free_blocks()


def reference(
    folder: Path, prompt: list[int], answer: Sequence[int], kept: Sequence[Tensor]
) -> Tensor:
    """Log-probabilities [len(answer), V] that transformers gives where an answer's tokens come.

    The prompt is read whole; behind it each KV head sees but the pairs that it keeps, at their true
    positions: [H, len(prompt)] bool in each layer.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="masked_reference"
    )
    cache = DynamicCache(config=model.config)
    for layer, seen in enumerate(kept):
        show(layer, torch.ones_like(seen)[None])
    with torch.no_grad():
        first = model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1:]
        for layer, seen in enumerate(kept):
            new = torch.ones(len(seen), len(answer) - 1, dtype=torch.bool)
            show(layer, torch.cat([seen, new], 1)[None])
        later = model(torch.tensor([answer[:-1]]), past_key_values=cache).logits[0]
    return torch.cat([first, later]).log_softmax(-1)


class Chosen(list[dict[str, Any]]):
    """What was chosen of each prompt, or of each layer of it, in the order in which it was."""

    def of(self, prompt: Sequence[int], times: int = 1) -> "Chosen":
        """What was chosen first of a prompt that came so often, among some of other lengths."""
        own = [each for each in self if each["gap"].full == len(prompt) // BLOCK][::times]
        whole = len(own[0]["counts"]) == LAYERS * HEADS
        return Chosen(own[: 1 if whole else LAYERS])


def watch_choices(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """Follow what is chosen of prompts from now on."""
    from moekv.integrations.vllm import worker

    seen = Chosen()
    choose: Callable[..., tuple[Tensor, Tensor]] = worker.choose

    def spy(scores: Tensor, gap: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        indices, counts = choose(scores, gap, *rest)
        seen.append({"scores": scores, "gap": gap, "indices": indices, "counts": counts})
        seen[-1]["start"] = rest[3]
        return indices, counts

    monkeypatch.setattr(worker, "choose", spy)
    return seen


def near_reference(folder: Path, prompt: list[int], completion: Any, chosen: Chosen) -> None:
    """Check log-probabilities against transformers' with the same pairs of one prompt."""
    counts = torch.cat([each["counts"] for each in chosen]) * BLOCK
    assert len(counts) == LAYERS * HEADS
    full = chosen[0]["gap"].full * BLOCK
    kept = torch.ones(len(counts), len(prompt), dtype=torch.bool)
    kept[:, :full] = False
    rows = torch.arange(len(kept)).repeat_interleave(counts)
    kept[rows, torch.cat([each["indices"] for each in chosen])] = True
    assert kept.sum() == counts.sum() + len(kept) * (len(prompt) - full)  # none twice
    per_layer = list(kept.view(LAYERS, HEADS, -1))
    log_probs = reference(folder, prompt, completion.token_ids, per_layer)
    for step, given in enumerate(completion.logprobs):
        for token, said in given.items():
            assert abs(log_probs[step, token].item() - said.logprob) < 1e-3, (step, token)
