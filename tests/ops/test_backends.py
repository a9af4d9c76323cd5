"""Which backend runs, and what is said where one cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import op_cases
import pytest
import torch

import moekv
from moekv import ops
from moekv.ops import backends, reference

PACKAGE = Path(moekv.__file__).parent
CAPABILITIES = ("default", "avx2", "avx512", "amx")


def python(
    *arguments: str, moekv_in: Path = PACKAGE.parent, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=moekv_in,
        env=os.environ | {"PYTHONPATH": str(moekv_in), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def copy_of_package(folder: Path) -> Path:
    """The Python part of moekv, without its libraries."""
    shutil.copytree(PACKAGE, folder / "moekv", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return folder


def ops_alone(folder: Path, library: Path | None = None) -> Path:
    """What the ops need of moekv, which is quicker to import than all of it."""
    package = folder / "moekv"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copytree(PACKAGE / "ops", package / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    if library:
        (package / "lib").symlink_to(library)
    return folder


def gate(backend: str, device: str = "cpu") -> ops.GatingTopk:
    return ops.gating_topk(torch.zeros(3, 4, device=device), k=2, backend=backend)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability, tmp_path):
    """All cases on the kernels of one instruction set: a process chooses its set once."""
    best = ops.cpu_capability()
    assert best in CAPABILITIES
    if CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        pytest.skip(f"the best instruction set here is {best}")
    result = python(
        op_cases.__file__,
        moekv_in=ops_alone(tmp_path, PACKAGE / "lib"),
        MOEKV_CPU_CAPABILITY=capability,
    )
    assert result.returncode == 0, f"{result.stdout[-200:]}{result.stderr}"


def test_unknown_instruction_set(tmp_path):
    code = "from moekv import ops; ops.cpu_capability()"
    folder = ops_alone(tmp_path, PACKAGE / "lib")
    result = python("-c", code, moekv_in=folder, MOEKV_CPU_CAPABILITY="avx1024")
    assert "expected MOEKV_CPU_CAPABILITY to be default, avx2, avx512 or amx, got" in result.stderr
    assert "avx1024" in result.stderr


def test_available_backends():
    backends = ops.available_backends()
    assert tuple(backends) == ops.BACKENDS
    assert backends["auto"] is backends["torch"] is backends["cpu"] is None
    cuda = backends["cuda"]
    assert cuda is None or len(cuda) > 20
    if torch.version.cuda is None:
        assert "not a CUDA build" in cuda


def test_check_backend():
    for name, reason in ops.available_backends().items():
        if reason is None:
            ops.check_backend(name)
        else:
            with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: "):
                ops.check_backend(name)
    with pytest.raises(ValueError, match="one of auto, cpu, cuda, torch, got 'tpu'"):
        ops.check_backend("tpu")


def test_auto_takes_the_native_kernels(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("not the native op")

    monkeypatch.setattr(reference, "gating_topk", forbidden)
    gate("auto")
    gate("cpu")
    with pytest.raises(AssertionError):
        gate("torch")


def test_why_there_is_no_cuda(monkeypatch, tmp_path):
    """Each reason in turn, from what is missing first to what is missing last."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is not a CUDA build; install one" in backends._load_cuda(None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "_CUDA_LIBRARY", tmp_path / "libmoekv_cuda.so")
    reason = backends._load_cuda(None)
    assert "libmoekv_cuda.so has not been built; build it where nvcc is" in reason
    assert "MOEKV_CUDA=ON" in reason
    backends._CUDA_LIBRARY.write_bytes(b"not a library")
    assert "libmoekv_cuda.so does not load with torch" in backends._load_cuda(None)
    assert backends._load_cuda("no CPU library") == "no CPU library"  # it holds the schemas

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(backends.FAILURES, "cuda", None)
    reason = "torch finds no CUDA device; check the driver and CUDA_VISIBLE_DEVICES"
    assert ops.available_backends()["cuda"] == reason
    with pytest.raises(RuntimeError, match=f"backend 'cuda' is not available: {reason}"):
        ops.check_backend("cuda")
    monkeypatch.setitem(backends.FAILURES, "cuda", "it has not been built")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: it has not been"):
        gate("cuda")


def test_unknown_backend():
    with pytest.raises(ValueError, match="one of auto, cpu, cuda, torch, got 'tpu'"):
        gate("tpu")


def test_tensors_elsewhere():
    with pytest.raises(ValueError, match="moekv::gating_topk: backend 'cpu' .* on cpu, got meta"):
        gate("cpu", "meta")
    if ops.available_backends()["cuda"] is None:
        with pytest.raises(ValueError, match="backend 'cuda' expected tensors on cuda, got cpu"):
            gate("cuda")
    else:
        with pytest.raises(RuntimeError, match="backend 'cuda' is not available: "):
            gate("cuda")


def test_other_devices_take_pytorch():
    assert gate("auto", "meta").weights.shape == (3, 2)


WITHOUT_LIBRARY = """
import torch
from moekv import ops
from moekv.ops import backends, reference

reason = ops.available_backends()["cpu"]
print(reason)
assert ops.available_backends()["torch"] is ops.available_backends()["auto"] is None
assert ops.cpu_capability() is None
ops.gating_topk(torch.zeros(3, 4), k=2, backend="torch")  # asked for: no warning
for _ in range(2):
    assert ops.gating_topk(torch.zeros(3, 4), k=2).experts.tolist() == [[0, 1]] * 3
try:
    ops.gating_topk(torch.zeros(3, 4), k=2, backend="cpu")
except RuntimeError as error:
    assert str(error) == f"backend 'cpu' is not available: {reason}"
else:
    raise AssertionError("the CPU backend without a library")
"""


def test_library_not_built(tmp_path):
    result = python("-c", WITHOUT_LIBRARY, moekv_in=copy_of_package(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("UserWarning: moekv runs on plain PyTorch") == 1
    assert "libmoekv_cpu.so has not been built; run `pip install .`" in result.stderr
    assert "libmoekv_cpu.so has not been built; run `pip install .`" in result.stdout


def test_library_does_not_load(tmp_path):
    library = ops_alone(tmp_path) / "moekv" / "lib" / "libmoekv_cpu.so"
    library.parent.mkdir()
    library.write_bytes(b"not a library")
    result = python("-c", WITHOUT_LIBRARY, moekv_in=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "libmoekv_cpu.so does not load with torch" in result.stdout
