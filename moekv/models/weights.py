"""Reading a model's weights wherever and however they are stored."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from moekv.units import kind

_READERS = ("dequantize", "dequantize_weight")


def language_model(model: Any) -> Any:
    """Take the transformers model out of PEFT's wrapper; any other is returned as it is.

    Raises
    ------
    TypeError
        It is no model, or another wrapper around one (``DataParallel``, a module of one's own).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model of transformers, got {kind(model)}")
    unwrap = getattr(model, "get_base_model", None)
    found: Any = unwrap() if callable(unwrap) else model
    if not hasattr(found, "config"):
        raise TypeError(
            f"expected a model of transformers, got {type(found).__name__}, which has no config; "
            "pass the model that it wraps"
        )
    return found


def has_weight(module: nn.Module) -> bool:
    """Return whether a module has a weight of its own, or is PEFT's layer around one that has."""
    return any(hasattr(module, name) for name in ("weight", "base_layer", *_READERS))


def read_weight(module: nn.Module, name: str = "weight", *, mesh: Any = None) -> Tensor | None:
    """Read a weight of a module as a plain tensor, as the module multiplies with it.

    Served are parameters that accelerate keeps elsewhere (on the CPU, on disk), tensor subclasses
    that can be dequantised (torchao, quanto), layers of bitsandbytes and of torch's dynamic
    quantisation, those of other libraries that have a ``dequantize`` of their own, active LoRA
    adapters of PEFT, and tensors of which every rank has a part (``DTensor``, and transformers'
    own tensor parallelism): these are gathered, so every rank has to ask.

    Parameters
    ----------
    module : nn.Module
        A leaf such as ``nn.Linear``, or PEFT's layer around one.
    name : str
        Of the parameter.
    mesh : DeviceMesh, optional
        See :func:`mesh_of`.

    Returns
    -------
    Tensor or None
        Floating, of the shape that the whole weight has, on any device; None where it cannot be
        read. It may be the parameter itself.
    """
    delta = None
    if hasattr(module, "base_layer"):
        delta = _adapters(module) if name == "weight" else None
        module = module.base_layer  # type: ignore[assignment]
    weight = _stored(module, name)
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return None
    weight = _gathered(module, name, weight.detach(), mesh)
    if delta is not None and delta.shape == weight.shape:
        weight = weight.float() + delta.to(weight.device, torch.float32)
    return weight


def _stored(module: nn.Module, name: str) -> Tensor | None:
    """Find a parameter, and undo what a library has done to its numbers."""
    stored: Any = getattr(module, name, None)
    if callable(stored) and not isinstance(stored, Tensor):
        stored = stored()  # torch's dynamically quantised layers have a method
    if isinstance(stored, Tensor) and stored.is_meta:
        stored = _offloaded(module, name)
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None and isinstance(stored, Tensor):
        if (four := getattr(stored, "quant_state", None)) is not None:
            whole = bitsandbytes.functional.dequantize_4bit(stored.data, four)
            return whole if isinstance(whole, Tensor) else None
        state = getattr(module, "state", None) if name == "weight" else None  # of the weight alone
        for owner in (stored, state):
            rows, scales = getattr(owner, "CB", None), getattr(owner, "SCB", None)
            if isinstance(rows, Tensor) and isinstance(scales, Tensor):
                return rows.float() * (scales.float() / 127)[:, None]
    if isinstance(stored, Tensor):
        plain = type(stored) in (Tensor, nn.Parameter) and not stored.is_quantized
        if plain or hasattr(stored, "full_tensor"):
            return stored
        try:
            numbers = stored.dequantize()
        except (NotImplementedError, RuntimeError, TypeError):
            return None
        return numbers if isinstance(numbers, Tensor) else None
    if stored is None and name == "weight":
        for method in _READERS:
            if callable(read := getattr(module, method, None)):
                found = read()
                return found if isinstance(found, Tensor) else None
    return stored if isinstance(stored, Tensor) else None


def _offloaded(module: nn.Module, name: str) -> Tensor | None:
    """Find what accelerate keeps of a module elsewhere."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in (hook, *getattr(hook, "hooks", ())):
        held: Mapping[str, Tensor] | None = getattr(each, "weights_map", None)
        if held is not None:
            try:
                return held[name]
            except KeyError:
                continue
    return None


def _adapters(module: Any) -> Tensor | None:
    """Sum what PEFT's active adapters add to a weight, unless it is in there already."""
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return None
    names = [name for name in module.active_adapters if name in getattr(module, "lora_A", ())]
    deltas = [module.get_delta_weight(name).detach().float() for name in names]
    return torch.stack(deltas).sum(0) if deltas else None


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a module computes on: that of its weights, or accelerate's."""
    for child in module.modules():
        hook: Any = getattr(child, "_hf_hook", None)
        for each in (hook, *getattr(hook, "hooks", ())):
            if getattr(each, "weights_map", None) is not None and each.execution_device is not None:
                return torch.device(each.execution_device)
    found = next(module.parameters(), None)
    return torch.device("cpu") if found is None else found.device


# --- Tensor parallelism ---------------------------------------------------------------------------


def mesh_of(model: Any) -> Any:
    """Return the device mesh over which a model's tensors are spread; None: they are not.

    Raises
    ------
    ValueError
        It is a part of a model that is spread, and does not know over which processes.
    """
    model = language_model(model)
    mesh, size = getattr(model, "_device_mesh", None), getattr(model, "_tp_size", None)
    if mesh is None:
        planned = any(x.__dict__.get("_hf_tp_plan") for x in model.modules())
        if planned or any(map(_is_spread, model.parameters())):
            raise ValueError(
                "expected the whole model that was loaded with tensor parallelism, which knows its "
                f"processes, got a part of it, {type(model).__name__}"
            )
        return None
    if not size or size == 1:
        return None
    return mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh


def _is_spread(weight: Any) -> bool:
    """Return whether a weight is a part of a tensor, and not all of it (``DTensor``)."""
    if type(weight) is nn.Parameter:  # the usual, and cheap to see
        return False
    return hasattr(weight, "placements") and weight.to_local().shape != weight.shape


def shard_of(model: Any) -> str:
    """Return which part of a model this process has, such as ``"0/2"``; ``"0/1"``: all of it."""
    mesh = mesh_of(model)
    return "0/1" if mesh is None else f"{mesh.get_local_rank()}/{mesh.size()}"


def _gathered(module: nn.Module, name: str, weight: Tensor, mesh: Any) -> Tensor:
    if hasattr(weight, "full_tensor"):  # DTensor
        return weight.full_tensor()  # type: ignore[no-any-return]
    plan = getattr(module, "_hf_tp_plan", None)
    if mesh is None or plan is None:
        return weight
    from transformers.integrations import tensor_parallel

    styles: Any = tensor_parallel.ALL_PARALLEL_STYLES
    dims = styles.plan_to_weight_dim if name == "weight" else styles.plan_to_bias_dim
    if (dim := dims.get(plan)) is None:
        return weight
    weight = weight.contiguous()
    parts = [torch.empty_like(weight) for _ in range(mesh.size())]
    distributed.all_gather(parts, weight, group=mesh.get_group())
    whole = torch.cat(parts, dim)
    if plan.startswith("packed"):
        whole = tensor_parallel.repack_weights(whole, dim, mesh.size(), 2)
    return whole
