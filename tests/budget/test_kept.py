import torch

from moekv.budget import (
    Kept,
)


def test_kept_marks_and_numbers_its_positions() -> None:
    indices = torch.tensor([0, 2, 1, 0, 1, 2, 3], dtype=torch.int32)
    kept = Kept(indices, torch.tensor([0, 2, 3, 3, 7], dtype=torch.int32), (2, 2, 4))
    assert kept.mask().int().tolist() == [
        [[1, 0, 1, 0], [0, 1, 0, 0]],
        [[0, 0, 0, 0], [1, 1, 1, 1]],
    ]
    assert kept.rows().tolist() == [0, 2, 5, 12, 13, 14, 15]
    assert kept.share().tolist() == [[0.5, 0.5, 0.5, 0.0], [0.5] * 4]
    again = Kept.from_mask(kept.mask())
    assert torch.equal(again.indices, indices) and torch.equal(again.offsets, kept.offsets)
