"""Dense layers of different lengths, and any other budget by one call."""

from collections.abc import Callable, Sequence

import torch

from moekv.budget.kept import Kept


def choose(
    under: Callable[[str, slice, Sequence[int]], list[Kept]],
    budget: str,
    totals: Sequence[int],
    lengths: Sequence[Sequence[int]],
    *,
    alike: bool,
) -> list[Kept]:
    """Select pairs under any budget.

    Parameters
    ----------
    under : callable
        Selects under a budget other than ``"layer"``: takes the budget, a slice of the layers and
        the pairs of a head in each row, as :func:`select` does.
    budget : str
        One of ``BUDGETS`` but ``"auto"``.
    totals : sequence of B ints
        Pairs that a head of each row retains, on average over the heads that share a budget.
    lengths : sequence of L sequences of B ints
        Pairs that a head of each row has.
    alike : bool
        Whether the rows of a layer have to retain as many.

    Returns
    -------
    list of L Kept
    """
    if budget != "layer":
        return under(budget, slice(None), totals)
    each = _layer_totals(under("model", slice(None), totals), lengths, alike=alike)
    return [kept for i, own in enumerate(each) for kept in under("uniform", slice(i, i + 1), own)]


def _layer_totals(
    kept: Sequence[Kept], lengths: Sequence[Sequence[int]], *, alike: bool
) -> list[list[int]]:
    """Give each layer the mean length of its heads, rounded so that the sum is the same.

    Parameters
    ----------
    kept : sequence of L Kept
        Chosen over all heads of all layers.
    lengths : sequence of L sequences of B ints
        Pairs that a head of each row has, at most as many as it may get.
    alike : bool
        Whether the rows of a layer have to retain as many; their sums are equal then.

    Returns
    -------
    list of L lists of B ints
        Pairs of a head. A row keeps ``floor(its pairs / H)`` of them over all layers, and one in
        each layer at least. Waits for the device, once.
    """
    num_heads = kept[0].shape[1]
    device = kept[0].indices.device
    counts = torch.stack([each.counts().to(device) for each in kept]).sum(-1)  # [L, B]
    rows = counts.double().mean(1, keepdim=True) if alike else counts.double()
    columns = [
        _rounded([n / num_heads for n in column], [most[b] for most in lengths])
        for b, column in enumerate(rows.T.tolist())
    ]
    if alike:
        columns *= counts.shape[1]
    return [list(layer) for layer in zip(*columns, strict=True)]


def _rounded(wanted: Sequence[float], most: Sequence[int]) -> list[int]:
    """Round to whole numbers of at least 1 and the same sum, the largest fractions up."""
    floors = [max(int(n), 1) for n in wanted]
    left = int(sum(wanted) + 1e-6) - sum(floors)
    order = sorted(range(len(wanted)), key=lambda i: floors[i] - wanted[i])
    for i in order:
        if left > 0 and floors[i] < most[i]:
            floors[i] += 1
            left -= 1
    for i in reversed(order):  # where some had to be raised to 1
        if left < 0 and floors[i] > 1:
            down = min(-left, floors[i] - 1)
            floors[i] -= down
            left += down
    return floors
