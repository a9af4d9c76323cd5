"""The routers of a press, one for each layer."""

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
    """One router for each layer of a model, made when it is first rated: it has a history."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, tuple[weakref.ref[nn.Module] | None, BaseMoERouter]] = {}

    def __bool__(self) -> bool:
        """Whether any layer has been rated."""
        return bool(self._known)

    def __getitem__(self, index: int) -> BaseMoERouter:
        """Return a layer's router."""
        return self._known[index][1]

    def __getstate__(self) -> dict[str, Any]:
        """Return the routers without the model's modules, which another process does not have."""
        with self._lock:
            return {"_known": {i: (None, copy.deepcopy(r)) for i, (_, r) in self._known.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore saved routers."""
        self.__dict__ |= state
        self._lock = threading.Lock()

    def check(self, modules: Iterable[nn.Module]) -> None:
        """Raise ``RuntimeError`` if the routers belong to another model."""
        for module in modules:
            owner, router = self._known.get(index_of(module), (None, None))
            other = owner is not None and owner() is not module
            # A copied press does not know its modules: only the number of layers can be compared.
            size = getattr(getattr(module, "config", None), "hidden_size", None)
            if other or (router is not None and size not in (None, router.hidden_size)):
                raise RuntimeError(
                    "expected the model whose statistics and history this press holds, got "
                    "another: call reset_stats() first, or make a press for each model"
                )

    def of(self, module: nn.Module, make: Callable[[], BaseMoERouter]) -> BaseMoERouter:
        """Return a layer's router, which is made once."""
        self.check([module])
        index = index_of(module)
        with self._lock:
            if index not in self._known:
                self._known[index] = weakref.ref(module), make()
            owner, router = self._known[index]
            if owner is None:  # of a copied press, which belongs to the first model it is used on
                self._known[index] = weakref.ref(module), router
            return router

    def take_in(self, index: int, hit_rates: Tensor) -> None:
        """Update a layer's router with measured hit rates [E]."""
        with self._lock:
            self._known[index][1].update_history(hit_rates)

    def take_in_later(self, index: int, hit_rates: Tensor) -> None:
        """Update a layer's router with hit rates [E] of queries after a compression."""
        with self._lock:
            self._known[index][1].update_later(hit_rates)

    def biases(self) -> dict[int, Tensor]:
        """Return selection biases [E] by layer, of the routers that have a history."""
        with self._lock:
            found = {i: router.history for i, (_, router) in self._known.items()}
        return {i: bias for i, bias in sorted(found.items()) if bias is not None}
