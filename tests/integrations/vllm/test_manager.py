"""vLLM's own block manager with moekv's spec and no model: what each block holds is noted."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus
from vllm_engine import BLOCK, tokens

from moekv.integrations.vllm.manager import CompressedSpec, CompressingManager, register
from moekv.integrations.vllm.options import Gap, ServingOptions, own_ratio

BLOCKS = 33  # one of which stands for those that have left
STEP = 200  # tokens
TEXT = tokens(700)
OPTIONS = ServingOptions(compression_ratio=0.7)


class Life:
    """Requests that come, are preempted, aborted, and end, in a pool that is too small.

    What stands in a block is either a text up to its end, or a part of one request.
    """

    def __init__(self, caching: bool, seed: int) -> None:
        register()
        init_none_hash(sha256)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.half)
        self.manager = KVCacheManager(
            KVCacheConfig(
                num_blocks=BLOCKS,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["a"], CompressedSpec.of(spec, OPTIONS))],
            ),
            max_model_len=1024,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            enable_caching=caching,
        )
        (self.own,) = self.manager.coordinator.single_type_managers
        self.draw = random.Random(seed)
        self.content: dict[int, Any] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.found = self.preempted = self.aborted = self.freed = 0

    def gap(self, request: Request) -> Gap | None:
        ratio = own_ratio(request.sampling_params.extra_args)
        return OPTIONS.gap(request.num_prompt_tokens, BLOCK, ratio)

    def request(self, name: int) -> Request:
        length, ratio = self.draw.randint(1, 700), self.draw.choice([None, None, 0.0, 0.4, 0.9])
        shared = self.draw.choice([0, length // 2, length])
        own = None if ratio is None else {"moekv": {"compression_ratio": ratio}}
        params = SamplingParams(max_tokens=self.draw.randint(1, 250), extra_args=own)
        if ratio is not None:
            params.skip_reading_prefix_cache = True  # as is seen to when a request comes
        return Request(
            request_id=str(name),
            prompt_token_ids=TEXT[:shared] + tokens(length - shared, seed=name + 1),
            sampling_params=params,
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )

    def run(self, requests: int) -> None:
        coming = [self.request(name) for name in range(requests)]
        while coming or self.waiting or self.running:
            while coming and self.draw.random() < 0.5:
                self.waiting.append(coming.pop())
            if self.running and self.draw.random() < 0.01:
                self.manager.free(self.running.pop(self.draw.randrange(len(self.running))))
                self.aborted += 1
            self.step()
            self.check()
        assert self.manager.block_pool.get_num_free_blocks() == BLOCKS - 1

    def step(self) -> None:
        """Give blocks as vLLM's scheduler does, and write into them."""
        left, scheduled = STEP, []
        for request in list(self.running):
            if request not in self.running or not left:
                continue
            count = min(left, request.num_tokens - request.num_computed_tokens)
            while self.manager.allocate_slots(request, count) is None:
                last = self.running.pop()
                self.manager.free(last)
                last.num_computed_tokens, last.status = 0, RequestStatus.PREEMPTED
                self.waiting.insert(0, last)
                self.preempted += 1
                if last is request:
                    break
            else:
                scheduled.append((request, request.num_computed_tokens, count))
                left -= count
        while self.waiting and left and len(self.running) < 8:
            request = self.waiting[0]
            blocks, hit, _ = self.manager.get_computed_blocks(request)
            count = min(left, request.num_tokens - hit)
            if self.manager.allocate_slots(request, count, hit, blocks) is None:
                break
            self.found += hit > 0
            self.running.append(self.waiting.pop(0))
            request.status = RequestStatus.RUNNING
            scheduled.append((request, hit, count))
            left -= count
        for request, begin, count in scheduled:
            if request in self.running:
                self.compute(request, begin, begin + count)

    def compute(self, request: Request, begin: int, end: int) -> None:
        """Check what a request reads, and write what it computes; then compress it."""
        blocks = [b.block_id for b in self.own.req_to_blocks[request.request_id]]
        text, gap, prompt = request.all_token_ids, self.gap(request), request.num_prompt_tokens
        name = request.request_id
        if compressed := gap is not None and begin >= prompt:
            assert not any(blocks[: gap.start])  # 0 stands for those that have left
        first = gap.start if compressed else 0
        for i, block in enumerate(blocks[first : -(-end // BLOCK)], first):
            if i < begin // BLOCK:
                expected = (name, i) if compressed else tuple(text[: (i + 1) * BLOCK])
                assert self.content.get(block) == expected, f"block {i} of {name}"
            else:
                whole = tuple(text[: min(end, (i + 1) * BLOCK)])
                self.content[block] = (name, i) if compressed else whole
        if gap is not None and begin < prompt <= end:
            for i, block in enumerate(blocks[gap.start :], gap.start):
                self.content[block] = (name, i)
        request.num_computed_tokens = end
        if end == request.num_tokens:
            request.append_output_token_ids(self.draw.randrange(3, 100))
            if request.num_output_tokens >= request.sampling_params.max_tokens:
                self.manager.free(request)
                self.running.remove(request)

    def check(self) -> None:
        """Check vLLM's pool against what its requests hold."""
        pool = self.manager.block_pool
        tables = self.own.req_to_blocks.values()
        held = Counter(b.block_id for own in tables for b in own if not b.is_null)
        assert {b.block_id: b.ref_cnt for b in pool.blocks if b.ref_cnt and not b.is_null} == held
        free = {b.block_id for b in pool.free_block_queue.get_all_free_blocks()}
        assert free.isdisjoint(held) and len(free) + len(held) == BLOCKS - 1
        assert len(free) == pool.get_num_free_blocks()
        assert self.own.req_to_blocks.keys() == {r.request_id for r in self.running}
        for request in self.running:
            if (gap := self.gap(request)) is not None:
                own = self.own.req_to_blocks[request.request_id][gap.start :]
                assert all(b.ref_cnt == 1 and b.block_hash is None for b in own)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_no_block_is_lost_or_written_by_two(caching: bool, seed: int) -> None:
    life = Life(caching, seed)
    life.run(200)
    assert life.aborted > 5 and life.preempted > 5
    assert (life.found > 20) == caching


def _reads_all(patch: pytest.MonkeyPatch) -> None:
    longest = vars(FullAttentionManager)["find_longest_cache_hit"]
    patch.setattr(CompressingManager, "find_longest_cache_hit", longest)


def _reads_when_it_comes_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        KVCacheManager, "prefix_cache_lookup_enabled", lambda self, request: self.enable_caching
    )


def _frees_one_more(patch: pytest.MonkeyPatch) -> None:
    remove = CompressingManager._remove_blocks_in_range
    patch.setattr(
        CompressingManager,
        "_remove_blocks_in_range",
        lambda self, name, first, last: remove(self, name, first, last + 1),
    )


@pytest.mark.parametrize("bug", [_reads_all, _reads_when_it_comes_back, _frees_one_more])
def test_faults_are_seen(
    monkeypatch: pytest.MonkeyPatch, bug: Callable[[pytest.MonkeyPatch], None]
) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        Life(True, 0).run(200)
