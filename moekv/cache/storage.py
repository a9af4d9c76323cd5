"""Save a compressed cache and load it again: compress a long context once, ask it often."""

import hashlib
import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from moekv.cache.caches import cached_pairs
from moekv.cache.growing import GrowingLayer
from moekv.cache.layer import CompressedLayer
from moekv.cache.ragged import RaggedLayer
from moekv.files import whole_file
from moekv.models.fingerprint import fingerprint

_FORMAT = "moekv-cache-1"
_RAGGED = ("stored_keys", "stored_values", "begin", "end", "tail_keys", "tail_values")
_TABLES = ("begin", "end")  # those of notes are their layer's


def save_cache(cache: Cache, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Write a cache to one safetensors file.

    The file appears under its name only when it is whole: a crash leaves what was there before.

    Parameters
    ----------
    cache : Cache
        A ``DynamicCache`` whose layers are compressed, dense, or both.
    path : str or path
        The file to write or replace.
    model : PreTrainedModel
        The model that filled the cache; its fingerprint goes into the file.

    Raises
    ------
    TypeError
        If a layer is of another kind.
    ValueError
        If the cache is empty.
    OSError
        If the file cannot be written.
    """
    if not len(cache.layers):
        raise ValueError("expected a cache that a model has filled, got one without layers")
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        parts, description = _take_apart(layer, index)
        tensors |= {f"{index}.{name}": part.detach().contiguous() for name, part in parts.items()}
        layers.append(description)
    header = {"format": _FORMAT, "model": fingerprint(model), "layers": json.dumps(layers)}
    header["sha256"] = _checksum(header, tensors)
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_cache(path: str | os.PathLike[str], model: PreTrainedModel) -> DynamicCache:
    """Read a cache that :func:`save_cache` wrote.

    Parameters
    ----------
    path : str or path
        The file.
    model : PreTrainedModel
        The model that is to go on with the cache. Pairs go to the devices of its layers.

    Returns
    -------
    DynamicCache
        Ready for ``model.generate(..., past_key_values=cache)``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not a whole cache of moekv, or was filled by another model.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"expected {path} to be a cache of format {_FORMAT}, got {header.get('format')!r}"
        )
    if header.pop("sha256", None) != _checksum(header, tensors):
        raise ValueError(f"{path} was damaged or altered: its checksum does not match its contents")
    expected = fingerprint(model)
    if header["model"] != expected:
        raise ValueError(
            f"expected a cache of this model ({expected}), {path} was filled by {header['model']}"
        )
    cache = DynamicCache()
    devices = _layer_devices(model)
    for index, description in enumerate(json.loads(header["layers"])):
        prefix = f"{index}."
        parts = {
            name.removeprefix(prefix): tensor.to(devices[index])
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        cache.layers.append(_put_together(parts, description))
    return cache


def _take_apart(layer: CacheLayerMixin, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    parts, description = _pairs_of(layer, index)
    if isinstance(layer, CompressedLayer) and (notes := layer.whole_notes()) is not None:
        noted, description["notes"] = _pairs_of(notes, index)
        parts |= {f"notes.{name}": x for name, x in noted.items() if name not in _TABLES}
    return parts, description


def _pairs_of(layer: CacheLayerMixin, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(layer, RaggedLayer):
        parts = {name: getattr(layer, name) for name in _RAGGED}
        parts["end"] = parts["end"].clone()  # a file may not hold one memory under two names
        return parts, _counts(layer)
    if type(layer) in (DynamicLayer, GrowingLayer) and layer.is_initialized:
        keys, values = cached_pairs(layer)
        parts = {"keys": keys, "values": values}
        if isinstance(layer, GrowingLayer):
            return parts, _counts(layer) | {"evicted": layer.evicted}
        return parts, {}
    raise TypeError(
        f"expected compressed or dense dynamic layers, layer {index} is a {type(layer).__name__}"
    )


def _counts(layer: CompressedLayer) -> dict[str, Any]:
    return {
        "context_length": layer.context_length,
        "run": layer.run,
        "backend": layer.backend,
    }


def _put_together(parts: dict[str, Tensor], description: dict[str, Any]) -> CacheLayerMixin:
    noted = {
        name.removeprefix("notes."): parts.pop(name)
        for name in list(parts)
        if name.startswith("notes.")
    }
    layer: Any = _layer_of(parts, description)
    if noted:
        noted |= {name: parts[name] for name in _TABLES if name in parts}
        layer.notes = _layer_of(noted, description["notes"])
    return layer  # type: ignore[no-any-return]


def _layer_of(parts: dict[str, Tensor], description: dict[str, Any]) -> CacheLayerMixin:
    if "keys" in parts and description.get("evicted") is not None:
        growing = GrowingLayer(parts["keys"], parts["values"], backend=description["backend"])
        growing.evicted = description["evicted"]
        # Files of earlier versions count the pairs of the context instead.
        compressed = growing.evicted + description.get("compressed", 0)
        growing.context_length = description.get("context_length", compressed)
        growing.run = description.get("run", 0)
        return growing
    if "keys" in parts:
        dense = DynamicLayer()  # type: ignore[no-untyped-call]
        dense.update(parts["keys"], parts["values"])
        return dense
    layer = RaggedLayer(
        *(parts[name] for name in _RAGGED[:4]),
        length=description["context_length"],
        backend=description["backend"],
    )
    layer.run = description.get("run", 0)
    if parts["tail_keys"].shape[2]:
        layer.update(parts["tail_keys"], parts["tail_values"])
    return layer


def _checksum(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _layer_devices(model: PreTrainedModel) -> list[torch.device]:
    base: Any = getattr(model, model.base_model_prefix, model)
    layers = getattr(base, "language_model", base).layers
    return [next(layer.parameters()).device for layer in layers]
