"""What is taken for granted of transformers' models, with checks.

``hooks``            finds a model's decoder and attention layers, and their arguments
``queries``          computes queries that were not observed
``habits``           tests how an attention layer rotates queries and uses pairs
``watching``         observes the queries of attention layers
``traceless``        calls modules of the model without changing them
``fingerprint``      identifies models
``ranks``            the processes that share out a layer's heads
``weights``          reads weights that are quantised, offloaded or sharded
``chat``             the parts of a chat template around a text
``loading``          loads the models of the demo, the tests and the benchmarks
``index``            models on a package index, as GGUF files
``gguf_tokenizers``  their tokenizers

Of transformers' caches, masks and attention functions, ``moekv.cache`` knows the rest.

May import ``moekv.ops``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moekv.models.index import DEFAULT_MODEL, ModelUnavailableError, cache_dir, fetch_gguf
    from moekv.models.loading import load_model

_PLACES = {"load_model": "loading"} | dict.fromkeys(
    ("DEFAULT_MODEL", "ModelUnavailableError", "cache_dir", "fetch_gguf"), "index"
)

__all__ = ["DEFAULT_MODEL", "ModelUnavailableError", "cache_dir", "fetch_gguf", "load_model"]


def __getattr__(name: str) -> Any:  # they import packages that a press does not need
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"moekv.models.{_PLACES[name]}"), name)
