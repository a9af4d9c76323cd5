"""Caches of layers such as compression makes, which lack nothing."""

import torch
from transformers import DynamicCache

from moekv.budget import Kept
from moekv.cache.growing import GrowingLayer
from moekv.cache.ragged import RaggedLayer


def keep_all(cache: DynamicCache, ragged: bool) -> None:
    """Replace dense layers by such as compression makes, with all their pairs."""
    for index, layer in enumerate(cache.layers):
        kept = Kept.from_mask(torch.ones(layer.keys.shape[:3]).bool())
        if ragged:
            cache.layers[index] = RaggedLayer.compress(layer.keys, layer.values, kept)
        else:
            cache.layers[index] = GrowingLayer(layer.keys.clone(), layer.values.clone())
