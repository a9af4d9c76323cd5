"""What importing moekv imports: nothing that takes long, before it is asked for."""

import subprocess
import sys

import pytest

import moekv


def imported(code: str) -> set[str]:
    """Modules in a fresh interpreter after some code."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_moekv_alone() -> None:
    modules = imported("import moekv; dir(moekv); moekv.__version__")
    assert {name for name in modules if name.startswith("moekv")} == {"moekv"}
    assert not modules & {"torch", "transformers", "kvpress"}


def test_the_ops_need_torch_alone() -> None:
    modules = imported("import moekv; moekv.ops.available_backends()")
    assert "torch" in modules
    assert not modules & {"transformers", "kvpress"}
    ours = {name for name in modules if name.startswith("moekv.")}
    assert ours == {"moekv.ops", "moekv.ops.reference", "moekv.ops.checks"}


def test_the_press_leaves_the_rest_alone() -> None:
    modules = imported("from moekv import MoERouterPress")
    unwanted = {
        "moekv.cli.main",
        "moekv.cli.demo",
        "moekv.models.loading",
        "moekv.cache.storage",
        "gguf",
        "rich",
    }
    assert not modules & (unwanted - imported("import kvpress"))


@pytest.mark.parametrize("name", moekv.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(moekv, name).__name__ == name
    assert name in dir(moekv)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'moekv' has no attribute 'nothing'"):
        _ = moekv.nothing
    with pytest.raises(ImportError, match="nothing"):
        exec("from moekv import nothing")
