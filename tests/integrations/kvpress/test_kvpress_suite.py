"""kvpress's own test suite, with MoERouterPress as the press in its lists."""

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
from kvpress_suite import fill_hub

ROOT = Path(__file__).resolve().parents[3]
HELPERS = ROOT / "tests" / "helpers"

FROM_THE_HUB = "test_load_stats", "test_load_qfilters", "test_load_attention_pattern"
"""Tests that ask the hub for more than a model."""

OF_ITS_MODELS = (
    "test_pipeline.py::test_pipeline",
    "test_pipeline.py::test_pipeline_single_or_no_question",
    "test_pipeline.py::test_pipeline_answer_is_correct",
    "test_pipeline.py::test_pipeline_compresses_context",
    "test_pipeline.py::test_pipeline_only_computes_the_logits_it_needs",
    "presses/test_block_press.py::test_block_press_is_streaming_top_k",
)
"""Tests of kvpress's own presses, not of ours, that want more than this model: they count another
tokenizer's tokens, want a right answer, or weights that were trained."""


def suite() -> Path:
    """Fetch the source distribution of the kvpress that is installed, once."""
    name = f"kvpress-{version('kvpress')}"
    folder = ROOT / "build" / name
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(folder.parent), name.replace("-", "==")]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            pytest.skip(f"no source distribution of kvpress to be had: {ran.stderr[-300:]}")
        with tarfile.open(f"{folder}.tar.gz") as archive:
            archive.extractall(folder.parent, filter="data")
    return folder


@pytest.mark.thorough
def test_all_pass_with_our_press(tmp_path: Path) -> None:
    folder = suite()
    fill_hub(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "kvpress_suite", "-rfEs", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-k", " and ".join(f"not {x}" for x in FROM_THE_HUB)]
    paths = os.pathsep.join([str(HELPERS), str(folder), str(ROOT)])
    ran = subprocess.run(
        [*command, "--ignore", "tests/integration", "tests"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = set(re.findall(r"^(?:FAILED|ERROR) tests/([^\s\[]+)", ran.stdout, re.MULTILINE))
    assert failed <= set(OF_ITS_MODELS), ran.stdout[-6000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None and int(passed[1]) > 100, ran.stdout[-2000:]
