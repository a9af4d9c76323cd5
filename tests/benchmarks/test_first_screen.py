"""The README and docs/results.md show what the recorded answers say."""

import math
from pathlib import Path

import pytest

from benchmarks.quality import equal_bytes, first_screen, other, pictures
from benchmarks.quality.first_screen import BEGIN, BEST, END, fill, first_figures, pairs_table
from benchmarks.quality.run import read_results


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
    page = fill(f"before\n{BEGIN}\nold\n{END}\nafter\n", pairs_table(rows))
    assert page.startswith(f"before\n{BEGIN}\n| KL") and page.endswith(f"|\n{END}\nafter\n")
    assert "old" not in page
    assert "| **moekv** | 0.2000 | 0.2000 | 0.2000 | 25 % |" in page
    with pytest.raises(ValueError, match="in the page"):
        fill(f"{END}{BEGIN}", [])


def test_the_pages_show_the_recorded_answers(tmp_path: Path) -> None:
    rows, (in_bytes, _) = read_results(first_screen.ANSWERS), equal_bytes.recorded()
    advice = "run `python -m benchmarks.quality.first_screen`"
    readme = first_screen.README.read_text(encoding="utf-8")
    assert fill(readme, equal_bytes.first_table(in_bytes)) == readme, advice
    page = first_screen.PAGE.read_text(encoding="utf-8")
    assert first_screen.screen(rows, in_bytes, *other.recorded_figures()) == page, advice
    assert other.page(*other.recorded()) == other.PAGE.read_text(encoding="utf-8"), advice
    assert len(page.splitlines()) <= 60, "results are one screen"
    paths = pictures.draw_all(rows, in_bytes, other.recorded_figures()[0], tmp_path)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert (first_screen.PAGE.parent / path.name).exists() and path.name in page
