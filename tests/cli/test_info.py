"""``moekv info``: versions and backends."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch
from cli_cases import printed

import moekv
from moekv.cli import info
from moekv.cli.main import main


def test_info_shows_versions_and_why_a_backend_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["info"]) == 0
    out = printed(capsys)
    assert f"moekv {moekv.__version__}" in out
    assert f"torch {torch.__version__}" in out
    assert f"CPU kernels {moekv.ops.cpu_capability()}" in out
    for name, reason in moekv.ops.available_backends().items():
        assert f"{name} {'yes' if reason is None else 'no ' + reason}" in out


def test_info_without_kvpress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package == "kvpress":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["info"]) == 0
    assert re.search(r"kvpress +not installed", capsys.readouterr().out)


def test_info_reads_the_architectures_from_the_library(tmp_path: Path) -> None:
    library = tmp_path / "libmoekv_cuda.so"
    assert info.cuda_library(library) == "not built"
    library.write_bytes(b"\x7fELF\0moekv-cuda-architectures=80;90;120+PTX\0\xff")
    assert info.cuda_library(library) == "libmoekv_cuda.so  80;90;120+PTX"
