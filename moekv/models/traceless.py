"""Calls of a model's own modules that leave no trace: they are the press's, not the model's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def traceless(module: nn.Module) -> Iterator[None]:
    """Leave a module as it is, and the global random generator, whatever it does when it is called.

    Rotary embeddings that depend on the length of the text (dynamic NTK, LongRoPE) make other
    frequencies for positions behind it, and hold on to them, in new tensors or, by newer
    transformers, in the same. In train mode projections may have dropout (LoRA): it is left out.
    """
    modules = list(module.modules())
    training = [each for each in modules if each.training]
    held = [
        (each, dict(each.__dict__), dict(each._buffers), _frequencies(each))
        for each in modules
        if _frequencies(each)
    ]
    before = [[number.clone() for number in numbers] for *_, numbers in held]
    try:
        for each in training:
            each.training = False
        yield
    finally:
        for (each, attributes, buffers, numbers), values in zip(held, before, strict=True):
            each._buffers.clear()
            each._buffers.update(buffers)
            each.__dict__ = attributes
            for number, value in zip(numbers, values, strict=True):
                with torch.inference_mode(number.is_inference()), torch.no_grad():
                    number.copy_(value)
        for each in training:
            each.training = True


def _frequencies(module: nn.Module) -> list[Tensor]:
    """Return the frequencies that a rotary embedding holds."""
    named = module._buffers.items()
    return [x for name, x in named if name.endswith("inv_freq") and x is not None]
