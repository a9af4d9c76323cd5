"""The gate on the kernels' instruction counts: that it can fail, and on what."""

import instruction_counts
import pytest

RECORDED = {"default": {"a": 1000, "b": 50}, "avx2": {"a": 300, "b": 20}}


def changed(isa: str, name: str, value: int) -> instruction_counts.Counts:
    counted = {isa: dict(counts) for isa, counts in RECORDED.items()}
    counted[isa][name] = value
    return counted


@pytest.mark.parametrize("value", [300, 305, 295])
def test_counts_within_the_tolerance_pass(value):
    assert instruction_counts.differences(changed("avx2", "a", value), RECORDED) == []


@pytest.mark.parametrize(("value", "change"), [(307, "+2.3%"), (200, "-33.3%")])
def test_more_and_fewer_instructions_are_told(value, change):
    (found,) = instruction_counts.differences(changed("avx2", "a", value), RECORDED)
    assert found == f"avx2: a: 300 recorded, {value} now ({change})"


def test_kernels_that_come_and_go_are_told():
    counted = changed("default", "c", 7)
    del counted["avx2"]["b"]
    assert instruction_counts.differences(counted, RECORDED) == [
        "avx2: b: recorded, but not counted",
        "default: c: counted, but not recorded",
    ]


def test_another_compiler_is_not_compared():
    record = {"compiler": "GCC 12.2.0, glibc 2.36"}
    assert instruction_counts.skip_reason("GCC 12.2.0, glibc 2.36", record) is None
    reason = instruction_counts.skip_reason("GCC 13.1.0, glibc 2.36", record)
    assert reason == "recorded with GCC 12.2.0, glibc 2.36, this build is of GCC 13.1.0, glibc 2.36"


def test_totals_are_read_from_a_dump(tmp_path):
    (tmp_path / "counts.1").write_text("events: Ir\nfn=(1) x\n7 12\n\ntotals: 12345\n")
    assert instruction_counts.read_total(tmp_path / "counts.1") == 12345
