"""The routers that a press has made for a model's layers."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from moekv.models.hooks import index_of
from moekv.routing.base import BaseMoERouter


class Routers:
    """The routers of one model's layers, made when a layer first comes: they have histories."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, tuple[weakref.ref[nn.Module] | None, BaseMoERouter]] = {}

    def __bool__(self) -> bool:
        """Whether any layer has come."""
        return bool(self._known)

    def __getitem__(self, index: int) -> BaseMoERouter:
        """Return a layer's router."""
        return self._known[index][1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the modules behind: in another process there are others."""
        with self._lock:
            return {"_known": {i: (None, copy.deepcopy(r)) for i, (_, r) in self._known.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was saved."""
        self.__dict__ |= state
        self._lock = threading.Lock()

    def check(self, modules: Iterable[nn.Module]) -> None:
        """Raise ``RuntimeError`` if a layer's router is of another model's."""
        for module in modules:
            owner, router = self._known.get(index_of(module), (None, None))
            other = owner is not None and owner() is not module
            # Of a copied press nobody knows whose they were, but for what shows.
            size = getattr(getattr(module, "config", None), "hidden_size", None)
            if other or (router is not None and size not in (None, router.hidden_size)):
                raise RuntimeError(
                    "expected the model whose statistics and history this press holds, got "
                    "another: call reset_stats() first, or make a press for each model"
                )

    def of(self, module: nn.Module, make: Callable[[], BaseMoERouter]) -> BaseMoERouter:
        """Return a layer's router; made once."""
        self.check([module])
        index = index_of(module)
        with self._lock:
            if index not in self._known:
                self._known[index] = weakref.ref(module), make()
            owner, router = self._known[index]
            if owner is None:  # of a copied press, whose model is the first that comes
                self._known[index] = weakref.ref(module), router
            return router

    def take_in(self, index: int, hit_rates: Tensor) -> None:
        """Tell a layer's router the hit rates [E] that were measured."""
        with self._lock:
            self._known[index][1].update_history(hit_rates)

    def take_in_later(self, index: int, hit_rates: Tensor) -> None:
        """Tell a layer's router the hit rates [E] of queries that came after a compression."""
        with self._lock:
            self._known[index][1].update_later(hit_rates)

    def biases(self) -> dict[int, Tensor]:
        """Return selection biases [E] by layer, of the routers that have a history."""
        with self._lock:
            found = {i: router.history for i, (_, router) in self._known.items()}
        return {i: bias for i, bias in sorted(found.items()) if bias is not None}
