import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekv.budget import (
    check_ratio,
    kept_pairs,
)

NAN = float("nan")


@given(st.integers(0, 5000), st.floats(0, 1, exclude_max=True))
def test_kept_pairs_are_those_of_kvpress(length: int, ratio: float) -> None:
    theirs = pytest.importorskip("kvpress.utils").compute_n_kept(length, ratio)
    assert kept_pairs(length, ratio) == theirs
    assert 1 <= kept_pairs(length, ratio) <= max(length, 1)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, NAN])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match="compression_ratio in"):
        check_ratio(ratio)
