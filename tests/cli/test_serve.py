"""``moekv serve`` without vLLM; with it: tests/integrations/vllm/test_serve.py."""

from typing import Any

import pytest

from moekv.cli.main import main
from moekv.integrations.vllm import serve


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)


@pytest.mark.usefixtures("no_vllm")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected vLLM 0.32.* beside moekv, got none: pip install vllm"),
        (["--budget", "head"], "expected budget among model, uniform, got 'head'"),
        (
            ["--compression-ratio", "1"],
            "compression_ratio in [0, 1), the share of bytes to remove, got 1.0",
        ),
    ],
)
def test_mistakes_come_before_vllm(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "model", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moekv serve: error: ") and error.count("\n") == 1
    assert message in error


def test_further_options_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    class Command:
        cmd = staticmethod(given.append)

    def parse(model: str, options: dict[str, Any], arguments: list[str]) -> tuple[Any, Any]:
        return Command, (model, options, list(arguments))

    monkeypatch.setattr(serve, "parse", parse)
    command = ["serve", "model", "--compression-ratio", "0.75", "--block-size", "32"]
    assert main(command) == 0
    options = {"compression_ratio": 0.75, "budget": "model", "interval": None}
    assert given == [("model", options, ["--block-size", "32"])]
