"""moekv beside vLLM: on if asked for, and as though it were not there if not."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import vllm
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm_engine import answers, engine, tokens, write_model

from moekv.integrations.vllm import manager, plugin

PROMPTS = [tokens(200), tokens(33, seed=1), tokens(5, seed=2)]


def test_vllm_finds_the_plugin() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="moekv")
    assert found.load() is plugin.register
    plugin.register()
    plugin.register()  # again does no harm


def test_without_the_option_moekv_is_not_there(tmp_path: Path) -> None:
    """Token for token what an engine answers that has never heard of moekv."""
    folder = write_model(tmp_path)
    with engine(folder, dtype="bfloat16") as plain:
        got = [list(each.token_ids) for each in answers(plain, PROMPTS)]
        runner = plain.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        layers = runner.compilation_config.static_forward_context.values()
        assert {type(layer.impl) for layer in layers} == {CPUAttentionBackendImpl}
        (group,) = runner.kv_cache_config.kv_cache_groups
        assert type(group.kv_cache_spec) is FullAttentionSpec
    script = (
        "import json, sys; from pathlib import Path\n"
        "from vllm_engine import answers, engine\n"
        "with engine(Path(sys.argv[1]), dtype='bfloat16') as plain:\n"
        "    got = [list(x.token_ids) for x in answers(plain, json.loads(sys.argv[2]))]\n"
        "assert 'moekv.integrations.vllm.manager' not in sys.modules\n"
        "print(json.dumps(got))"
    )
    helpers = str(Path(__file__).parents[2] / "helpers")
    done = subprocess.run(
        [sys.executable, "-c", script, folder, json.dumps(PROMPTS)],
        env=os.environ | {"VLLM_PLUGINS": "none", "PYTHONPATH": helpers},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == got


@pytest.mark.parametrize(
    ("version", "platform", "expected"),
    [
        ("0.33.0", True, "expected vLLM 0.32.*, got 0.33.0"),
        ("0.32.5", False, "expected vLLM on CPUs"),
    ],
)
def test_elsewhere_the_plugin_stays_off_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str,
    platform: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(type(vllm.platforms.current_platform), "is_cpu", lambda self: platform)
    caplog.set_level("WARNING", logger=plugin.logger.name)
    monkeypatch.setattr(plugin.logger.parent, "propagate", True)
    monkeypatch.setattr(manager, "register", lambda: pytest.fail("registered"))
    plugin.register()
    (said,) = {record.getMessage() for record in caplog.records if "moekv" in record.name}
    assert expected in said and "stays off" in said
