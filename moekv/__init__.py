"""Mixture-of-experts compression of KV caches.

The packages, each of which imports only from those below it (on one level are ``cache`` and
``experts``, ``routing`` and ``budget``, ``report`` and ``models``):

``contexts``     documents that are compressed once, for any number of questions
``press``        ``MoERouterPress``: compresses the caches of a model in a ``with`` block
``calibration``  fits routers to a model
``cache``        compressed cache layers, attention over them, saved caches
``experts``      score the pairs of a layer
``routing``      routes tokens to experts, and mixes the experts' scores
``budget``       counts the pairs to retain, and selects them
``report``       a page that shows what was retained
``models``       what is taken for granted of transformers' models, with checks
``ops``          the operators, and their kernels

Above them are ``integrations`` (moekv inside other packages) and ``cli``; ``files`` writes files
whole or not at all, and ``units`` bytes as people read them.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from logging import getLogger
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from moekv.cache.storage import load_cache, save_cache
    from moekv.calibration.calibrate import calibrate
    from moekv.calibration.config import CalibrationConfig
    from moekv.calibration.router import CalibratedRouter
    from moekv.contexts.context import CompressedContext, compress, load_context
    from moekv.contexts.documents import read_document
    from moekv.experts.base import Expert
    from moekv.experts.registry import expert_names, register_expert
    from moekv.experts.view import LayerView
    from moekv.integrations.kvpress.ragged import ragged
    from moekv.models.loading import load_model
    from moekv.press.chunks import prefill_in_chunks
    from moekv.press.options import DecodingConfig
    from moekv.press.press import MoERouterPress
    from moekv.routing.adaptive import AdaptiveRouter
    from moekv.routing.base import BaseMoERouter, RouterOutput
    from moekv.routing.eplb import EPLBRouter
    from moekv.routing.hierarchical import HierarchicalRouter
    from moekv.routing.pikv import PiKVMoERouter
    from moekv.routing.topk_balanced import TopKBalancedRouter

__version__ = "0.1.0"

# Imported on first use: an op alone does not load transformers.
_HOMES = {
    "AdaptiveRouter": "routing.adaptive",
    "BaseMoERouter": "routing.base",
    "CalibratedRouter": "calibration.router",
    "CalibrationConfig": "calibration.config",
    "CompressedContext": "contexts.context",
    "DecodingConfig": "press.options",
    "EPLBRouter": "routing.eplb",
    "Expert": "experts.base",
    "HierarchicalRouter": "routing.hierarchical",
    "LayerView": "experts.view",
    "PiKVMoERouter": "routing.pikv",
    "RouterOutput": "routing.base",
    "TopKBalancedRouter": "routing.topk_balanced",
    "calibrate": "calibration.calibrate",
    "compress": "contexts.context",
    "expert_names": "experts.registry",
    "load_cache": "cache.storage",
    "load_context": "contexts.context",
    "load_model": "models.loading",
    "prefill_in_chunks": "press.chunks",
    "ragged": "integrations.kvpress.ragged",
    "read_document": "contexts.documents",
    "register_expert": "experts.registry",
    "save_cache": "cache.storage",
}
__all__ = [
    "AdaptiveRouter",
    "BaseMoERouter",
    "CalibratedRouter",
    "CalibrationConfig",
    "CompressedContext",
    "DecodingConfig",
    "EPLBRouter",
    "Expert",
    "HierarchicalRouter",
    "LayerView",
    "MoERouterPress",
    "PiKVMoERouter",
    "RouterOutput",
    "TopKBalancedRouter",
    "calibrate",
    "compress",
    "expert_names",
    "load_cache",
    "load_context",
    "load_model",
    "prefill_in_chunks",
    "ragged",
    "read_document",
    "register_expert",
    "save_cache",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("moekv.ops")
    if name == "MoERouterPress":
        _HOMES[name] = _find_press()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"moekv.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "kvpress":
            raise
        return _needs_kvpress(name)
    value = getattr(module, name)
    globals()[name] = value
    return value


def _needs_kvpress(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(
            f"moekv.{name} wraps presses of kvpress, which is not installed: "
            "pip install 'moekv[kvpress]'"
        )

    refuse.__name__ = name
    return refuse


def _find_press() -> str:
    """Where kvpress imports, the press is one of its presses."""
    if find_spec("kvpress") is None:
        return "press.press"
    try:
        import_module("kvpress")
    except ImportError as error:
        getLogger("moekv").warning(
            "kvpress is installed and cannot be imported (%s): MoERouterPress works in blocks of "
            "its own, and not in kvpress's wrappers and pipeline",
            error,
        )
        return "press.press"
    return "integrations.kvpress.press"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
