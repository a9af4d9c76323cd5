"""Tell models apart: what was computed with one model must not be used with another."""

import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

_SAMPLES = 64  # values of each parameter that enter the fingerprint


def fingerprint(model: PreTrainedModel) -> str:
    """Name a model by its architecture and its weights.

    Names and shapes of all parameters and a sample of their values, rounded to bfloat16, so that a
    checkpoint has one fingerprint in whichever floating-point format it was loaded.

    Parameters
    ----------
    model : PreTrainedModel
        Any model.

    Returns
    -------
    str
        The model's type and 16 hexadecimal digits, such as ``llama-0123456789abcdef``.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(_sample(parameter.detach()).view(torch.uint8).numpy().data)
    return f"{model.config.model_type}-{digest.hexdigest()[:16]}"


def _sample(parameter: Tensor) -> Tensor:
    values = parameter.flatten()
    step = max(len(values) // _SAMPLES, 1)
    return values[::step][:_SAMPLES].to("cpu", torch.bfloat16).contiguous()
