"""What a request asks for itself, and what is counted."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm_engine import (
    BLOCK,
    answers,
    engine,
    near_reference,
    params,
    tokens,
    watch_choices,
    write_model,
)

from moekv.integrations.vllm.metrics import Metrics
from moekv.integrations.vllm.options import own_ratio
from moekv.integrations.vllm.plugin import logger
from moekv.integrations.vllm.requests import Request, Requests

NAMES = ("prompts_compressed", "blocks_freed", "pairs_computed", "pairs_kept")


def own(ratio: Any) -> dict[str, Any]:
    return {"moekv": {"compression_ratio": ratio}}


def counted() -> list[float]:
    return [REGISTRY.get_sample_value(f"moekv:{name}_total") or 0.0 for name in NAMES]


def test_rows_follow_vllms_batch() -> None:
    config = SimpleNamespace(additional_config={"moekv": {}})
    requests = Requests(config, None, False)
    plain, high = params(1), params(1, extra_args=own(0.9))
    added = [(0, plain, [1] * 5, []), (1, high, [1] * 6, []), (2, plain, [1] * 7, [])]
    requests.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    assert requests.rows == {0: Request(5, None), 1: Request(6, 0.9), 2: Request(7, None)}
    swap = [(0, 1, MoveDirectionality.SWAP)]
    requests.update_state(BatchUpdate(3, removed=[], added=[], moved=swap))
    requests.update_state(None)
    assert [requests.rows[i].prompt for i in range(3)] == [6, 5, 7]
    move = [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]
    requests.update_state(BatchUpdate(2, removed=[0], added=[], moved=move))
    assert requests.rows == {0: Request(7, None), 1: Request(5, None)}


def test_each_request_has_its_own_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, chosen = write_model(tmp_path), watch_choices(monkeypatch)
    lengths, ratios = [320, 288, 256, 224], [None, 0.9, 0.0, 0.25]
    prompts = [tokens(length, seed=length) for length in lengths]
    with engine(folder, {"compression_ratio": 0.5}) as compressed:
        before = counted()
        for i, (prompt, ratio) in enumerate(zip(prompts, ratios, strict=True)):
            extra = None if ratio is None else own(ratio)
            asked = params(3 + 5 * i, logprobs=5, extra_args=extra)  # so that rows move
            compressed.add_request(str(i), {"prompt_token_ids": prompt}, asked)
        done = {}
        while compressed.has_unfinished_requests():
            done |= {x.request_id: x.outputs[0] for x in compressed.step() if x.finished}
    assert [each["gap"] for each in chosen] == [(5, 10), (8, 9), (1, 7)]
    for i in (0, 1, 3):
        near_reference(folder, prompts[i], done[str(i)], chosen.of(prompts[i]))
    with engine(folder) as plain:
        (expected,) = answers(plain, prompts[2:3], 13)
    assert done["2"].token_ids == expected.token_ids
    new = [now - then for now, then in zip(counted(), before, strict=True)]
    freed = 5 + 8 + 1
    assert new == [3, freed, 320 + 288 + 224, 320 + 288 + 224 - freed * BLOCK]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (own(1.0), r"compression_ratio in \[0, 1\).* got 1.0"),
        (own("0.5"), "a number, got str"),
        ({"moekv": {"budget": "uniform"}}, "expected extra_args.*compression_ratio.*got.*budget"),
        ({"moekv": 7}, r"compression_ratio in \[0, 1\).* got 7"),
        ({"moekv": [0.5]}, "a number, got list"),
    ],
)
def test_wrong_ratios_are_refused_when_a_request_comes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^moekv: .*{message}"):
        Requests.validate_params(params(1, extra_args=given))


def test_the_servers_way_to_say_it() -> None:
    """Its extra arguments are no mappings."""
    assert own_ratio({"moekv": 0.9, "other": "x"}) == own_ratio(own(0.9)) == 0.9
    assert own_ratio({"other": 0.9}) is own_ratio(None) is None


def test_an_engine_refuses_them_and_goes_on(tmp_path: Path, caplog: Any) -> None:
    prompt = tokens(100)
    with engine(write_model(tmp_path), {}) as compressed:
        with pytest.raises(VLLMValidationError, match="moekv: expected compression_ratio"):
            compressed.add_request(
                "0", {"prompt_token_ids": prompt}, params(1, extra_args=own(-0.1))
            )
        assert len(answers(compressed, [prompt], 2)) == 1
    # Where moekv is off, it says so.
    logger.parent.propagate = True
    caplog.set_level(logging.WARNING, logger=logger.name)
    try:
        with engine(tmp_path) as plain:
            answers(plain, [prompt], 2, extra_args=own(0.5))
    finally:
        logger.parent.propagate = False
    assert "moekv is off in this engine" in caplog.text


def test_a_line_in_the_log_from_time_to_time(caplog: pytest.LogCaptureFixture) -> None:
    logger.parent.propagate = True
    caplog.set_level(logging.INFO, logger=logger.name)
    metrics = Metrics.of()
    before = counted()
    metrics._said, metrics._since = float("-inf"), dict.fromkeys(NAMES, 0)
    try:
        for i in range(4):
            if i == 3:
                metrics._said = float("-inf")
            metrics.freed(6)
            metrics.compressed(300, 300 - 6 * BLOCK)
    finally:
        logger.parent.propagate = False
    said = dict.fromkeys(record.getMessage() for record in caplog.records)  # by several handlers
    assert list(said) == [
        "moekv: prompts compressed: 1, blocks freed: 6, pairs kept: 108 of 300",
        "moekv: prompts compressed: 3, blocks freed: 18, pairs kept: 324 of 900",
    ]
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [4, 24, 1200, 432]
