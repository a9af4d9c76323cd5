"""Loads the native libraries, and chooses the implementation that serves a call.

``torch.ops.moekv.*`` exist once the CPU library is loaded, which importing this module does where
it has been built; the CUDA library is loaded where torch has CUDA.
"""

import ctypes
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moekv.ops import reference
from moekv.ops.formats import MAX_HEAD_DIM

Backend = Literal["auto", "cpu", "cuda", "torch"]
BACKENDS = get_args(Backend)

_LIB = Path(__file__).parents[1] / "lib"
_CPU_LIBRARY = _LIB / "libmoekv_cpu.so"
_CUDA_LIBRARY = _LIB / "libmoekv_cuda.so"
_BUILD = "run `pip install .` in the source tree, or `cmake -S . -B build && cmake --build build`"


def _load(library: Path) -> str | None:
    """Load a library of ops; None, or why that failed."""
    if not library.exists():
        return f"{library} has not been built; {_BUILD}"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{library} does not load with torch {torch.__version__}: {error}; {_BUILD}"
    return None


def _load_cuda(cpu_failure: str | None) -> str | None:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is not a CUDA build; "
            "install one (https://pytorch.org/get-started/locally)"
        )
    if not _CUDA_LIBRARY.exists():
        return (
            f"{_CUDA_LIBRARY} has not been built; build it where nvcc is, with the CMake option "
            "-DMOEKV_CUDA=ON or the environment variable MOEKV_CUDA=ON"
        )
    # The schemas are in the CPU library.
    return cpu_failure or _load(_CUDA_LIBRARY)


FAILURES: dict[str, str | None] = {"cpu": _load(_CPU_LIBRARY)}
FAILURES["cuda"] = _load_cuda(FAILURES["cpu"])
_native = frozenset(name for name, failure in FAILURES.items() if failure is None)


def available_backends() -> dict[str, str | None]:
    """Return which backends can be used.

    Returns
    -------
    dict
        For each name of ``BACKENDS`` None if it is available, else why it is not and how to get it.
    """
    reasons = dict.fromkeys(BACKENDS) | FAILURES
    if reasons["cuda"] is None and not torch.cuda.is_available():
        reasons["cuda"] = "torch finds no CUDA device; check the driver and CUDA_VISIBLE_DEVICES"
    return reasons


def check_backend(name: str) -> None:
    """Raise unless a backend is known and available.

    Raises
    ------
    ValueError
        ``name`` is none of ``BACKENDS``.
    RuntimeError
        The backend is not available; the message gives the reason and the remedy.
    """
    if name not in BACKENDS:
        raise ValueError(f"expected backend to be one of {', '.join(BACKENDS)}, got {name!r}")
    reason = available_backends()[name]
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")


def cpu_capability() -> str | None:
    """Name the instruction set of the CPU kernels: ``default``, ``avx2``, ``avx512`` or ``amx``.

    The environment variable ``MOEKV_CPU_CAPABILITY`` lowers the choice. None without the library.

    Raises
    ------
    ValueError
        The variable is none of these.
    """
    if FAILURES["cpu"] is not None:
        return None
    function = ctypes.CDLL(str(_CPU_LIBRARY)).moekv_cpu_capability
    function.restype = ctypes.c_char_p
    name: bytes | None = function()
    if name is None:
        wanted = os.environ.get("MOEKV_CPU_CAPABILITY")
        raise ValueError(
            f"expected MOEKV_CPU_CAPABILITY to be default, avx2, avx512 or amx, got {wanted!r}"
        )
    return name.decode()


_direct: dict[str, Callable[..., Any]] = {}


def call_directly(op: str, call: Callable[..., Any]) -> None:
    """Let ``implementation`` give ``call`` for a native op, instead of the op itself."""
    _direct[op] = call


_warned: set[str] = set()


def _warn_of_missing(device: str) -> None:
    """Warn once per device that its kernels are missing and PyTorch is used instead."""
    reason = FAILURES.get(device)
    if reason is not None and device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"moekv runs on plain PyTorch, many times slower than its kernels: {reason} "
            '(backend="torch" asks for it, without this warning)',
            stacklevel=4,
        )


def implementation(op: str, tensor: Tensor, backend: str) -> Callable[..., Any]:
    """Find what serves an op's call: the native op, or the reference.

    Parameters
    ----------
    op : str
    tensor : Tensor
        By whose device ``"auto"`` decides.
    backend : str
        One of ``BACKENDS``.

    Returns
    -------
    callable
        With the arguments of the op's schema.

    Raises
    ------
    ValueError
        `backend` is unknown, or the tensor is elsewhere.
    RuntimeError
        The backend is not available.
    TypeError
        `tensor` is not a tensor.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"moekv::{op}: expected a tensor, got {type(tensor).__name__}; torch.from_numpy makes "
            "one of an array"
        )
    device = tensor.device.type
    if backend == "torch" or (backend == "auto" and device not in _native):
        if backend == "auto" and not torch.compiler.is_compiling():
            _warn_of_missing(device)
        found: Callable[..., Any] = getattr(reference, op)
    else:
        if backend != "auto" and (backend not in _native or backend != device):
            check_backend(backend)
            raise ValueError(
                f"moekv::{op}: backend {backend!r} expected tensors on {backend}, got {device}"
            )
        found = _direct.get(op) or getattr(torch.ops.moekv, op)
    return found


def for_device(backend: str, tensor: Tensor) -> str:
    """Choose PyTorch on a GPU, for what has no kernel there, where the backend is ``"auto"``.

    Parameters
    ----------
    backend : str
        One of ``BACKENDS``.
    tensor : Tensor
        Whatever was given for one; :func:`implementation` refuses what is none.

    Returns
    -------
    str
        One of ``BACKENDS``.
    """
    return "torch" if backend == "auto" and getattr(tensor, "is_cuda", False) else backend


def for_heads(backend: str, *pairs: Tensor) -> str:
    """Choose PyTorch for heads too wide for the kernels, where the backend is ``"auto"``.

    Parameters
    ----------
    backend : str
        One of ``BACKENDS``.
    *pairs : Tensor [..., D]

    Returns
    -------
    str
        One of ``BACKENDS``.
    """
    is_wide = any(isinstance(x, Tensor) and x.dim() and x.shape[-1] > MAX_HEAD_DIM for x in pairs)
    return "torch" if is_wide and backend == "auto" else backend
