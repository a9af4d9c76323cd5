"""The ops as a package for Hugging Face's ``kernels``: its layout, and that it works by itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import kernels_package  # noqa: E402

USE = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_moekv_cpu_1", sys.argv[1])
for _ in range(2):  # a second load finds the ops and leaves them
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
scores = torch.tensor([[[3.0, 1.0, 2.0, 5.0]]])
indices, offsets = module.select_kept(scores, None, total=[2], sinks=0, window=0, floor=1)
print(indices.tolist(), offsets.tolist(), "moekv" in sys.modules)
"""


def test_the_module_is_the_ops(tmp_path: Path) -> None:
    (folder,) = kernels_package.build(kernels_package.LIBRARIES, tmp_path, None)
    assert folder.parent == tmp_path / "build" and "-cpu-" in folder.name
    done = subprocess.run(
        [sys.executable, "-c", USE, str(folder / "__init__.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,  # from here moekv cannot be imported by chance
    )
    assert done.stdout == "[0, 3] [0, 2] False\n", done.stderr


def test_a_variant_for_cuda_has_both_libraries(tmp_path: Path) -> None:
    (tmp_path / "libmoekv_cpu.so").write_text("")
    (tmp_path / "libmoekv_cuda.so").write_bytes(b"\0moekv-cuda-architectures=80 90 120 +PTX\0")
    cpu, cuda = kernels_package.build(tmp_path, tmp_path / "out", "130")
    assert cuda.name == cpu.name.replace("-cpu-", "-cu130-")
    assert sorted(x.name for x in cuda.iterdir()) == [
        "__init__.py",
        "libmoekv_cpu.so",
        "libmoekv_cuda.so",
        "metadata.json",
    ]
    # The schemas are in the first.
    text = (cuda / "__init__.py").read_text()
    assert "['libmoekv_cpu.so', 'libmoekv_cuda.so']" in text
    told = [json.loads((x / "metadata.json").read_text()) for x in (cpu, cuda)]
    assert [x["backend"]["type"] for x in told] == ["cpu", "cuda"]
    assert told[1]["backend"]["archs"] == ["8.0+PTX", "9.0", "12.0+PTX"]
    assert told[0]["id"] != told[1]["id"] and told[0]["name"] == "moekv"


def test_a_library_that_names_no_architectures(tmp_path: Path) -> None:
    for name in ("libmoekv_cpu.so", "libmoekv_cuda.so"):
        (tmp_path / name).write_text(name)
    with pytest.raises(ValueError, match="expected a CUDA library that names its architectures"):
        kernels_package.build(tmp_path, tmp_path / "out", "130")


def test_the_architectures_are_those_of_the_library_here() -> None:
    library = kernels_package.LIBRARIES / "libmoekv_cuda.so"
    if not library.exists():
        pytest.skip("no CUDA library was built")
    archs = kernels_package.architectures(library)
    assert archs[0].endswith("+PTX") and all(x[-1].isdigit() for x in archs[1:-1])


def test_kernels_loads_it(tmp_path: Path) -> None:
    kernels = pytest.importorskip("kernels")
    kernels_package.build(kernels_package.LIBRARIES, tmp_path, None)
    assert callable(kernels.get_local_kernel(tmp_path).select_kept)
