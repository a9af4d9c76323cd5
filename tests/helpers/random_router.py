"""A calibrated router for a tiny model."""

from typing import Any

import torch

from moekv import CalibratedRouter
from moekv.models.fingerprint import fingerprint


def random_router(model: Any, seed: int = 0, **options: Any) -> CalibratedRouter:
    """Build a router for a tiny model whose every number matters."""
    options = {"experts": ["expected", "semantic"], "top_k": 2} | options
    router = CalibratedRouter(
        model=fingerprint(model),
        layers=list(range(model.config.num_hidden_layers)),
        hidden_size=model.config.hidden_size,
        num_kv_heads=model.config.num_key_value_heads,
        recipe={"model_name": "a tiny model"},
        **options,
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return router
