"""No block is lost or given back twice, whatever becomes of requests."""

import random
from pathlib import Path
from typing import Any

import pytest
from vllm_engine import BLOCK, engine, params, pool, tokens, write_model


def check_pool(engine: Any) -> None:
    """Check vLLM's pool against what its requests hold."""
    scheduler = engine.engine_core.engine_core.scheduler
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    blocks = pool(engine)
    held = [b for own in manager.req_to_blocks.values() for b in own if not b.is_null]
    assert len({b.block_id for b in held}) == len(held)  # each is one request's
    assert all(b.ref_cnt == 1 for b in held)
    free = blocks.free_block_queue.get_all_free_blocks()
    assert {b.block_id for b in free}.isdisjoint(b.block_id for b in held)
    assert len(free) == blocks.get_num_free_blocks()
    assert len(free) + len(held) + 1 == blocks.num_gpu_blocks  # one stands for those that left
    assert all(b.ref_cnt == 0 for b in free)
    for request in scheduler.running:
        own = [not b.is_null for b in manager.req_to_blocks[request.request_id]]
        assert sum(own) >= min(len(own), 1)


@pytest.mark.parametrize("budget", ["model", "uniform"])
def test_random_requests_leave_every_block(tmp_path: Path, budget: str) -> None:
    """40 requests in a pool that is too small: aborted, preempted, long and short ones."""
    draw = random.Random(budget)
    options = {"compression_ratio": 0.7, "budget": budget}
    with engine(
        write_model(tmp_path), options, num_gpu_blocks_override=33, max_num_batched_tokens=200
    ) as compressed:
        scheduler = compressed.engine_core.engine_core.scheduler
        waiting = [(str(i), draw.randint(1, 700), draw.randint(1, 250)) for i in range(40)]
        alive: dict[str, int] = {}
        preempted = aborted = finished = 0
        while waiting or compressed.has_unfinished_requests():
            while waiting and draw.random() < 0.5:
                name, length, count = waiting.pop()
                prompt = tokens(length, seed=int(name))
                compressed.add_request(name, {"prompt_token_ids": prompt}, params(count))
                alive[name] = count
            if alive and draw.random() < 0.01:
                name = draw.choice(sorted(alive))
                compressed.abort_request([name])
                del alive[name]
                aborted += 1
            for output in compressed.step():
                if output.finished:
                    finished += 1
                    assert len(output.outputs[0].token_ids) == alive.pop(output.request_id)
            preempted += sum(r.num_preemptions > 0 for r in scheduler.waiting)
            check_pool(compressed)
        assert not alive and finished + aborted == 40
        assert aborted > 2 and preempted > 0
        assert pool(compressed).get_num_free_blocks() == 32
        assert BLOCK * 32 > 700
