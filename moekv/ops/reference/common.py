"""Helpers of the references."""

import torch
from torch import Tensor

LEAST_NORM = 1e-12
"""Below it a vector has no direction."""

TILE = 1024
"""Keys at a time: bounds the memory beside the output."""


def widened(tensor: Tensor) -> Tensor:
    """Give float64 as it is, anything else as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def assert_on_cpu(condition: Tensor, message: str) -> None:
    """Raise where the condition does not hold; on other devices that would be to wait for it."""
    if condition.device.type == "cpu":
        torch._assert_async(condition, message)
