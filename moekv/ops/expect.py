"""Error messages of the argument checks."""

from collections.abc import Sequence

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST = 2**31 - 1
"""Kernels count positions in 32 bits."""

_FACTORS = 1e-18, 1e18
"""Factors, their inverses and their quotients are normal numbers of float32 within these bounds."""


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype without the name of torch."""
    return str(dtype).removeprefix("torch.")


class Expect:
    """The expectations of one op; every error names what was expected and what came.

    Messages are formatted where they are needed: that costs nothing otherwise, and can be traced
    where sizes are symbols.
    """

    def __init__(self, op: str, like: Tensor) -> None:
        self.op = op
        self.like = like

    def __call__(self, condition: bool, expected: str, *values: object) -> None:
        """Raise unless the condition holds, naming what was expected and what came."""
        if not condition:
            raise RuntimeError(f"moekv::{self.op}: expected {expected.format(*values)}")

    def rank(self, name: str, tensor: Tensor, rank: int, dims: str) -> None:
        """Expect a number of dimensions; ``dims`` names them, as in the documentation."""
        self(tensor.dim() == rank, "{} {}, got {}", name, dims, list(tensor.shape))

    def shape(self, name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
        """Expect a shape, which holds a size or, where any will do, the name of a dimension."""
        fits = tensor.dim() == len(shape) and all(
            isinstance(want, str) or size == want
            for size, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            dims = ", ".join(map(str, shape))
            self(False, "{} [{}], got {}", name, dims, list(tensor.shape))

    def dtype(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        """Expect a dtype, or float64 where that of the first argument is."""
        if dtype in (torch.float32, torch.float16) and self.like.dtype == torch.float64:
            return  # in higher precision, what goes with it may have either
        if tensor.dtype != dtype:
            self(False, "{} of dtype {}, got {}", name, dtype_name(dtype), dtype_name(tensor.dtype))

    def floating(self, name: str, tensor: Tensor) -> None:
        """Expect numbers with a fraction."""
        self.floating_dtype(name + " of dtype", tensor.dtype)

    def floating_dtype(self, name: str, dtype: object) -> None:
        """Expect the dtype of such numbers."""
        if not isinstance(dtype, torch.dtype):
            self(False, "{} float32, float16 or bfloat16, got {}", name, dtype)
        elif dtype not in _FLOATS:
            self(False, "{} float32, float16 or bfloat16, got {}", name, dtype_name(dtype))

    def device(self, name: str, tensor: Tensor) -> None:
        """Expect the device of the first argument."""
        self(tensor.device == self.like.device, "{} on the device of the first argument", name)

    def tensor(
        self, name: str, tensor: Tensor | None, dtype: torch.dtype, shape: Sequence[int | str]
    ) -> None:
        """Expect shape, dtype and device of a tensor, if there is one."""
        if tensor is not None:
            self.shape(name, tensor, shape)
            self.dtype(name, tensor, dtype)
            self.device(name, tensor)

    def most(self, what: str, count: int) -> None:
        """Expect no more than 32 bits can count."""
        self(count <= MOST, "at most 2^31 - 1 {}, got {}", what, count)

    def factor(self, name: str, value: float) -> None:
        """Expect a number whose inverse and quotients are normal ones."""
        least, most = _FACTORS
        self(least <= value <= most, "{} between 1e-18 and 1e18, got {}", name, value)

    def logits(self, scaling: float, softcap: float) -> None:
        """Expect what makes logits of products."""
        self.factor("scaling", scaling)
        if softcap != 0:
            self.factor("a softcap of 0 or", softcap)
