"""Calls of a model's own modules that leave no trace: they are the press's, not the model's."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def traceless(module: nn.Module) -> Iterator[None]:
    """Leave a module as it is, and the global random generator, whatever it does when it is called.

    Rotary embeddings that depend on the length of the text (dynamic NTK, LongRoPE) make other
    frequencies for positions behind it, and hold on to them. In train mode projections may have
    dropout (LoRA): it is left out.
    """
    modules = list(module.modules())
    training = [each for each in modules if each.training]
    held = [
        (each, dict(each.__dict__), dict(each._buffers))
        for each in modules
        if any(name.endswith("inv_freq") for name in each._buffers)
    ]
    try:
        for each in training:
            each.training = False
        yield
    finally:
        for each, attributes, buffers in held:
            each._buffers.clear()
            each._buffers.update(buffers)
            each.__dict__ = attributes
        for each in training:
            each.training = True
