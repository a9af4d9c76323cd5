"""Prefixes that requests share: found in vLLM's cache, and never written to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_engine import (
    BLOCK,
    Chosen,
    blocks_in_use,
    engine,
    near_reference,
    params,
    pool,
    tokens,
    watch_choices,
    write_model,
)

LONG = tokens(900)  # 28 whole blocks at a ratio of 0.75, the first 21 of which are given back
SHORT = LONG[:600]  # 18 whole blocks, of which 14
OTHER = LONG[:500] + tokens(100, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    return watch_choices(monkeypatch)


@pytest.fixture(scope="module", params=["model", "uniform"])
def running(folder: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    options = {"compression_ratio": 0.75, "budget": request.param}
    with engine(folder, options, enable_prefix_caching=True) as running:
        yield running


@pytest.fixture
def caching(running: Any) -> Any:
    """An engine in whose cache there is nothing yet."""
    assert running.reset_prefix_cache()
    return running


def ask(engine: Any, name: str, prompt: list[int], **options: Any) -> Any:
    """Let one request run to its end."""
    engine.add_request(
        name, {"prompt_token_ids": prompt}, params(**{"count": 12, "logprobs": 5} | options)
    )
    while True:
        for output in engine.step():
            if output.request_id == name and output.finished:
                return output


def test_what_was_found_is_read_and_stays(folder: Path, caching: Any, chosen: Chosen) -> None:
    """The same answers as transformers', whoever computed the prompt's beginning."""
    asked = [
        (SHORT, 0),
        (OTHER, 14),  # those of the other that pairs did not move in
        (SHORT, 14),
        (LONG, 14),
        (SHORT, 14),  # though more of it has been computed since
        (LONG, 21),
    ]
    for i, (prompt, found) in enumerate(asked):
        chosen.clear()
        output = ask(caching, str(i), prompt)
        assert output.num_cached_tokens == found * BLOCK
        near_reference(folder, prompt, output.outputs[0], chosen)
        assert blocks_in_use(caching) == 0
    cached = [b for b in pool(caching).blocks if b.block_hash is not None]
    assert len(cached) == 21  # OTHER's beginning is SHORT's, as far as it is found


def test_requests_that_run_together(folder: Path, caching: Any, chosen: Chosen) -> None:
    """One is answered from fewer pairs while others read what it computed."""
    caching.add_request("0", {"prompt_token_ids": LONG}, params(40, logprobs=5))
    caching.step()
    for i in range(1, 3):
        caching.add_request(str(i), {"prompt_token_ids": SHORT}, params(40, logprobs=5))
    done = {}
    while caching.has_unfinished_requests():
        done |= {x.request_id: x for x in caching.step() if x.finished}
        if len(done) == 0:
            # 7 of the long one's stay, and the one behind; then there are 15 and 19 of its own.
            assert blocks_in_use(caching) <= 28 + 2 * 7
    assert [done[str(i)].num_cached_tokens // BLOCK for i in range(3)] == [0, 14, 14]
    by_length = {600: chosen.of(SHORT, times=2), 900: chosen.of(LONG)}
    for output in done.values():
        prompt = output.prompt_token_ids
        near_reference(folder, prompt, output.outputs[0], by_length[len(prompt)])


def test_an_answer_is_never_found(caching: Any) -> None:
    """It was given from fewer pairs, or its pairs have not been rated."""
    for i, (prompt, found) in enumerate([(SHORT, 14), (OTHER[-50:], 1)]):
        answer = ask(caching, f"{i}", prompt, count=100).outputs[0].token_ids
        later = ask(caching, f"{i} later", [*prompt, *answer, 5])
        assert later.num_cached_tokens == found * BLOCK


def test_short_prompts_are_rated_for_others(folder: Path, caching: Any, chosen: Chosen) -> None:
    assert ask(caching, "0", LONG[:50]).num_cached_tokens == 0
    assert not chosen
    output = ask(caching, "1", LONG)
    assert output.num_cached_tokens == BLOCK
    scores = torch.cat([each["scores"] for each in chosen])
    chosen.clear()
    near_reference(folder, LONG, ask(caching, "2", LONG).outputs[0], chosen)
    again = torch.cat([each["scores"] for each in chosen])
    assert torch.equal(scores[:, :BLOCK], again[:, :BLOCK])
    assert scores.isfinite().all()


def test_its_own_ratio_is_computed_from_the_beginning(
    folder: Path, caching: Any, chosen: Chosen
) -> None:
    ask(caching, "0", LONG)
    for i, (ratio, kept) in enumerate([(0.5, 14), (0.9, 3)], 1):
        chosen.clear()
        own = {"moekv": {"compression_ratio": ratio}}
        output = ask(caching, str(i), LONG, extra_args=own)
        assert output.num_cached_tokens == 0
        assert chosen[0]["gap"] == (28 - kept, 28)
        near_reference(folder, LONG, output.outputs[0], chosen)
    chosen.clear()
    output = ask(caching, "3", LONG)
    assert output.num_cached_tokens == 21 * BLOCK
    near_reference(folder, LONG, output.outputs[0], chosen)
