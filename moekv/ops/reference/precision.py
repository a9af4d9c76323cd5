"""Arithmetic of the references: their own, whatever autocast is for."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def exact(function: _Function) -> _Function:
    """Have a function of tensors compute as it says, under autocast as well."""

    @functools.wraps(function)
    def compute(*args: Any, **kwargs: Any) -> Any:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        device = next((x.device.type for x in tensors), "cpu")
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return compute  # type: ignore[return-value]
