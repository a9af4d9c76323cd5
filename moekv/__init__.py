"""Mixture-of-experts compression of KV caches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moekv.calibrated import CalibratedRouter
    from moekv.calibration import CalibrationConfig, calibrate
    from moekv.chunks import prefill_in_chunks
    from moekv.decoding import DecodingConfig
    from moekv.experts import Expert, expert_names, register_expert
    from moekv.press import MoERouterPress
    from moekv.ragged_press import ragged
    from moekv.routers import (
        AdaptiveRouter,
        BaseMoERouter,
        EPLBRouter,
        HierarchicalRouter,
        PiKVMoERouter,
        RouterOutput,
        TopKBalancedRouter,
    )
    from moekv.storage import load_cache, save_cache
    from moekv.view import LayerView

__version__ = "0.1.0"

__all__ = [
    "AdaptiveRouter",
    "BaseMoERouter",
    "CalibratedRouter",
    "CalibrationConfig",
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
    "expert_names",
    "load_cache",
    "prefill_in_chunks",
    "ragged",
    "register_expert",
    "save_cache",
]

# Read when asked for: kvpress, which a press is a subclass of, takes seconds to import.
_MODULES = {
    "calibrated": ("CalibratedRouter",),
    "calibration": (
        "CalibrationConfig",
        "calibrate",
    ),
    "chunks": ("prefill_in_chunks",),
    "decoding": ("DecodingConfig",),
    "experts": (
        "Expert",
        "expert_names",
        "register_expert",
    ),
    "press": ("MoERouterPress",),
    "ragged_press": ("ragged",),
    "routers": (
        "AdaptiveRouter",
        "BaseMoERouter",
        "EPLBRouter",
        "HierarchicalRouter",
        "PiKVMoERouter",
        "RouterOutput",
        "TopKBalancedRouter",
    ),
    "storage": (
        "load_cache",
        "save_cache",
    ),
    "view": ("LayerView",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("moekv.ops")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"moekv.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
