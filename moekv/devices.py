"""Numbers of the host on a device, for which the host does not wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def send(numbers: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Copy numbers of the host to a device.

    From pages that may be swapped out a copy to a GPU waits for all that the GPU has to do before
    it. So numbers lie in pinned memory until they are there, which torch sees to.

    Parameters
    ----------
    numbers : number, (nested) sequence of numbers, or Tensor on the CPU
    device : torch.device or str
    dtype : torch.dtype, optional
        By default that of the numbers, as ``torch.tensor`` takes them.

    Returns
    -------
    Tensor
    """
    held = torch.as_tensor(numbers, dtype=dtype, device="cpu")
    if torch.device(device).type == "cuda":
        held = held.pin_memory()
    return held.to(device, non_blocking=True)
