"""What is built from an sdist, and against which torch."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import build_backend
import pytest
import torch
from setuptools.errors import SetupError

import moekv

ROOT = Path(__file__).parents[2]


def _build(out: Path, *options: str) -> Path:
    # Not optimised, for speed: what is tested is that it builds, not what it computes.
    fast = {"MOEKV_CUDA": "OFF", "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options]
    done = subprocess.run([*command, str(ROOT)], env=os.environ | fast, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of this tree, and a wheel built from that sdist: a minute."""
    return _build(tmp_path_factory.mktemp("dist"))


def _files(folder: str, pattern: str = "*") -> set[str]:
    paths = (ROOT / folder).rglob(pattern)
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_sdist_has_the_sources(tmp_path: Path) -> None:
    (path,) = _build(tmp_path, "--sdist").glob("*.tar.gz")
    assert path.name == f"moekv-{moekv.__version__}.tar.gz"
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = _files("cmake") | _files("csrc") | _files("tests", "*.py") | _files("tools", "*.py")
    assert sources | {"CMakeLists.txt", "Makefile", "LICENSE", ".ci/run"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.thorough
def test_the_wheel_is_for_any_python_and_holds_the_library(built: Path) -> None:
    (path,) = built.glob("*.whl")
    assert path.name.startswith(f"moekv-{moekv.__version__}-py3-none-linux")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (tags,) = (wheel.read(n).decode() for n in wheel.namelist() if n.endswith("/WHEEL"))
    expected = _files("moekv", "*.py") | _files("moekv", "*.html") | _files("moekv/data")
    expected.add("moekv/py.typed")
    assert names == expected | {"moekv/lib/libmoekv_cpu.so"}
    assert "Root-Is-Purelib: false" in tags


@pytest.mark.thorough
def test_the_library_of_the_wheel_loads(built: Path, tmp_path: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(tmp_path)
    code = (
        "import torch; from moekv import ops;"
        "print(ops.__file__, ops.available_backends()['cpu'],"
        " ops.select_kept(torch.eye(3)[None], total=4).indices.tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split(" ", 1) == [f"{tmp_path}/moekv/ops/__init__.py", "None [0, 1, 1, 2]\n"]


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {moekv.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_builds_against_the_torch_that_is_there() -> None:
    assert build_backend.find_torch() == Path(torch.__file__).parent
    assert "torch" not in "".join(build_backend.get_requires_for_build_wheel())
    assert "torch" not in "".join(build_backend.get_requires_for_build_editable())


def test_asks_for_a_torch_where_none_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    # As a version, 2.9 is older than 2.10, and 99 newer than any.
    monkeypatch.setattr(build_backend, "TORCH_FLOOR", "99")
    assert build_backend.find_torch() is None
    assert "torch>=99" in build_backend.get_requires_for_build_wheel()
    assert "torch>=99" in build_backend.get_requires_for_build_editable()
    monkeypatch.setattr(build_backend, "TORCH_FLOOR", "2.9")
    assert build_backend.find_torch() is not None


@pytest.mark.parametrize(
    ("asked", "built"),
    [
        (None, []),
        ("", []),
        ("8.0", ["-DMOEKV_CUDA_ARCHITECTURES=80"]),
        ("12.0 9.0a;8.0+PTX;8.0", ["-DMOEKV_CUDA_ARCHITECTURES=80;90a;120"]),
    ],
)
def test_gpus_are_those_of_torch_s_variable(
    asked: str | None, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert build_backend.architectures() == built


@pytest.mark.parametrize("asked", ["Hopper", "80", "8.0;native", "8.0+ptx"])
def test_other_names_of_gpus_are_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(SetupError, match=r"expected compute capabilities such as 8\.0;9\.0"):
        build_backend.architectures()


def test_a_missing_compiler_is_said_in_a_line(tmp_path: Path) -> None:
    env = os.environ | {"CXX": "no-such-compiler", "PYTHONPATH": str(ROOT / "tools")}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: building moekv needs a C++20 compiler, got none (no-such-comp")
    assert not list(tmp_path.iterdir())


def test_a_wrong_choice_of_cuda_is_an_error(tmp_path: Path) -> None:
    env = os.environ | {"MOEKV_CUDA": "MAYBE", "PYTHONPATH": str(ROOT / "tools")}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "MOEKV_CUDA: expected AUTO, ON or OFF, got 'MAYBE'" in done.stderr
