"""Keys and values that compressed layers hand to attention, with a reference to their layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from moekv.models.hooks import wrap_method

if TYPE_CHECKING:
    from moekv.cache.growing import GrowingLayer
    from moekv.cache.ragged import RaggedLayer

NOT_DENSE = (
    "the keys and values of a compressed layer are ragged: heads keep different numbers of pairs. "
    "Attention reads them through moekv.cache.attention, which serves every attention "
    "implementation of transformers but 'eager'. Call cache.layers[i].to_dense() for padded "
    "tensors and their lengths"
)


def cropped_to(index: Any, length: int) -> int | None:
    """Read ``pairs[:, :, :n]`` or ``pairs[..., :n, :]``.

    Parameters
    ----------
    index : Any
        What stands in the brackets.
    length : int
        Positions that there are.

    Returns
    -------
    int or None
        n, from 0 to `length`; None where it is no such crop.
    """
    everything = slice(None)
    if not isinstance(index, tuple):
        return None
    positions = None
    if len(index) in (3, 4) and index[:2] == (everything, everything):
        positions = index[2] if index[3:] in ((), (everything,)) else None
    elif len(index) == 3 and index[0] is Ellipsis and index[2] == everything:
        positions = index[1]
    if isinstance(positions, slice):
        first, end, step = positions.indices(length)
        return end if (first, step) == (0, 1) else None
    return None


class DensePairs(Tensor):
    """The keys or the values of a dense compressed layer: a tensor that refers to its layer.

    To every operation it is a plain tensor [B, H, T, D], T the pairs that are held. A slice
    ``pairs[:, :, :n]`` remembers n: assigned back to the layer, as kvpress's pipeline does with
    what ``get_seq_length`` returned, it crops the layer to n true positions. So does a copy or a
    cast of it; what else is calculated of it is a plain tensor, and refers to no layer.

    Attributes
    ----------
    layer : GrowingLayer
    length : int
        True positions that it stands for.
    taken : tuple of int
        When the layer handed it out, see ``CompressedLayer.taken``.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    layer: GrowingLayer
    length: int
    taken: tuple[int, int]

    @classmethod
    def of(cls, pairs: Tensor, layer: GrowingLayer) -> DensePairs:
        """Make a view of a tensor that a layer holds."""
        view = pairs.as_subclass(cls)
        view.layer, view.length = layer, layer.evicted + pairs.shape[2]
        view.taken = layer.taken()
        return view

    def _like(self, pairs: Tensor, length: int) -> DensePairs:
        view = pairs.as_subclass(DensePairs)
        view.layer, view.length, view.taken = self.layer, length, self.taken
        return view

    def __getitem__(self, index: Any) -> Tensor:
        """Index as any tensor; see the class."""
        part = super().__getitem__(index)
        length = cropped_to(index, self.length)
        return part if length is None else self._like(part, length)

    def __copy__(self) -> DensePairs:
        """Refer to the same."""
        return self._like(self.as_subclass(Tensor), self.length)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy the numbers alone."""
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save the numbers alone."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _remembering(name: str) -> Callable[..., DensePairs]:
    method = getattr(Tensor, name)

    @functools.wraps(method)
    def copied(self: DensePairs, *args: Any, **kwargs: Any) -> DensePairs:
        return self._like(method(self, *args, **kwargs), self.length)

    return copied


for _name in ("clone", "contiguous", "detach", "to", "cpu", "cuda"):
    setattr(DensePairs, _name, _remembering(_name))
for _name in ("float", "double", "half", "bfloat16"):
    setattr(DensePairs, _name, _remembering(_name))


class RaggedPairs:
    """The keys or the values of a :class:`RaggedLayer`, as the cache hands them to attention.

    Has the ``shape`` [B, H, T, D] of the true length, ``numel()``, ``dtype`` and ``device`` of a
    tensor, can be cropped by a slice of positions and assigned back to its layer, and refuses
    everything else: no dense tensor exists.

    Parameters
    ----------
    layer : RaggedLayer
        The layer that owns the pairs.
    name : str
        Which half they are, ``"keys"`` or ``"values"``.
    length : int
        Positions that are visible, counting those that were evicted.
    """

    def __init__(self, layer: RaggedLayer, name: str, length: int) -> None:
        self.layer = layer
        self.name = name
        self.length = length
        # As they are now: an offloaded cache moves a layer away before attention reads it.
        self.rows, self.heads = layer.rows, layer.begin.shape
        self.tail = layer.tail_keys, layer.tail_values
        self.taken, self.context_length = layer.taken(), layer.context_length

    @property
    def shape(self) -> torch.Size:
        """The shape that the uncompressed tensor would have, [B, H, T, D]."""
        dim = self.rows.key_dim if self.name == "keys" else self.rows.value_dim
        return torch.Size((*self.heads, self.length, dim))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored pairs."""
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        """The device of the stored pairs."""
        return self.layer.device

    def numel(self) -> int:
        """Count the numbers of that shape: models ask whether there are any (Mllama)."""
        return self.shape.numel()

    def to(self, device: torch.device) -> RaggedPairs:
        """Return them as they are: layers that share pairs ask for them where they are (Gemma 3n).

        Raises
        ------
        TypeError
            Anywhere else.
        """
        if device != self.device:
            raise TypeError(f"a ragged cache has no dense tensor to take to {device}: {NOT_DENSE}")
        return self

    def beside(self, name: str) -> RaggedPairs:
        """Give the other half of the same pairs: of keys their values."""
        return self._part(name, self.length)

    def _part(self, name: str, length: int) -> RaggedPairs:
        part = RaggedPairs.__new__(RaggedPairs)
        part.__dict__ |= self.__dict__ | {"name": name, "length": length}
        return part

    def __getitem__(self, index: Any) -> RaggedPairs:
        """Crop to the first positions: ``pairs[:, :, :n]`` or ``pairs[..., :n, :]``."""
        length = cropped_to(index, self.length)
        if length is not None:
            return self._part(self.name, length)
        raise TypeError(f"expected a crop such as pairs[:, :, :n], got pairs[{index}]: {NOT_DENSE}")

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse every other attribute of a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(f"a ragged cache has no dense tensor to take '{name}' of: {NOT_DENSE}")

    def _refuse_operator(self, *_: Any) -> NoReturn:
        raise TypeError(f"a ragged cache has no dense tensor to calculate with: {NOT_DENSE}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse_operator
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __neg__ = _refuse_operator

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse to take part in any torch function."""
        raise TypeError(
            f"{getattr(function, '__name__', function)} needs dense tensors: {NOT_DENSE}"
        )


def keep_pairs_in_their_layers() -> None:
    """Have transformers' cache layers refuse the pairs of a compressed one. Idempotent.

    Without their layer the pairs would stand for as many positions as there are pairs, and every
    later token for a wrong one. ``DynamicCache(list(cache))`` is such a case.
    """
    for kind, name in (
        (DynamicLayer, "lazy_initialization"),
        (StaticLayer, "lazy_initialization"),
        (DynamicLayer, "update"),  # whose pairs may have been assigned
    ):
        wrap_method(kind, name, _refusing)


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    def take(self: Any, key_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        for keys in (key_states, self.keys):
            if isinstance(keys, DensePairs) and keys.layer.evicted:
                raise TypeError(
                    f"expected keys of tokens for a {type(self).__name__}, got the "
                    f"{keys.shape[2]} that a compressed layer retains of "
                    f"{keys.layer.get_seq_length()} positions, which would be lost: "
                    "copy.deepcopy(cache) copies a compressed cache, and other.layers = "
                    "cache.layers hands its layers on"
                )
        return method(self, key_states, *args, **kwargs)

    return take
