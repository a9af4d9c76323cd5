"""No block is lost or given back twice, whatever becomes of requests."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from vllm_engine import blocks_in_use, engine, params, pool, tokens, write_model

from moekv.integrations.vllm.options import ServingOptions, own_ratio


def check_pool(engine: Any, options: ServingOptions, begun: dict[str, int]) -> int:
    """Check vLLM's pool against what its requests hold.

    Parameters
    ----------
    begun : dict of int
        Tokens of requests that had been computed before the last step.

    Returns
    -------
    int
        Requests that have given blocks back after they were preempted.
    """
    scheduler = engine.engine_core.engine_core.scheduler
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    blocks, again = pool(engine), 0
    tables = manager.req_to_blocks
    held = Counter(b.block_id for own in tables.values() for b in own if not b.is_null)
    counted = {b.block_id: b.ref_cnt for b in blocks.blocks if b.ref_cnt and not b.is_null}
    assert counted == held
    free = blocks.free_block_queue.get_all_free_blocks()
    assert len(free) == blocks.get_num_free_blocks()
    assert {b.block_id for b in free}.isdisjoint(held)
    assert len(free) + len(held) + 1 == blocks.num_gpu_blocks  # one stands for those that left
    for request in scheduler.running:
        prompt, extra = request.num_prompt_tokens, request.sampling_params.extra_args
        gap = options.gap(prompt, manager.block_size, own_ratio(extra))
        if gap is None:
            continue
        own = tables[request.request_id]
        # Where pairs move, nobody else is, nor can be.
        assert all(b.ref_cnt == 1 and b.block_hash is None for b in own[gap.start :])
        begin = begun.get(request.request_id, 0)
        if prompt <= begin < request.num_computed_tokens:  # a step behind the prompt
            assert all(b.is_null for b in own[: gap.start])
            again += request.num_preemptions > 0
    return again


def live(folder: Path, budget: str, *, requests: int, caching: bool) -> None:
    """Requests in a pool that is too small, some aborted or preempted, some that begin alike."""
    draw = random.Random(f"{budget} {caching}")
    options = {"compression_ratio": 0.7, "budget": budget}
    with engine(
        folder,
        options,
        max_model_len=480,
        num_gpu_blocks_override=16,  # one request of the longest
        max_num_batched_tokens=120,
        enable_prefix_caching=caching,
    ) as compressed:
        scheduler = compressed.engine_core.engine_core.scheduler
        waiting = [(str(i), draw.randint(1, 320), draw.randint(40, 160)) for i in range(requests)]
        alive: dict[str, int] = {}
        preempted = again = aborted = finished = found = 0
        while waiting or compressed.has_unfinished_requests():
            while waiting and draw.random() < 0.5:
                name, length, count = waiting.pop()
                shared = draw.choice([0, length // 2, length])
                prompt = tokens(320)[:shared] + tokens(length - shared, seed=int(name) + 1)
                ratio = draw.choice([None, None, 0.0, 0.4, 0.9])
                own = None if ratio is None else {"moekv": {"compression_ratio": ratio}}
                asked = params(count, extra_args=own)
                compressed.add_request(name, {"prompt_token_ids": prompt}, asked)
                alive[name] = count
            if alive and draw.random() < 0.004:
                name = draw.choice(sorted(alive))
                compressed.abort_request([name])
                del alive[name]
                aborted += 1
            begun = {r.request_id: r.num_computed_tokens for r in scheduler.running}
            for output in compressed.step():
                if output.finished:
                    finished += 1
                    found += output.num_cached_tokens > 0
                    assert len(output.outputs[0].token_ids) == alive.pop(output.request_id)
            preempted += sum(r.request_id in begun for r in scheduler.waiting)
            again += check_pool(compressed, ServingOptions(**options), begun)
        assert not alive and finished + aborted == requests
        assert aborted > 2 and preempted > 2 and again > 0
        assert (found > 2) == caching
        assert blocks_in_use(compressed) == 0


@pytest.mark.parametrize(("budget", "caching"), [("model", True), ("uniform", False)])
def test_random_requests_leave_every_block(tmp_path: Path, budget: str, caching: bool) -> None:
    live(write_model(tmp_path), budget, requests=40, caching=caching)


@pytest.mark.thorough
@pytest.mark.parametrize("budget", ["model", "uniform"])
@pytest.mark.parametrize("caching", [False, True])
def test_many_random_requests(tmp_path: Path, budget: str, caching: bool) -> None:
    live(write_model(tmp_path), budget, requests=200, caching=caching)
