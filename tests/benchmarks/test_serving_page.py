"""The table of docs/serving.md is that of the recorded results."""

from benchmarks.serving.table import PAGE, table, with_table


def test_the_table_is_of_the_results() -> None:
    page = PAGE.read_text()
    assert with_table(page) == page
    assert table().count("\n") == 2 + 7
