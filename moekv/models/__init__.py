"""What is taken for granted of transformers and its models, and checked.

``hooks``        where a model's decoder and attention layers are, and what they are called with
``queries``      how an attention layer forms its queries
``habits``       how an attention layer rotates queries and treats pairs, tried once
``watching``     seeing what attention layers ask
``fingerprint``  telling models apart
``weights``      reading weights wherever and however they are stored
``chat``         where a text stands in a chat
``loading``      models of the demo, the tests and the benchmarks

May import ``moekv.ops``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moekv.models.loading import (
        DEFAULT_MODEL,
        ModelUnavailableError,
        cache_dir,
        fetch_gguf,
        load_model,
    )

__all__ = ["DEFAULT_MODEL", "ModelUnavailableError", "cache_dir", "fetch_gguf", "load_model"]


def __getattr__(name: str) -> Any:  # loading takes packages that a press does without
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("moekv.models.loading"), name)
