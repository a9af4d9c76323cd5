"""The README shows what the recorded answers say."""

import math
from pathlib import Path

import pytest

from benchmarks.quality import first_screen
from benchmarks.quality.first_screen import BEGIN, BEST, END, fill, first_figures, first_table
from benchmarks.quality.run import read_results

ROOT = Path(__file__).parents[2]
ANSWERS = ROOT / "benchmarks" / "results" / "quality" / "answers.jsonl"


def answer(task: str, method: str, ratio: float, kl: float, exact: bool = True) -> dict:
    cell = {"task": task, "length": 1000, "index": 0, "method": method, "ratio": ratio}
    row = {"cell": cell, "kl": kl, "nll": 0.0, "exact": exact, "seconds": 1.0}
    share = 1 - ratio
    return row | {"kept": int(100 * share), "pairs": 100, "bytes": int(1000 * share)}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Two tasks; on each another peer is the best."""
    made = [answer(task, "full cache", 0.0, 0.0, task == "a") for task in "ab"]
    for ratio in first_screen.RATIOS:
        for task, kls in (("a", (0.1, 0.4, 1.6)), ("b", (0.4, 1.6, 0.4))):
            methods = ("moekv", "SnapKVPress", "AdaKV(Compactor)")
            made += [
                answer(task, m, ratio, kl, m == "moekv") for m, kl in zip(methods, kls, strict=True)
            ]
            made.append(answer(task, "KVzipPress", ratio, 0.9))
    return made


def test_figures_are_geometric_means_over_tasks(rows: list[dict]) -> None:
    figures = first_figures(rows)
    assert figures["moekv"][0.75]["kl"] == pytest.approx(0.2)
    assert figures["SnapKVPress"][0.75]["kl"] == pytest.approx(0.8)
    assert figures[BEST][0.75] == {"kl": pytest.approx(math.sqrt(0.4 * 0.4))}
    assert figures["moekv"][0.75]["bytes"] == pytest.approx(0.25)
    # Of the one task that the full cache answers right.
    assert figures["moekv"][0.75]["right"] == 1 and figures["SnapKVPress"][0.75]["right"] == 0


def test_the_table_goes_between_the_marks(rows: list[dict]) -> None:
    page = fill(f"before\n{BEGIN}\nold\n{END}\nafter\n", rows)
    assert page.startswith(f"before\n{BEGIN}\n| KL") and page.endswith(f"|\n{END}\nafter\n")
    assert "old" not in page
    assert "| **moekv** | 0.2000 | 0.2000 | 0.2000 | 25% |" in page
    with pytest.raises(ValueError, match="in the page"):
        fill(f"{END}{BEGIN}", rows)


def test_the_picture_is_drawn(rows: list[dict], tmp_path: Path) -> None:
    path = first_screen.first_picture(rows, tmp_path / "first.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_readme_shows_the_recorded_answers() -> None:
    recorded = read_results(ANSWERS)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(first_table(recorded)) in page
