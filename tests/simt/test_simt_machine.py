"""The simulator itself: what is right runs as on a GPU, what is wrong is reported."""

import re
from collections.abc import Callable

import pytest
import simulated_kernels as built
import torch

SelfTest = Callable[..., torch.Tensor]
SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_collectives(selftest: SelfTest, seed: int) -> None:
    lane = torch.arange(32)
    segment = lane // 16 * 16
    expected = [
        torch.full((32,), 15),
        lane // 8 * 8 + (lane + 1) % 8,
        torch.where(lane < 3, lane, lane - 3),
        torch.where(lane + 3 >= segment + 16, lane, lane + 3),
        lane ^ 9,
        torch.full((32,), sum(1 << i for i in range(0, 32, 3))),
        torch.ones(32),
        torch.zeros(32),
        torch.full((32,), sum(range(32)) - 20 * 32),
        torch.full((32,), -9),
        torch.full((32,), 7),
        torch.where(lane < 16, sum(range(16)), sum(range(16, 32))),
        torch.full((32,), 11),
    ]
    got = selftest("collectives", torch.zeros(13, 32, dtype=torch.int32), seed)
    for row, want in zip(got, expected, strict=True):
        assert torch.equal(row, want.long().to(torch.int32))


@pytest.mark.parametrize("seed", SEEDS)
def test_scan(selftest: SelfTest, seed: int) -> None:
    data = torch.randint(100, (4, 256)).float()
    assert torch.equal(selftest("scan<true>", data, seed), data.cumsum(1))


@pytest.mark.parametrize("seed", SEEDS)
def test_transpose(selftest: SelfTest, seed: int) -> None:
    data = torch.randn(32, 32)
    assert torch.equal(selftest("transpose<33>", data, seed), data.T)


@pytest.mark.parametrize(
    ("name", "dtype"), [("__half", torch.float16), ("__nv_bfloat16", torch.bfloat16)]
)
def test_multiply(selftest: SelfTest, name: str, dtype: torch.dtype) -> None:
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    data = torch.cat([x.view(torch.int32).flatten() for x in (a, b, d)])
    got = selftest(f"multiply<{name}>", data)
    expected = d.double() + a.double() @ b.double()
    torch.testing.assert_close(got[192:].view(torch.float32).view(16, 8), expected.float())


@pytest.mark.parametrize("seed", SEEDS)
def test_async_copies(selftest: SelfTest, seed: int) -> None:
    data = torch.randn(8 * 128)
    assert torch.equal(selftest("stream<true>", data, seed), data * 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_hand_over(selftest: SelfTest, seed: int) -> None:
    got = selftest("hand_over<true, true>", torch.zeros(52, dtype=torch.int32), seed)
    assert got.tolist() == [*range(50), sum(range(50)), 50]


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_take_turns(selftest: SelfTest, seed: int) -> None:
    value = 0
    for ticket in range(60):
        value = (value * 3 + ticket) % 2**32
    got = selftest("take_turns", torch.zeros(3, dtype=torch.int32), seed)
    assert got.tolist()[:2] == [60, 60]
    assert got[2].item() % 2**32 == value


@pytest.mark.parametrize(("name", "passes"), [("transpose<33>", 1), ("transpose<32>", 32)])
def test_traffic_of_shared_memory(kernels, selftest: SelfTest, name: str, passes: int) -> None:
    kernels.count_traffic(True)
    try:
        selftest(name, torch.randn(32, 32))
        traffic = {x[2:4]: x[4:] for x in kernels.take_traffic() if x[0] == name}
    finally:
        kernels.count_traffic(False)
    rows = {"bytes": 4096, "units": 128, "least": 128}  # 32 rows of 4 sectors
    assert traffic["global", "read"] == traffic["global", "write"] == tuple(rows.values())
    assert traffic["shared", "write"] == (4096, 32, 32)
    assert traffic["shared", "read"] == (4096, 32 * passes, 32)


def test_old_values(selftest: SelfTest) -> None:
    """A `volatile` load may get what was there before, until a fence tells of the news."""
    right, wrong = (
        [selftest(name, torch.zeros(25, dtype=torch.int32), seed)[12:24].tolist() for seed in SEEDS]
        for name in ("pass_on<true>", "pass_on<false>")
    )
    expected = list(range(1, 13))
    assert right == [expected] * len(SEEDS)
    assert sum(got != expected for got in wrong) > len(SEEDS) / 2


def test_conversions(selftest: SelfTest) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    # Every neighbourhood of every number: halfway, and a little to both sides.
    exact = bits.view(torch.float16).float()
    between = exact + exact.abs() * torch.tensor([0.0, 2.0**-12, 2.0**-11, 3.1e-4]).repeat(16384)
    wide = torch.randint(2**32, (65536,)).to(torch.int32).view(torch.float32)
    got = selftest("convert", torch.cat([exact, between, exact, wide])).view(4, -1)
    equal = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(got[0], exact, **equal)
    torch.testing.assert_close(got[1], between.half().float(), **equal)
    torch.testing.assert_close(got[2], bits.view(torch.bfloat16).float(), **equal)
    torch.testing.assert_close(got[3], wide.bfloat16().float(), **equal)


def test_numerics_are_not_those_of_the_host(selftest: SelfTest) -> None:
    """Products and sums are contracted, 2^x is off by up to two units in the last place."""
    x, y = torch.randn(2, 1024)
    empty = torch.zeros(1024)
    got = selftest("numerics", torch.cat([x, y, x * y, empty, empty])).view(5, 1024)
    rest = (x.double() * y.double() - (x * y).double()).float()
    assert torch.equal(got[3], rest if built.HAS_FMA else empty)
    exact = x.double().exp2().float()
    steps = got[4].view(torch.int32) - exact.view(torch.int32)
    assert steps.abs().max() <= 3 and (steps != 0).float().mean() > 0.5


@pytest.mark.parametrize(
    ("name", "dtype"), [("__half", torch.float16), ("__nv_bfloat16", torch.bfloat16)]
)
def test_tensor_cores_cut_off(selftest: SelfTest, name: str, dtype: torch.dtype) -> None:
    a, b, d = torch.rand(16, 16).to(dtype), torch.rand(16, 8).to(dtype), torch.rand(16, 8)
    data = torch.cat([x.view(torch.int32).flatten() for x in (a, b, d)])
    got = selftest(f"multiply<{name}>", data)[192:].view(torch.float32).view(16, 8)
    exact = a.double() @ b.double() + d.double()
    assert (got <= exact).all() and (got < exact.float()).float().mean() > 0.25
    torch.testing.assert_close(got.double(), exact, rtol=16 * 2**-23, atol=0)


WRONG = {
    "scan<false>": r"that nobody has written in shared memory|shared memory .* races with",
    "no_syncwarp": r"shared memory .* races with",
    "same_word": r"shared memory .* races with",
    "stream<false>": r"that nobody has written in shared memory|shared memory .* races with",
    "hand_over<false, true>": r"global memory .* races with .* of block \(\d+, 0, 0\)",
    "hand_over<true, false>": r"global memory .* races with .* of block \(\d+, 0, 0\)",
    "divergent_barrier": r"__syncthreads at selftest.cu:\d+ while .* is in another one",
    "barrier_after_exit": r"have exited|exits while .* waits in __syncthreads",
    "barrier_in_branch": r"exits while thread .* waits in __syncthreads at|have exited",
    "lane_elsewhere": r"__ballot_sync at .*__syncthreads|__syncthreads at .*__ballot_sync",
    "lane_exited": r"lane 7 never reaches|\(7, 0, 0\): exits while",
    "not_in_mask": r"thread \(31, 0, 0\): is not in the mask of its own __ballot_sync",
    "other_mask": r"mask 0xff.* mask 0xff",
    "other_collective": r"__(any|ballot)_sync at .* while .* in __(any|ballot)_sync at",
    "source_not_in_mask": r"lane 15 reads from lane 16, which mask 0xffff leaves out",
    "circle": r"no thread can go on: .* \(mask 0x\d\)",
    "misaligned": r"misaligned access",
    "misaligned_copy": r"copy of 16 bytes at the misaligned address",
    "dynamic_overrun": r"a write of 4 bytes out of the bounds of shared memory",
    "static_overrun": r"a write of 4 bytes out of the bounds of shared memory",
    "read_overrun": r"thread \(63, 0, 0\): a read of 4 bytes out of the bounds of global memory",
    "write_overrun": r"thread \(63, 0, 0\): a write of 4 bytes out of the bounds of global memory",
    "never_written": r"\(63, 0, 0\): a read of 4 bytes that nobody has written in shared memory",
    "spin": r"run on without progress",
    "constant_written": r"read-only cache .* that the same kernel writes",
    "no_dynamic_memory": r"of which the launch asked for none",
    "too_many_threads": r"expected 1 to 1024 threads in a block, got \(1056, 1, 1\)",
    "no_blocks": r"expected a grid of 1 to",
    "too_much_shared": r"expected at most 101376 bytes of dynamic shared memory, got 102400",
    "zero_overrun": r"cudaMemsetAsync leaves the memory",
    "host_reads": r"the host does a read of 4 bytes of device memory",
}
IN_KERNEL = [name for name in WRONG if name not in list(WRONG)[-5:]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_reported(kernels, selftest: SelfTest, name: str, seed: int) -> None:
    with pytest.raises(kernels.Error, match=re.compile(WRONG[name], re.DOTALL)) as error:
        selftest(name, torch.zeros(1024, dtype=torch.int32), seed)
    if name in IN_KERNEL:
        assert re.match(r"kernel \w+.*, block \(\d+, 0, 0\)[,:]", str(error.value))


def test_a_race_is_told_with_both_places(kernels, selftest: SelfTest) -> None:
    with pytest.raises(kernels.Error) as error:
        selftest("same_word", torch.zeros(64, dtype=torch.int32))
    assert re.search(
        r"thread \(\d+, 0, 0\): a \w+ of shared memory .* by thread \(\d+, 0, 0\)", str(error.value)
    )
    assert len(re.findall(r"same_word.* at .*selftest\.cu:\d+", str(error.value))) == 2


def test_a_report_does_not_outlive_its_launch(kernels, selftest: SelfTest) -> None:
    data = torch.arange(256.0).repeat(4, 1)
    with pytest.raises(kernels.Error):
        selftest("scan<false>", data)
    assert torch.equal(selftest("scan<true>", data), data.cumsum(1))
