"""What moekv inside vLLM refuses, before anything runs."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm_engine import BLOCK, CONFIGS, answers, blocks_in_use, engine, tokens, write_model

from moekv.cli.main import main
from moekv.integrations.vllm import serve
from moekv.integrations.vllm.builder import CompressingBuilder
from moekv.integrations.vllm.heads import Compressed, HeadStep
from moekv.integrations.vllm.options import Gap, ServingOptions
from moekv.integrations.vllm.pages import Pages
from moekv.integrations.vllm.plugin import check_version
from moekv.integrations.vllm.refusals import check_engine, check_layer
from moekv.integrations.vllm.requests import Request
from moekv.integrations.vllm.scheduler import CompressingScheduler, SchedulerChoice


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compression_ratio": 1.0}, ValueError, r"compression_ratio in \[0, 1\).* got 1.0"),
        ({"compression_ratio": "0.5"}, TypeError, "a number, got str"),
        ({"budget": "head"}, ValueError, "budget among model, uniform, got 'head'"),
        ({"sinks": -1}, ValueError, "sinks an integer from 0 to 16, got -1"),
        ({"recent": True}, ValueError, "recent an integer from 0 to 16, got True"),
        ({"ratio": 0.5, "pairs": 8}, ValueError, "options among .*budget.*, got ratio, pairs"),
        ({"interval": 8}, ValueError, "interval None or an integer from 32 on, got 8"),
        (0.5, TypeError, "a mapping of options, got 0.5"),
    ],
)
def test_options_in_vllm(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ServingOptions.read({"moekv": options})


def test_an_engine_with_wrong_options_does_not_start(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="moekv options among"),
        engine(write_model(tmp_path), {"ratio": 0.5}),
    ):
        pass


def an_engine(**changes: Any) -> Any:
    """The configuration of an engine that can be served, but for some changes."""
    window = changes.pop("window", None)
    text = SimpleNamespace(rope_parameters={"rope_type": changes.pop("rope", "default")})
    config = {
        "model_config": SimpleNamespace(
            hf_config=SimpleNamespace(architectures=[changes.pop("model", "LlamaForCausalLM")]),
            hf_text_config=text,
            get_sliding_window=lambda: window,
            enable_prompt_embeds=changes.pop("embeds", False),
        ),
        "use_v2_model_runner": changes.pop("v2", False),
        "cache_config": SimpleNamespace(
            cache_dtype=changes.pop("pairs", "auto"), enable_prefix_caching=True
        ),
        "speculative_config": changes.pop("speculative", None),
        "kv_transfer_config": changes.pop("connector", None),
        "parallel_config": SimpleNamespace(**changes),
    }
    return SimpleNamespace(**config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "DeepseekV3ForCausalLM"}, "a model among Llama.*, got DeepseekV3ForCausalLM"),
        ({"window": 64}, "full attention in every layer, got sliding windows of 64"),
        ({"rope": "dynamic"}, "rope_type among .*, got 'dynamic'"),
        ({"pairs": "fp8_e4m3"}, "kv_cache_dtype 'auto', got 'fp8_e4m3'"),
        ({"speculative": object()}, "expected no speculative decoding"),
        ({"connector": object()}, "expected no KV connector"),
        ({"embeds": True}, "expected prompts of tokens, got enable_prompt_embeds"),
        ({"v2": True}, "expected vLLM's model runner V1, got V2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size 1, got 2"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size 1, got 2"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size 1, got 2"),
    ],
)
def test_engines_that_cannot_be_served(change: dict[str, Any], message: str) -> None:
    check_engine(an_engine(data_parallel_size=2, tensor_parallel_size=2), ServingOptions())
    with pytest.raises(ValueError, match=f"^moekv: expected.*{message.removeprefix('expected ')}"):
        check_engine(an_engine(**change), ServingOptions())


def test_intervals_with_prefix_caching() -> None:
    with pytest.raises(ValueError, match="^moekv: expected enable_prefix_caching=False with inter"):
        check_engine(an_engine(), ServingOptions(interval=64))


@pytest.mark.parametrize("name", ["mistral_windows"])
def test_models_with_windows_do_not_start(tmp_path: Path, name: str) -> None:
    assert name in CONFIGS
    with (
        pytest.raises(ValueError, match="expected full attention in every layer"),
        engine(write_model(tmp_path, name), {}),
    ):
        pass


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes", "sliding_window"])
def test_layers_that_cannot_be_served(name: str) -> None:
    check_layer(name, None)
    with pytest.raises(ValueError, match=f"moekv: expected attention without {name}, got 3"):
        check_layer(name, 3)


def sort_tokens_100_to_150(rows: dict[int, Request]) -> Any:
    """What a worker makes of a step's part of one request."""
    builder = CompressingBuilder.__new__(CompressingBuilder)
    builder.block_size, builder.requests = BLOCK, SimpleNamespace(rows=rows)
    step = SimpleNamespace(
        num_reqs=1,
        seq_lens=torch.tensor([150]),
        query_start_loc=torch.tensor([0, 50]),
        block_table_tensor=torch.arange(8)[None],
    )
    worker = SimpleNamespace(options=ServingOptions(), forget=lambda blocks: None)
    return builder._sort(worker, step)


def test_a_request_from_elsewhere() -> None:
    """As a KV connector would bring it."""
    blocks = torch.tensor([1, 2, 3])
    stranger = Compressed(0, slice(0, 1), 90, blocks, Gap(1, 2), None)
    cache = torch.zeros(4, 2, BLOCK, 64)
    with pytest.raises(RuntimeError, match="prompt was compressed in this process, got another"):
        HeadStep.of([stranger], Pages([cache], "vec"), {})
    with pytest.raises(RuntimeError, match="vLLM to tell the tokens of each prompt, got none"):
        sort_tokens_100_to_150({})


def test_another_scheduler() -> None:
    given = SimpleNamespace(scheduler_cls=None)
    config = SimpleNamespace(additional_config={}, scheduler_config=given)
    SchedulerChoice.verify_and_update_config(config)
    assert given.scheduler_cls is None
    config.additional_config = {"moekv": {}}
    SchedulerChoice.verify_and_update_config(config)
    assert resolve_obj_by_qualname(given.scheduler_cls) is CompressingScheduler
    with pytest.raises(ValueError, match="^moekv: expected vLLM's own scheduler, got .*Compr"):
        SchedulerChoice.verify_and_update_config(config)
    # As another one would do it.
    with pytest.raises(
        RuntimeError, match="a step that ends after 120 tokens .* got one up to 150"
    ):
        sort_tokens_100_to_150({0: Request(120, None)})


def test_serve_without_vllm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert main(["serve", "a-model"]) == 2
    assert "expected vLLM 0.32.* beside moekv, got none" in capsys.readouterr().err


def test_another_version_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    check_version()
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(RuntimeError, match=r"expected vLLM 0\.32\.\*, .* got 0\.33\.1"):
        check_version()


def test_prompts_shorter_than_what_could_leave(tmp_path: Path) -> None:
    """They are left alone."""
    prompts = [tokens(n, seed=n) for n in (1, 31, 32, 33, 63)]
    folder = write_model(tmp_path)
    with engine(folder) as plain:
        expected = [each.token_ids for each in answers(plain, prompts)]
    with engine(folder, {"compression_ratio": 0.9}) as compressed:
        assert [each.token_ids for each in answers(compressed, prompts)] == expected
        assert blocks_in_use(compressed) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--compression-ratio", "1.5"], r"compression_ratio in \[0, 1\)"),
        (["--budget", "head"], "budget among model, uniform"),
        (["--additional-config", '{"moekv": {}}'], "moekv's options as options"),
    ],
)
def test_what_serve_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert main(["serve", "a-model", *given]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("moekv serve: error: expected") and re.search(message, said)
