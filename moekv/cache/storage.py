"""Save a compressed cache and load it again: compress a context once, query it often."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from moekv.cache.caches import agree_on_padding, is_static
from moekv.cache.described import check
from moekv.cache.parts import put_together, take_apart
from moekv.files import check_file, whole_file
from moekv.models.fingerprint import check_same, fingerprint
from moekv.models.hooks import find_layers, index_of
from moekv.models.weights import device_of, language_model, shard_of
from moekv.units import kind

_FORMAT = "moekv-cache-6"
# 2 knew no quantised pairs, 3 no biases, 4 no positions, 5 no tokens that wait.
_READ = (*(f"moekv-cache-{n}" for n in range(2, 6)), _FORMAT)
_TOKENS = "input_ids"
_KEYS = {"format", "model", "dtype", "shard", "layers", "sha256"}


def save_cache(
    cache: Cache,
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    *,
    input_ids: Tensor | None = None,
) -> None:
    """Write a cache to one safetensors file.

    The file appears under its name only when it is whole: a crash leaves what was there before.
    What a growing cache needs for its next compression goes along. Under tensor parallelism every
    rank writes a file of its own heads.

    Parameters
    ----------
    cache : Cache
        A ``DynamicCache`` or ``StaticCache`` whose layers are compressed or not, offloaded or not,
        with sliding windows or without.
    path : str or path
        The file to write or replace.
    model : PreTrainedModel
        The model that filled the cache; its fingerprint goes into the file.
    input_ids : Tensor [B, T], integer, optional
        The tokens that filled it, to go along: :func:`load_filled` gives them back.

    Raises
    ------
    TypeError
        If a layer is of another kind, such as transformers' quantised one, or `input_ids` are no
        tensor.
    ValueError
        If the cache is empty or not that of the model, or the path a folder's; or `input_ids` are
        not of its rows and length, or no integers of 32 bits.
    OSError
        If the file cannot be written.
    """
    check_file(path)
    model = language_model(model)
    if not len(cache.layers):
        raise ValueError("expected a cache that a model has filled, got one without layers")
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        parts, description = take_apart(layer, index)
        tensors |= {f"{index}.{name}": _plain(part) for name, part in parts.items()}
        layers.append(description)
    if input_ids is not None:
        tensors[_TOKENS] = _as_stored(input_ids)
    header = {
        "format": _FORMAT,
        "model": fingerprint(model),
        "dtype": str(model.dtype),
        "shard": shard_of(model),
        "layers": json.dumps(layers),
    }
    found = {name: (_NAMES.get(x.dtype, "other"), list(x.shape)) for name, x in tensors.items()}
    _check_layers(header, found, model)
    header["sha256"] = _checksum(header, tensors)
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_cache(path: str | os.PathLike[str], model: PreTrainedModel) -> DynamicCache | StaticCache:
    """Read a cache that :func:`save_cache` wrote.

    The whole header is validated before any tensor is read. A file can hold numbers and texts
    only: nothing of it is run, looked up or opened. (A checksum tells a damaged file, not
    one that somebody has made to mislead: see SECURITY.md.)

    Parameters
    ----------
    path : str or path
        The file.
    model : PreTrainedModel
        The model that is to go on with the cache: the same architecture with the same rotation,
        and weights within ``moekv.models.fingerprint.TOLERANCE``, in the same dtype. Pairs
        go to the devices of its layers.

    Returns
    -------
    DynamicCache or StaticCache
        Ready for ``model.generate(..., past_key_values=cache)``. An offloaded one comes back as
        one that is not.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not a whole cache of moekv, or was filled by another model.
    """
    return load_filled(path, model)[0]


def load_filled(
    path: str | os.PathLike[str], model: PreTrainedModel
) -> tuple[DynamicCache | StaticCache, Tensor | None]:
    """Read a cache as :func:`load_cache` does, and the tokens that filled it.

    Returns
    -------
    cache : DynamicCache or StaticCache
    input_ids : Tensor [B, T] int64, or None
        None where they were not saved.
    """
    check_file(path)
    model = language_model(model)
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = dict(file.metadata() or {})
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            found = {name: (x.get_dtype(), x.get_shape()) for name, x in slices.items()}
            try:
                layers = _check_header(header, found, model)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            # Copies: what is read from a file is a view of it, and changes with it.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if header.pop("sha256") != _checksum(header, tensors):
        raise ValueError(f"{path} was damaged or altered: its checksum does not match its contents")
    tokens = tensors.pop(_TOKENS, None)
    devices = _devices(model, len(layers))
    made = []
    for index, description in enumerate(layers):
        prefix = f"{index}."
        parts = {
            name.removeprefix(prefix): tensor.to(devices[index])
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        try:
            made.append(put_together(parts, description))
        except ValueError as error:
            raise ValueError(f"{path}: layer {index}: {error}") from error
    agree_on_padding(made)
    cache: DynamicCache | StaticCache = DynamicCache()
    cache.layers = made
    if is_static(cache):
        slots = max(description.get("slots", 0) for description in layers)
        cache = StaticCache(config=model.config, max_cache_len=slots)
        cache.layers = made
    return cache, None if tokens is None else tokens.long()


_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def _plain(part: Tensor) -> Tensor:
    return part.detach().contiguous()


def _as_stored(input_ids: Tensor) -> Tensor:
    """Write tokens in 32 bits, if they are what can be written so."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"expected input_ids as a tensor [B, T], got {kind(input_ids)}")
    stored = _plain(input_ids).to(torch.int32)
    whole = not (input_ids.is_floating_point() or input_ids.is_complex())
    if not whole or input_ids.dtype == torch.bool or not torch.equal(stored, input_ids):
        raise ValueError(
            f"expected input_ids [B, T] as integers of at most 32 bits, got {input_ids.dtype}"
        )
    return stored


def _check_header(
    header: dict[str, str], found: dict[str, tuple[str, list[int]]], model: PreTrainedModel
) -> list[dict[str, Any]]:
    """Validate the header of a file; return the descriptions of its layers."""
    if header.get("format") not in _READ:
        raise ValueError(
            f"expected a cache of format {' or '.join(_READ)}, got {header.get('format')!r:.99}"
        )
    if set(header) != _KEYS:
        raise ValueError(f"expected a header of {sorted(_KEYS)}, got {sorted(header)!r:.300}")
    check_same(header["model"], model, "a cache of this model")
    for name, own in (("dtype", str(model.dtype)), ("shard", shard_of(model))):
        if header[name] != own:
            raise ValueError(
                f"expected a cache of this model with {name} {own}, got one with "
                f"{header[name]!r:.99}"
            )
    return _check_layers(header, found, model)


def _check_layers(
    header: dict[str, str], found: dict[str, tuple[str, list[int]]], model: PreTrainedModel
) -> list[dict[str, Any]]:
    try:
        layers = json.loads(header["layers"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected descriptions of layers, got no JSON: {error}") from None
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"expected a list of layers, got {layers!r:.99}")
    config = model.config.get_text_config(decoder=True)
    wanted = len(DynamicCache(config=config).layers)
    if len(layers) != wanted:
        raise ValueError(f"expected a cache of {wanted} layers, got {len(layers)}")
    by_layer: list[dict[str, tuple[str, list[int]]]] = [{} for _ in layers]
    tokens = found.get(_TOKENS)
    for name, what in found.items():
        if name == _TOKENS:
            continue
        number, _, part = name.partition(".")
        if not (number.isascii() and number.isdigit() and len(number) < 6) or int(number) >= wanted:
            raise ValueError(f"expected tensors of {wanted} layers, got {name!r:.99}")
        if part in by_layer[int(number)]:
            raise ValueError(f"expected each tensor once, got {name!r:.99} again")
        by_layer[int(number)][part] = what
    widths = _widths(model, wanted)
    first: tuple[int, int] | None = None
    for index, (description, own) in enumerate(zip(layers, by_layer, strict=True)):
        within = f"layer {index}"
        batch, heads, key_dim, _, length = check(description, own, within=within)
        if widths[index] not in (None, heads * key_dim):
            raise ValueError(
                f"{within}: expected keys of {widths[index]} numbers for each token, got "
                f"{heads} heads of {key_dim}"
            )
        first = first or (batch, length)
        if (batch, length) != first:
            raise ValueError(
                f"{within}: expected {first[0]} rows of {first[1]} positions as in layer 0, got "
                f"{batch} of {length}"
            )
    if tokens not in (None, ("I32", list(first or ()))):
        raise ValueError(f"expected input_ids I32 {list(first or ())}, got {tokens}")
    return layers


def _checksum(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.cpu().contiguous().view(-1)  # where a dim of 1 may have had any stride
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _attention_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    return find_layers(model)[1]


def _widths(model: PreTrainedModel, count: int) -> list[int | None]:
    """Width of the key projection of each layer, all heads together; None where it is unknown."""
    widths: list[int | None] = [None] * count
    for layer in _attention_layers(model):
        weight: Any = getattr(getattr(layer, "k_proj", None), "weight", None)
        if hasattr(weight, "to_local"):  # DTensor
            weight = weight.to_local()
        plain = isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()
        if plain and index_of(layer) < count:
            widths[index_of(layer)] = weight.shape[0]
    return widths


def _devices(model: PreTrainedModel, count: int) -> list[torch.device]:
    """Where the layers' pairs go; those of layers that are unknown to the first one's."""
    known = {index_of(layer): device_of(layer) for layer in _attention_layers(model)}
    default = next(iter(known.values()))
    return [known.get(index, default) for index in range(count)]
