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
    """One router for each layer of a model, made when it first routes: it has a history.

    Other threads than the one that began a block have routers of their own in it, whose histories
    go on from the block's beginning: what one thread generates must not depend on when another one
    runs. Only the history of the thread that began the block outlives it.
    """

    def __init__(self) -> None:
        self._known: dict[int, BaseMoERouter] = {}
        # Of each layer that has been rated, and the size of its hidden states.
        self._layers: dict[int, tuple[weakref.ref[nn.Module] | None, int]] = {}
        self._clear()

    def _clear(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[int, dict[str, Tensor]] = {}
        self.begin()

    def begin(self) -> None:
        """Begin a block in this thread."""
        with self._lock:
            self._home, self._others = threading.get_ident(), threading.local()
            self._begun = {i: dict(r.named_buffers()) for i, r in self._known.items()}

    def __bool__(self) -> bool:
        """Whether any layer has been rated."""
        return bool(self._layers)

    def __getitem__(self, index: int) -> BaseMoERouter:
        """Return a layer's router in this thread."""
        router = self._known[index]
        if threading.get_ident() == self._home:
            return router
        own: dict[int, BaseMoERouter] = self._others.__dict__.setdefault("routers", {})
        if index not in own:
            own[index] = copy.deepcopy(router)
            own[index].load_state_dict(self._begun[index], strict=False)
        return own[index]

    def __getstate__(self) -> dict[str, Any]:
        """Return the routers without the model's modules, which another process does not have."""
        with self._lock:
            layers = {i: (None, size) for i, (_, size) in self._layers.items()}
            return {"_known": {i: copy.deepcopy(self[i]) for i in self._known}, "_layers": layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore saved routers."""
        self.__dict__ |= state
        self._clear()

    def check(self, modules: Iterable[nn.Module]) -> None:
        """Raise ``RuntimeError`` if the routers belong to another model."""
        for module in modules:
            owner, known = self._layers.get(index_of(module), (None, None))
            other = owner is not None and owner() is not module
            # A copied press does not know its modules: only sizes can be compared.
            size = getattr(getattr(module, "config", None), "hidden_size", None)
            if other or (known is not None and size not in (None, known)):
                raise RuntimeError(
                    "expected the model whose statistics and history this press holds, got "
                    "another: call reset_stats() first, or make a press for each model"
                )

    def meet(self, module: nn.Module, hidden_size: int) -> None:
        """Note a layer that is rated, with or without a router.

        Raises
        ------
        RuntimeError
            See :meth:`check`.
        """
        self.check([module])
        index = index_of(module)
        if self._layers.get(index, (None, 0))[0] is None:  # new, or of a copied press
            with self._lock:
                self._layers[index] = weakref.ref(module), hidden_size

    def of(self, index: int, make: Callable[[], BaseMoERouter]) -> BaseMoERouter:
        """Return a layer's router, which is made once."""
        with self._lock:
            if index not in self._known:
                self._known[index] = router = make()
                self._begun[index] = dict(router.named_buffers())
            return self[index]

    def take_in(self, index: int, hit_rates: Tensor) -> None:
        """Update a layer's router with measured hit rates [E]."""
        with self._lock:
            self[index].update_history(hit_rates)

    def take_in_later(self, index: int, hit_rates: Tensor) -> None:
        """Update a layer's router with hit rates [E] of queries after a compression."""
        with self._lock:
            self[index].update_later(hit_rates)

    def biases(self) -> dict[int, Tensor]:
        """Return selection biases [E] by layer, of the routers that have a history."""
        with self._lock:
            found = {i: self[i].history for i in self._known}
        return {i: bias for i, bias in sorted(found.items()) if bias is not None}
