"""The measured part of docs/serving.md is made of the recorded rows."""

import pytest

from benchmarks.serving.table import BEGIN, END, PAGE, fill, overhead, recorded, table


def test_page_shows_what_is_recorded() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert fill(page, table(recorded())) == page, "run `python -m benchmarks.serving.table`"
    with pytest.raises(ValueError, match="expected <!-- measured -->"):
        fill(page.replace(END, ""), [])


def test_all_cases_are_there_and_had_the_same_to_do() -> None:
    plain, *compressed = rows = recorded()
    assert plain["options"] is None
    cases = {(row["options"]["compression_ratio"], row["options"]["budget"]) for row in compressed}
    assert cases == {(ratio, kind) for ratio in (0.5, 0.75, 0.9) for kind in ("model", "uniform")}
    assert len({tuple(row["prompt_tokens"]) for row in rows}) == 1
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_a_missed_target_is_said_to_be_missed() -> None:
    rows = recorded()
    for row in rows[1:]:
        for name in ("two_prompts_step_s", "decode_step_of_two_s"):
            row[name] = [9.0 * x for x in row[f"left_alone_{name}"]]
            assert overhead(row, name) == pytest.approx(8)
        row["most_running"] = rows[0]["most_running"]
    said = "\n".join(table(rows)[-3:])
    assert said.count("**missed**") == 3 and "800" in said
    assert BEGIN not in said
