"""The benchmarks of decoding and memory, on a model that takes no time, and what they report."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from transformers import Cache, PreTrainedModel, QuantizedCache
from transformers.cache_utils import DynamicLayer

from benchmarks.end_to_end import batches, decode, memory, prefill, report, runs
from benchmarks.measure import RESULTS, Times
from moekv import MoERouterPress

LENGTH = 80


def measure(model: PreTrainedModel, context: Any = decode.random_context) -> list[dict[str, Any]]:
    recording = context(model, LENGTH)
    return decode.measure(model, recording, list(decode.METHODS), seconds=0.01, steps=2)


@pytest.mark.parametrize("prefilled", [False, True])
def test_decode_measures_every_method_and_the_attention_alone(prefilled: bool) -> None:
    model = tiny_model()
    if prefilled:
        rows = measure(model, lambda m, n: decode.record(m, decode.random_ids(m, n)))
    else:
        rows = measure(model)
    sizes = {row["method"]: row["cache_bytes"] for row in rows if row["step"] == "token"}
    config = model.config
    full = 2 * 2 * config.num_key_value_heads * LENGTH * 16 * 4  # K and V, layers, ..., fp32
    assert sizes.pop(decode.FLOOR) == full * 16 // LENGTH
    assert sizes.pop(decode.FULL) == sizes.pop("kvpress AdaKV(KeyDiff), masked") == full
    coded = [sizes.pop(f"{decode.RAGGED}, {pairs}") for pairs in decode.QUANTISED]
    assert coded == sorted(coded, reverse=True) and full // 32 < coded[2] < coded[0] < full // 8
    assert set(sizes.values()) == {full // 4}
    attention = [row for row in rows if row["step"] == "attention"]
    assert len(attention) == 9 and all(row["calls"] >= 2 for row in rows)
    # Every decoder has appended to its own cache, at its own position, and left no mask behind.
    assert not any(getattr(m, "masked_key_indices", None) for m in model.modules())


def test_attention_is_checked_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = decode.attend
    monkeypatch.setattr(decode, "attend", lambda *a, **k: attend(*a, **k) * 1.1)
    with pytest.raises(AssertionError, match="not close"):
        measure(tiny_model())


def test_a_decoder_feeds_tokens_at_their_true_positions() -> None:
    model, cache = tiny_model(), decode.DynamicCache()
    ids = decode.random_ids(model, LENGTH)
    with torch.no_grad():
        model.model(ids, past_key_values=cache)
        decoder = decode.Decoder(model, cache, LENGTH)
        decoder(), decoder()
        expected = decode.DynamicCache()
        model.model(torch.cat([ids, torch.full((1, 2), 7)], dim=1), past_key_values=expected)
    torch.testing.assert_close(cache.layers[1].keys, expected.layers[1].keys)


@pytest.mark.thorough
def test_a_row_of_a_batch_decodes_as_it_does_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SHORTEST", 20)
    monkeypatch.setattr(batches, "LONGEST", 30)
    model = tiny_model()
    batch = batches.Batch(model, 3, None)
    begin = 30 - int(batch.position[1])
    first = torch.randint(
        5, model.config.vocab_size, (3, 30), generator=torch.Generator().manual_seed(0)
    )[1:2, begin:]
    for step in range(2):
        alone = torch.cat([first, torch.full((1, step + 1), 7)], 1)
        expected = model(alone).logits[:, -1]
        torch.testing.assert_close(batch()[1], expected, atol=1e-4, rtol=1e-4)


def test_memory_counts_storages_and_sees_the_peak() -> None:
    model = tiny_model()
    rows = {name: memory.measure(model, LENGTH, name, Times()) for name in memory.PRESSES}
    full = rows[decode.FULL]["cache_bytes"]
    for name, row in rows.items():
        masked = name in (decode.FULL, "kvpress AdaKV(KeyDiff), masked")
        assert row["cache_bytes"] == (full if masked else full // 4), name
        assert full >= row["cache_peak_bytes"] >= row["cache_bytes"]
        assert row["rss_before"] > 0 and row["rss_peak_extra"] >= 0
        assert row["calls"] == 1 and row["cpu_s"][1] > 0
    assert rows[decode.RAGGED]["cache_peak_bytes"] == full
    one = full // len(model.model.layers)
    assert rows[memory.UNIFORM_STREAMING]["cache_peak_bytes"] == one // 4 + one
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (decode, ["--seconds", "0.01", "--steps", "2", "--random-context"]),
        (batches, ["--seconds", "0.01", "--steps", "2"]),
        (memory, ["--rounds", "2"]),
        (prefill, ["--rounds", "1"]),
    ],
    ids=["decode", "batches", "memory", "prefill"],
)
def test_a_run_records_its_command_and_all_rows(
    module: Any, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runs.MODELS, "smollm2", tiny_model)
    out, first = tmp_path / "out.json", next(iter(module.METHODS))
    before = torch.get_num_threads()
    chosen = ["--lengths", "30", "40", "--methods", first, "--threads", "1", "--out", str(out)]
    try:
        module.main([*chosen, *options])
    finally:
        torch.set_num_threads(before)
    written = json.loads(out.read_text())
    command = ["python", "-m", module.__name__, *chosen, *options]
    assert shlex.split(written["command"]) == command
    assert written["environment"]["versions"]["torch"] == torch.__version__
    rows = [row for row in written["rows"] if row["method"] == first]
    assert [row["length"] for row in rows] == [30, 40]
    ratio = module.RATIO
    assert all((r["model"], r["threads"], r["ratio"]) == ("smollm2", 1, ratio) for r in rows)


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    environment = {
        "cpu": "a CPU",
        "capability": "avx2",
        "versions": {"torch": "2.13"},
        "commit": "0123456789",
    }
    return {"command": "python -m x", "environment": environment, "rows": rows}


def test_tables_say_what_the_results_say() -> None:
    row = {"length": 8192, "threads": 2, "step": "token", "cpu_s": [0.1, 0.15, 0.2]}
    full = row | {"method": "full", "cache_bytes": 4 << 20, "wall_s": [0.18, 0.2, 0.21]}
    fast = row | {"method": "fast", "cache_bytes": 1 << 20, "wall_s": [0.039, 0.04, 0.05]}
    fast["cpu_s"] = [0.04, 0.05, 0.06]
    attention = row | {"step": "attention", "method": "op", "wall_s": [0.001, 0.001, 0.001]}
    given = results([full, fast, attention])
    lines = report.render(given, "token").splitlines()
    times = "200.0 | 180.0 to 210.0 | 1.00 | 150.0 | 1.00"
    assert lines[2] == f"| 8,192 | full | 4.0 | {times} |"
    times = "40.0 | 39.0 to 50.0 | 5.00 | 50.0 | 3.00"
    assert lines[3] == f"| 8,192 | fast | 1.0 | {times} |"
    assert lines[5] == "`python -m x`"
    assert lines[6].startswith("on a CPU (avx2), 2 threads, torch 2.13, commit 0123")
    assert report.render(given, "attention").splitlines()[2].startswith("| 8,192 | op | 1.0 |")
    before, after, peak = 100 << 20, 101 << 20, 3 << 20
    sizes = {"rss_before": before, "rss_after": after, "rss_peak_extra": peak}
    held = {"cache_peak_bytes": 2 << 20}
    given = results([full | sizes | held, fast | sizes | held])
    assert report.render(given, "memory").splitlines()[3] == (
        "| 8,192 | fast | 0.05 | 33.3% | 1.0 | 25.0% | 2.0 | 100.0 | +1.0 | +3.0 |"
    )


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    page = report.PAGE.read_text()
    assert report.update(page) == page, "run `python -m benchmarks.end_to_end.report`"
    blocks = report._BLOCK.findall(page)
    assert len(blocks) == page.count("<!-- end -->") >= 4
    for _, name, _, _ in blocks:
        assert json.loads((RESULTS / f"{name}.json").read_text())["environment"]["commit"]


class Stored(QuantizedCache):
    """One that needs no quantisation library: bytes, beside a scale in a tensor of its own."""

    def __init__(self, config: Any) -> None:
        Cache.__init__(self, layers=[StoredLayer() for _ in range(config.num_hidden_layers)])


class StoredLayer(DynamicLayer):
    def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        joined = super().update(keys, values, *args, **kwargs)
        self.codes = [{"codes": joined[0].to(torch.int8), "scale": torch.ones(3)}]
        return joined


def test_quantised_caches_of_transformers_are_counted_and_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    monkeypatch.setitem(decode.MORE, "stored", {})
    monkeypatch.setattr(decode, "QuantizedCache", Stored)
    full = decode.replay(model, decode.random_context(model, LENGTH), None)
    cache = decode.quantised_cache(model, full, "stored")
    pairs = decode.cache_bytes(full)
    layers = len(model.model.layers)
    assert decode.cache_bytes(cache) == pairs + pairs // 2 // 4 + layers * 3 * 4
    rows = decode.measure(
        model, decode.random_context(model, LENGTH), [decode.FULL, "stored"], seconds=0.01, steps=2
    )
    assert {row["method"] for row in rows} == {decode.FULL, "stored", decode.FLOOR}


def test_the_table_of_whole_caches_names_the_worst_task() -> None:
    rows = [
        {"method": name, "threads": 1, "cache_bytes": size, "kl": kl, "mean_kl": 0.015}
        for name, size, kl in (
            ("full cache", 4 << 20, {"a": 0.0}),
            ("x", 1 << 20, {"a": 0.01, "b": 0.02}),
        )
    ]
    line = report.render(results(rows), "whole").splitlines()[3]
    assert line == "| x | 1.0 | 25.0% | 0.015 | 0.02 |"


def test_a_block_knows_hooks_that_are_timed() -> None:
    model, watch = tiny_model(), prefill.Stopwatch()
    with torch.no_grad(), watch.of_hooks(), MoERouterPress(0.5, router=None)(model):
        cache = model(tokens(1, 60), use_cache=True).past_key_values
    assert sum(layer.nbytes for layer in cache.layers) < 0.6 * 2 * 2 * 2 * 60 * 16 * 4
