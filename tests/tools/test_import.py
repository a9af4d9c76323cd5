"""What importing moekv imports: nothing that takes long, before it is asked for."""

import subprocess
import sys

import pytest
from peers import HAS_KVPRESS

import moekv


def imported(code: str) -> set[str]:
    """Modules in a fresh interpreter after some code."""
    code = f"import sys; before = set()\n{code}\nprint(*set(sys.modules) - before)"
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
    assert all(name.startswith("moekv.ops.") for name in ours - {"moekv.ops"})


WITHOUT_KVPRESS = """
import sys

sys.modules["kvpress"] = None  # as where it is not installed

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import moekv
from moekv import *

names = [name for name in moekv.__all__ if name != "ragged"]
assert all(getattr(moekv, name) for name in names)
assert MoERouterPress.__module__ == "moekv.press.press"
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, eos_token_id=None,
)
model = LlamaForCausalLM(config).eval()
model.generation_config.eos_token_id = None
ids = torch.arange(3, 43)[None]
for options in ({}, {"num_experts": 4}, {"budget": "uniform"}, {"streaming": True}):
    press = MoERouterPress(0.5, **options)
    cache = DynamicCache()
    with press(model):
        model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert press.get_stats()["compression"]["ratio"] == 0.5
    assert cache.get_seq_length() == 43
assert sys.modules["kvpress"] is None
try:
    moekv.ragged(press)
except ImportError as error:
    print(error)
"""


def test_everything_but_its_presses_works_without_kvpress() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KVPRESS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout and "kvpress" in done.stdout


def test_the_press_leaves_the_rest_alone() -> None:
    kvpress = "import kvpress; before = set(sys.modules)\n" if HAS_KVPRESS else ""
    modules = imported(f"{kvpress}from moekv import MoERouterPress")
    unwanted = {
        "moekv.cli.main",
        "moekv.cli.demo",
        "moekv.models.loading",
        "moekv.cache.storage",
        "gguf",
        "rich",
    }
    assert not modules & unwanted


@pytest.mark.parametrize("name", moekv.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(moekv, name).__name__ == name
    assert name in dir(moekv)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'moekv' has no attribute 'nothing'"):
        _ = moekv.nothing
    with pytest.raises(ImportError, match="nothing"):
        exec("from moekv import nothing")
