"""`moekv serve`: the OpenAI-compatible server, in processes of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress

import pytest
from vllm_engine import write_model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one over a tiny model."""
    folder = write_model(tmp_path_factory.mktemp("model"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moekv", "serve", str(folder), "--compression-ratio", "0.75"]
    vllm = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    vllm += ["--enforce-eager", "--block-size", "32", "--max-model-len", "1024"]
    vllm += ["--num-gpu-blocks-override", "65"]
    log = folder / "log.txt"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as file:
        running = subprocess.Popen(
            [*command, *vllm],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        begin = time.monotonic()
        while time.monotonic() - begin < 900:  # of seconds on a machine of its own
            assert running.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(log.read_text()[-4000:])
        assert "moekv compresses prompts: compression_ratio 0.75" in log.read_text()
        yield address
    finally:
        os.killpg(running.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            running.wait(20)
        with suppress(ProcessLookupError):  # none is left
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def metric(server: str, name: str) -> float:
    page = urllib.request.urlopen(f"{server}/metrics").read().decode()
    (line,) = [x for x in page.splitlines() if x.startswith(name)]
    return float(line.rsplit(" ", 1)[1])


def blocks_in_use(server: str) -> float:
    return metric(server, "vllm:kv_cache_usage_perc{") * 64


def test_a_streaming_client_is_answered_from_fewer_blocks(server: str) -> None:
    prompt = "The tide covers the causeway twice a day. " * 14  # 588 tokens, 19 blocks
    asked = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{server}/v1/completions",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    pieces, most = 0, 0.0
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                pieces += 1
                if pieces % 20 == 0:
                    most = max(most, blocks_in_use(server))
    assert pieces > 300  # some tokens may come together
    assert metric(server, "moekv:prompts_compressed_total") == 1
    assert metric(server, "moekv:blocks_freed_total") == 18 - 5
    assert metric(server, "moekv:pairs_kept_total") == 588 - 13 * 32
    # 5 of the prompt's stay, and one that it fills in part; 400 more tokens fill 13.
    assert 5 < most <= 5 + 1 + 13


def test_a_wrong_ratio_is_a_bad_request(server: str) -> None:
    asked = {"model": "tiny", "prompt": "The tide", "vllm_xargs": {"moekv": 7}}
    request = urllib.request.Request(
        f"{server}/v1/completions",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as failed:
        urllib.request.urlopen(request)
    assert failed.value.code == 400
    assert "moekv: expected compression_ratio in" in failed.value.read().decode()
