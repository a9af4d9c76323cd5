"""Mixture-of-experts compression of KV caches."""

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
