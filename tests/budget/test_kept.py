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


def test_what_stays_of_held_pairs_is_said_by_their_places() -> None:
    """As a layer shows its pairs: those of a shorter head stand at the right end."""
    torch.manual_seed(0)
    held = torch.rand(2, 3, 20) < 0.5
    held[1, 2] = False
    stays = held & (torch.rand(held.shape) < 0.5)
    within = Kept.from_mask(stays).within(Kept.from_mask(held))
    longest = int(held.sum(-1).max())
    assert within.shape == (2, 3, longest)
    for b in range(2):
        for h in range(3):
            row = stays[b, h][held[b, h]]
            assert within.mask()[b, h].tolist() == [False] * (longest - len(row)) + row.tolist()


def test_a_mask_of_a_known_count_gives_the_same() -> None:
    torch.manual_seed(0)
    for mask in (torch.rand(2, 3, 20) < 0.5, torch.zeros(1, 2, 5) > 0, torch.ones(1, 2, 5) > 0):
        waiting, known = Kept.from_mask(mask), Kept.from_mask(mask, int(mask.sum()))
        assert torch.equal(known.indices, waiting.indices)
        assert known.indices.dtype == waiting.indices.dtype == torch.int32
        assert torch.equal(known.offsets, waiting.offsets) and known.shape == waiting.shape
