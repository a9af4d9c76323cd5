"""The page of equal bytes says what the answers say."""

from typing import Any

import pytest
import torch

pytest.importorskip("kvpress")

from tiny_models import tiny_model, tokens

from benchmarks.quality import equal_bytes, first_screen, presses
from benchmarks.quality.equal_bytes import AUTO, BEST, BEST_LENT, KVZIP, RATIOS, Figures, auto
from benchmarks.quality.metrics import LEAST_KL
from benchmarks.quality.replay import footprint, record, replay
from benchmarks.quality.run import FULL

PEER, LENT_PEER = "AdaKV(SnapKV)", "AdaKV(SnapKV), k8v4"


def row(method: str, ratio: float, task: str, kl: float, index: int = 0, size: int = 50) -> Any:
    cell = {"task": task, "length": 1000, "index": index, "method": method, "ratio": ratio}
    return {"cell": cell, "kl": kl, "bytes": size}


def answers(index: int = 0, times: float = 1.0) -> list[dict[str, Any]]:
    """Two tasks: quantised pairs a quarter of 16-bit ones, a peer twice, in our rows half."""
    rows = []
    for task, kl in (("one", 0.1 * times), ("two", 0.4 * times)):
        rows.append(row(FULL, 0.0, task, 0.0, index, 1000))
        for ratio in RATIOS:
            rows.append(row("moekv", ratio, task, kl, index, 100))
            rows.append(row(AUTO, ratio, task, kl / 4, index, 99))
            for pairs in ("k8v8", "k8v4", "k4v4", "auto"):
                rows.append(row(f"moekv pairs={pairs}", ratio, task, kl / 4, index, 99))
            rows.append(row(PEER, ratio, task, 2 * kl, index, 1000))
            rows.append(row("StreamingLLMPress", ratio, task, 3 * kl, index))
            # Better than ours in one task.
            lent = kl / 8 if task == "two" else kl / 2
            rows.append(row(LENT_PEER, ratio, task, lent, index))
    return rows


def test_means_are_geometric_over_tasks_and_nothing_is_below_the_floor() -> None:
    figures = equal_bytes.all_figures(answers())
    assert figures.mean_kl("moekv", 0.9) == pytest.approx(0.2)
    assert figures.mean_kl(AUTO, 0.9) == pytest.approx(0.05)
    assert figures.mean_kl(BEST, 0.9) == pytest.approx(0.4)
    assert figures.one(BEST, 0.9, "one") == PEER
    assert figures.times(AUTO, BEST_LENT, 0.9) == pytest.approx((1.0, 2.0))
    assert figures.behind(AUTO, BEST_LENT) == [("two", ratio) for ratio in RATIOS]
    assert figures.behind(AUTO, BEST) == []
    assert figures.held(AUTO) == "10 / 10 / 10 / 10" and figures.has(BEST)
    assert not figures.has(KVZIP)
    tiny = equal_bytes.all_figures(answers(times=1e-6))
    assert tiny.mean_kl(AUTO, 0.9) == pytest.approx(LEAST_KL)


def test_only_samples_that_all_methods_have_are_compared() -> None:
    rows = answers() + answers(1, 3.0)
    both = equal_bytes.all_figures(rows)
    assert both.samples == {"one": 2, "two": 2}
    assert both.mean_kl("moekv", 0.9) == pytest.approx(0.2 * 3**0.5)
    last = next(r for r in reversed(rows) if r["cell"]["method"] == PEER)
    last["error"] = "ValueError: no"
    assert equal_bytes.all_figures(rows).samples == {"one": 2, "two": 1}
    failed = {"cell": rows[0]["cell"] | {"method": "KVzipPress", "ratio": 0.9}, "error": "E"}
    assert equal_bytes.all_figures([*rows, failed]).samples == {"one": 2, "two": 1}
    assert Figures(rows, [PEER], [0.9]).samples == {"one": 2, "two": 2}
    assert Figures(rows, [PEER], [0.97]).samples == {}


def test_the_page_says_what_is_lost_and_what_was_missed() -> None:
    meta = {"model": "tiny", "dtype": "", "seed": 0, "machine": "", "cpu": "", "capability": ""}
    meta |= {"threads": 1, "versions": {}, "commit": "abc", "date": "2026-01-01T"}
    text = equal_bytes.page(answers(), meta)
    assert "2 tasks of 1,000 tokens, **one sample of each**, without intervals." in text
    assert '| **moekv**, `pairs="auto"` | 0.0500 | 0.0500 | 0.0500 | 0.0500 |' in text
    assert "| **moekv**, pairs in 16 bits | 4.00 (0) | 4.00 (0) |" in text
    times = " | ".join(["**1.00** (2.00)"] * 4)
    lost = "4 of 8: two at 75 %, 90 %, 95 %, 98 %"
    assert f"| {BEST_LENT} | {times} | {lost} |" in text
    assert "0.25 / 0.25 / 0.25 | **missed** at 75 %, 90 %, 95 % |" in text
    assert "| at 98 % ≤ 16-bit pairs at 90 % | 0.0500, there 0.2000 | met |" in text
    assert "| at 97 %" not in text  # was not measured
    more = equal_bytes.page(answers() + [row(AUTO, 0.97, t, 9.0) for t in ("one", "two")], meta)
    assert "| at 97 % ≤ 16-bit pairs at 90 % | 9.0000, there 0.2000 | **missed** |" in more
    assert '| one | **moekv**, `pairs="auto"` | **0.0250** |' in text
    assert "|  | **moekv**, pairs in 16 bits | 0.1000 |" in text
    assert "tiny" in text and "abc, 2026-01-01" in text


def test_the_page_is_that_of_the_recorded_answers() -> None:
    rows, meta = equal_bytes.recorded()
    written = first_screen.BYTES.read_text(encoding="utf-8")
    assert equal_bytes.page(rows, meta) == written, (
        "run `python -m benchmarks.quality.first_screen`"
    )
    assert len(equal_bytes.all_figures(rows).tasks) == 6


def test_auto_was_measured_as_the_format_that_it_stands_for() -> None:
    rows, _ = equal_bytes.recorded()
    found = {(r["cell"]["method"], r["cell"]["ratio"], r["cell"]["task"]): r for r in rows}
    compared = [key for key in found if key[0] == "moekv pairs=auto" and key[1] in RATIOS]
    assert len(compared) == 24
    for _, ratio, task in compared:
        own, other = (found[name, ratio, task] for name in ("moekv pairs=auto", auto(ratio)))
        # Not the KL divergence: the formats were measured on another machine.
        assert (own["kept"], own["bytes"]) == (other["kept"], other["bytes"])
        folded = found[AUTO, ratio, task]  # a bias is two bytes, of which nothing is seen at 75 %
        assert folded["kept"] < own["kept"] if ratio > 0.75 else folded["kl"] == own["kl"]


@pytest.mark.parametrize("name", [LENT_PEER, "StreamingLLMPress, k4v4"])
def test_a_peer_in_quantised_rows_holds_the_bytes_of_the_ratio(name: str) -> None:
    """To within a pair a head."""
    model = tiny_model().to(torch.bfloat16)
    recording = record(model, tokens(1, 200))
    full = footprint(model, replay(model, recording, None), recording).bytes
    size = footprint(model, replay(model, recording, presses.METHODS[name](0.8)), recording)
    heads = size.pairs // 200
    assert 0.2 * full - 64 * heads < size.bytes <= 0.2 * full + 64
    assert size.kept > 0.2 * size.pairs
