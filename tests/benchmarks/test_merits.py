"""docs/results-routers.md shows what the recorded answers say of routers, experts and lists."""

import pytest

from benchmarks.quality import merits
from benchmarks.quality.equal_bytes import Figures
from benchmarks.quality.presses import CALIBRATED_LISTS, IN_LISTS, LISTED, LISTS, MEMBERS, METHODS
from benchmarks.quality.run import FULL
from moekv import expert_names


def test_the_page_shows_the_recorded_answers() -> None:
    advice = "run `python -m benchmarks.quality.merits`"
    page = merits.PAGE.read_text(encoding="utf-8")
    assert merits.page(*merits.recorded()) == page, advice


def test_lists_are_twenty_different_ones_of_known_members() -> None:
    assert len({frozenset(members) for members in LISTS.values()}) == 20
    drawn = {member for members in LISTS.values() for member in members}
    assert drawn <= {*expert_names(), *LISTED} and len(drawn) >= 12
    assert {f"expert {member}" for member in drawn} <= MEMBERS.keys()
    for members in LISTS.values():
        press = METHODS[" + ".join(members)](0.5)
        assert len(press.experts) == len(members)


def test_a_list_is_held_beside_its_members() -> None:
    name, members = next((n, m) for n, m in LISTS.items() if len(m) == 3)
    kls = {f"expert {m}": kl for m, kl in zip(members, (0.1, 0.2, 0.8), strict=True)}
    kls |= {name: 0.3, f"calibrated beside {name}": 0.05, FULL: 0.0}
    rows = [
        {
            "cell": {"task": "a", "index": 0, "method": m, "ratio": 0.0 if m == FULL else 0.75},
            "kl": kl,
            "bytes": 1,
        }
        for m, kl in kls.items()
    ]
    figures = Figures(rows, [*IN_LISTS, *CALIBRATED_LISTS, *MEMBERS], [0.75])
    assert merits.list_figures(figures, name, 0.75) == pytest.approx((3.0, 1.5, 0.5))
