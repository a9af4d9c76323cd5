"""The ops of moekv: native kernels on CPU and CUDA tensors, plain PyTorch anywhere.

``torch.ops.moekv.*`` exist once the native library is loaded, which importing this module does
where it has been built. The functions here choose the backend, keep the argument order of the
schemas, and work under ``torch.compile(fullgraph=True)``.
"""

import ctypes
import os
import warnings
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekv import reference

BACKENDS = ("auto", "cpu", "cuda", "torch")


class ScoreKind(IntEnum):
    """What :func:`expert_scores` can compute, see there."""

    MASS = reference.MASS
    ATTENTION = reference.ATTENTION
    DIVERSITY = reference.DIVERSITY
    LAG = reference.LAG


class GatingTopk(NamedTuple):
    """Result of :func:`gating_topk`."""

    weights: Tensor
    experts: Tensor
    prob_sum: Tensor
    load: Tensor
    entropy: Tensor


class ProjectTokens(NamedTuple):
    """Result of :func:`project_tokens`."""

    projected: Tensor
    standout: Tensor


class SelectKept(NamedTuple):
    """Result of :func:`select_kept`."""

    indices: Tensor
    offsets: Tensor


# --- Backends -------------------------------------------------------------------------------------

_LIB = Path(__file__).parent / "lib"
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


_failures: dict[str, str | None] = {"cpu": _load(_CPU_LIBRARY)}
_failures["cuda"] = _load_cuda(_failures["cpu"])
_native = frozenset(name for name, failure in _failures.items() if failure is None)


def available_backends() -> dict[str, str | None]:
    """Say which backends can be used.

    Returns
    -------
    dict
        For each name of ``BACKENDS`` None if it is available, else why it is not and how to get it.
    """
    reasons = dict.fromkeys(BACKENDS) | _failures
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
        The backend is not available; the message says why and how to get it.
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
    if _failures["cpu"] is not None:
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


_warned: set[str] = set()


def _warn_of_missing(device: str) -> None:
    """Say once per device that its kernels are missing and PyTorch stands in for them."""
    reason = _failures.get(device)
    if reason is not None and device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"moekv runs on plain PyTorch, many times slower than its kernels: {reason} "
            '(backend="torch" asks for it, without this warning)',
            stacklevel=4,
        )


def _implementation(op: str, tensor: Tensor, backend: str) -> Callable[..., Any]:
    device = tensor.device.type
    if backend == "torch" or (backend == "auto" and device not in _native):
        if backend == "auto" and not torch.compiler.is_compiling():
            _warn_of_missing(device)
        namespace: Any = reference
    else:
        if backend != "auto" and (backend not in _native or backend != device):
            check_backend(backend)
            raise ValueError(
                f"moekv::{op}: backend {backend!r} expected tensors on {backend}, got {device}"
            )
        namespace = torch.ops.moekv
    implementation: Callable[..., Any] = getattr(namespace, op)
    return implementation


# --- Ops ------------------------------------------------------------------------------------------


def gating_topk(
    logits: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    k: int,
    temperature: float = 1.0,
    backend: str = "auto",
) -> GatingTopk:
    """Choose the k best experts of every token, and count what each expert got.

    Probabilities are the softmax of ``logits / temperature`` over the experts. The k experts with
    the highest probability + ``bias`` are chosen, ties to the lower expert. The bias moves the
    choice and never the weights, as in auxiliary-loss-free balancing [3]_.

    Parameters
    ----------
    logits : Tensor [..., num_experts], float32, float16 or bfloat16
        Up to 256 experts. NaN counts as -inf, +inf as the largest finite float; a token with no
        finite logit is uniform over the experts.
    bias : Tensor [num_experts], float32, optional
        Added to the probabilities for the choice alone. NaN counts as -inf.
    mask : Tensor [...], bool, optional
        True: a real token. Others get weights 0 and experts 0 to k - 1, and count nowhere.
    importance : Tensor [...], float32, optional
        Slot j of a token counts with ``clamp(k * importance - j, 0, 1)``, the first one with 1:
        in [0, 1], so many of the k experts are consulted. NaN counts as 0. None: all count with 1.
    k : int
        Experts per token, 1 to num_experts.
    temperature : float
        Above 0.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``logits``.

    Returns
    -------
    GatingTopk
        ``weights [..., k]`` float32: probabilities of the chosen, as far as their slots
        count, over their sum, best first;
        ``experts [..., k]`` int32; ``prob_sum [num_experts]`` float32: sum of the probabilities
        over the real tokens; ``load [num_experts]`` int64: how often each expert got a slot that
        counts; ``entropy``, a scalar: sum of the probabilities' entropies over the real tokens, in
        nats. ``weights`` and ``prob_sum`` are differentiable with respect to ``logits``,
        ``weights`` also with respect to ``importance``.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``logits`` are elsewhere, or ``mask`` has another shape.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype, device or value.

    References
    ----------
    .. [1] Lepikhin et al., "GShard", arXiv:2006.16668.
    .. [2] Fedus et al., "Switch Transformers", arXiv:2101.03961.
    .. [3] Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
       arXiv:2408.15664.
    """
    op = _implementation("gating_topk", logits, backend)
    if logits.dim() == 2:
        return GatingTopk(*op(logits, bias, mask, importance, k=k, temperature=temperature))
    leading = logits.shape[:-1]
    flat: list[Tensor | None] = []
    for name, tensor in (("mask", mask), ("importance", importance)):
        if tensor is not None and tensor.shape != leading:
            raise ValueError(
                f"moekv::gating_topk: expected {name} {list(leading)}, got {list(tensor.shape)}"
            )
        flat.append(None if tensor is None else tensor.reshape(-1))
    rows = logits.flatten(0, -2) if logits.dim() > 2 else logits[None]
    weights, experts, *sums = op(rows, bias, *flat, k=k, temperature=temperature)
    shape = (*leading, k)
    return GatingTopk(weights.view(shape), experts.view(shape), *sums)


def expert_scores(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    start: Tensor | None = None,
    *,
    kinds: Sequence[ScoreKind],
    scaling: float,
    softcap: float = 0.0,
    pool: int = 1,
    lag: int = 128,
    backend: str = "auto",
) -> Tensor:
    """Score every cached pair in several ways, in as few passes over the cache as they need.

    =============  =================================================================================
    kind           score of a key
    =============  =================================================================================
    ``MASS``       mean attention that the row's real window queries pay to it (sums to 1 over T),
                   causal: as SnapKV [1]_ sees the prompt from its last window
    ``ATTENTION``  log of the attention that a query which can see the key pays to it: ``MASS``
                   corrected for the window queries before the key, averaged over the real ones
                   of the ``pool`` nearest positions, at least 1e-20
    ``DIVERSITY``  minus the cosine with the mean direction of the row's real keys (KeyDiff [2]_)
    ``LAG``        log of the spread over channels of key and value, each scaled by the range of the
                   next ``lag`` tokens, as a share of its partition (LagKV [3]_)
    =============  =================================================================================

    Padding positions score 0 in ``MASS`` and -inf in the others. NaN in a (row, head) stays there.
    Memory beside the output is O(T): the [W, T] attention matrix never exists.

    Parameters
    ----------
    keys : Tensor [B, H, T, D], float32, float16 or bfloat16
    values : Tensor [B, H, T, Dv], dtype of ``keys``
    queries : Tensor [B, Hq, W, D], dtype of ``keys``
        Rotated queries of the last W <= T positions; Hq is a multiple of H.
    start : Tensor [B], int32, optional
        Padding positions at the left of each row. None: no padding.
    kinds : sequence of ScoreKind
    scaling : float
        Factor of the query-key products, as in the model's attention.
    softcap : float
        Logits become ``softcap * tanh(logits / softcap)``; 0: they stay.
    pool : int
        Odd number of positions that ``ATTENTION`` averages.
    lag : int
        Tokens in a partition of ``LAG``.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``keys``.

    Returns
    -------
    Tensor [len(kinds), B, H, T], float32
        One slice per kind in the order of ``kinds``.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``keys`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype, device or value.

    References
    ----------
    .. [1] Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation",
       arXiv:2404.14469.
    .. [2] Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction", arXiv:2504.15364.
    .. [3] Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are
       Important", arXiv:2504.04704.
    """
    op = _implementation("expert_scores", keys, backend)
    scores: Tensor = op(
        keys,
        values,
        queries,
        start,
        kinds=[int(kind) for kind in kinds],
        scaling=scaling,
        softcap=softcap,
        pool=pool,
        lag=lag,
    )
    return scores


def expected_attention(
    queries: Tensor,
    keys: Tensor,
    start: Tensor | None = None,
    *,
    scaling: float = 1.0,
    softcap: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Rate pairs by what the queries of their own tokens, and of those before, would look at.

    What follows a text quotes it and goes on from it. A token that comes again asks as it did the
    first time: its query, as if it stood behind the last token, looks at the pair of the token
    itself and at the 4 behind it, which say what came next. KVzip [1]_ reads the context again to
    see these looks; expected attention [2]_ takes the distribution of the queries for the queries
    themselves.

    With ``a`` the attention of a query: ``score[t]`` is the log of the root of the sum, over the
    tokens t - 4 ... t of the row, of the mean over the group's heads of ``a[t]`` squared, where the
    sum is at least 1e-36. Of the softmax's sum over all keys the first 4 keys are terms of their
    own, 60 more stand for equal parts of the others (``moekv.reference.sample_places``), and the
    keys that are asked about come on top; up to 64 keys it is the sum itself. A row with padding
    scores as it does alone. Memory beside the output is O(1) for each head.

    Parameters
    ----------
    queries : Tensor [B, Hq, T, D], float32, float16 or bfloat16
        Of all tokens, rotated to the position behind the last one; or not rotated, where ``keys``
        are turned back by that position, as products alone count. Hq is a multiple of H.
    keys : Tensor [B, H, T, D], dtype of ``queries``
    start : Tensor [B], int32, optional
        Padding positions at the left of each row. None: no padding.
    scaling : float
        Factor of the query-key products, as far as it is not in the keys.
    softcap : float
        Logits become ``softcap * tanh(logits / softcap)``; 0: they stay.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``queries``.

    Returns
    -------
    Tensor [B, H, T], float32
        0 at padding, which is not read. NaN in a (row, head) stays there.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``queries`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype, device or value.

    References
    ----------
    .. [1] Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
       arXiv:2505.23416.
    .. [2] Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from
       Future Queries Distribution", arXiv:2510.00636.
    """
    op = _implementation("expected_attention", queries, backend)
    scores: Tensor = op(queries, keys, start, scaling=scaling, softcap=softcap)
    return scores


def project_tokens(
    hidden_states: Tensor, weight: Tensor, mask: Tensor | None = None, *, backend: str = "auto"
) -> ProjectTokens:
    """Project hidden states, and say how much each token stands out from the others of its row.

    What stands out: the cosine distance of the hidden state from the mean direction of the row's
    real tokens, standardised over them (mean 0, standard deviation 1; 1e-4 is added to the
    deviation, far above the rounding noise of equal tokens). Scaling the hidden states does not
    change it. For a few projections: both take two reads of the hidden states.

    Parameters
    ----------
    hidden_states : Tensor [B, T, hidden], float32, float16 or bfloat16
    weight : Tensor [P, hidden], dtype of ``hidden_states``
    mask : Tensor [B, T], bool, optional
        True: a real token. Others are not read.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of
        ``hidden_states``.

    Returns
    -------
    ProjectTokens
        ``projected [B, T, P]`` float32: ``hidden_states @ weight.T``, differentiable with respect
        to both; ``standout [B, T]`` float32. Both are 0 at padding. NaN in a row stays there.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``hidden_states`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype or device.
    """
    op = _implementation("project_tokens", hidden_states, backend)
    return ProjectTokens(*op(hidden_states, weight, mask))


def mix_scores(
    scores: Tensor,
    weights: Tensor,
    experts: Tensor,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Mix the experts' scores by the gate's choice, each mapped to the common scale first.

    ``mixed = sum over j of weights[j] * (gain * scores[experts[j]] + offset)``, where gain and
    offset are those of the chosen expert. A term with weight 0 adds nothing, whatever its score.

    Parameters
    ----------
    scores : Tensor [E, B, H, T], float32
    weights : Tensor [B, T, k] or [B, H, T, k], float32
        Without H the heads share them.
    experts : Tensor, int32
        Shape of ``weights``; values in [0, E).
    gain, offset : Tensor [E, B, H], float32, optional
        None: 1 and 0.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``scores``.

    Returns
    -------
    Tensor [B, H, T], float32

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``scores`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype, device or value.
    """
    op = _implementation("mix_scores", scores, backend)
    mixed: Tensor = op(scores, weights, experts, gain, offset)
    return mixed


def select_kept(
    scores: Tensor,
    start: Tensor | None = None,
    *,
    total: int | Sequence[int],
    sinks: int = 0,
    window: int = 0,
    floor: int = 1,
    backend: str = "auto",
) -> SelectKept:
    """Choose the pairs to keep: exactly ``total`` of each group of rows that share a budget.

    Every row keeps its first ``sinks`` and last ``window`` real positions, then its best others
    until it has ``floor``; the rest of the total are the highest scores over all rows of the
    group. With ``c = total // R`` pairs per row, ``sinks`` is cut to ``c``, ``window`` to
    ``c - sinks`` and ``floor`` to ``c``. Ties go to the lower row, then the lower position; NaN is
    below every number, padding below NaN.

    Parameters
    ----------
    scores : Tensor [G, R, T], float32, float16 or bfloat16
        G groups of R rows: ``[B * H, 1, T]`` gives every head the same number, ``[B, H, T]`` one
        threshold over the heads of a layer, ``[B, L * H, T]`` over the heads of a model.
    start : Tensor [G, R], int32, optional
        Padding positions at the left of each row. None: no padding.
    total : int or sequence of G ints
        Pairs that each group keeps, R to R * T. One int holds for every group.
    sinks, window, floor : int
        See above.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``scores``.

    Returns
    -------
    SelectKept
        ``indices [sum(total)]`` int32: positions, ascending in each row, rows in order;
        ``offsets [G * R + 1]`` int32: where each row begins in ``indices``.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``scores`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype, device or value.
    """
    op = _implementation("select_kept", scores, backend)
    totals = [total] * scores.shape[0] if isinstance(total, int) else list(total)
    return SelectKept(*op(scores, start, total=totals, sinks=sinks, window=window, floor=floor))


def kv_compact_(
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    packed: bool = False,
    backend: str = "auto",
) -> None:
    """Move the kept pairs to the front, in place: no second buffer, as indices ascend.

    Parameters
    ----------
    keys : Tensor [B, H, T, D], float32, float16 or bfloat16
        The last dimension is dense. Written.
    values : Tensor [B, H, T, Dv]
        Like ``keys``. Written.
    indices : Tensor [B, H, n], or flat with ``offsets``, int32
        Kept positions, ascending in each row.
    offsets : Tensor [B * H + 1], int32, optional
        Where each row begins in ``indices``, as from :func:`select_kept`.
    packed : bool
        False: to the front of each row, whose other pairs keep their old contents or have been
        overwritten. True: all rows one after another to the front of the storage, of contiguous
        ``keys`` and ``values``.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``keys``.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``keys`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype or device. On the CPU
        also where indices do not ascend or are not in [0, T): before anything has moved. On CUDA,
        where to check would be to wait, such an index is neither read nor moved.
    """
    op = _implementation("kv_compact_", keys, backend)
    op(keys, values, indices, offsets, packed=packed)


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    tail_keys: Tensor | None = None,
    tail_values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attend with a few queries to a cache whose heads keep different numbers of pairs.

    Every query sees all stored rows of its head. Of the dense tail, query i of the last Q positions
    sees the positions up to its own for which ``mask`` is True. Split-KV flash decoding [1]_: the
    query heads of a group read each key once.

    Parameters
    ----------
    query : Tensor [B, Hq, Q, D], float32, float16 or bfloat16
        Rotated queries of the last Q positions; Hq is a multiple of H.
    keys : Tensor [N, D], dtype of ``query``
        Stored keys of all heads.
    values : Tensor [N, Dv], dtype of ``query``
    begin, end : Tensor [B, H], int32
        Head h of row b owns the stored rows ``begin[b, h]`` to ``end[b, h] - 1``. Heads may be
        empty, and may share rows, as beams do.
    tail_keys, tail_values : Tensor [B, H, S, D] and [B, H, S, Dv], optional
        Positions appended since, the Q of the queries at their end.
    mask : Tensor, bool, broadcastable to [B, Hq, Q, S], optional
        True: the query may see the tail position.
    scaling : float
        Factor of the query-key products.
    softcap : float
        Logits become ``softcap * tanh(logits / softcap)``; 0: they stay.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``query``.

    Returns
    -------
    Tensor [B, Q, Hq, Dv], dtype of ``query``
        0 for a query that sees nothing.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``query`` is elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype or device. On the CPU
        also where ``begin`` or ``end`` leave the stored rows; on CUDA they are clamped.

    References
    ----------
    .. [1] Dao et al., "Flash-Decoding for long-context inference", 2023.
    """
    op = _implementation("ragged_attention", query, backend)
    output: Tensor = op(
        query,
        keys,
        values,
        begin,
        end,
        tail_keys,
        tail_values,
        mask,
        scaling=scaling,
        softcap=softcap,
    )
    return output


# --- Shapes and gradients for torch.compile and autograd ------------------------------------------


def _fake_gating_topk(
    logits: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    k: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    return (
        logits.new_empty(num_tokens, k, dtype=torch.float32),
        logits.new_empty(num_tokens, k, dtype=torch.int32),
        logits.new_empty(num_experts, dtype=torch.float32),
        logits.new_empty(num_experts, dtype=torch.int64),
        logits.new_empty((), dtype=torch.float32),
    )


def _fake_expert_scores(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    start: Tensor | None = None,
    *,
    kinds: Sequence[int],
    scaling: float,
    softcap: float = 0.0,
    pool: int = 1,
    lag: int = 128,
) -> Tensor:
    return keys.new_empty(len(kinds), *keys.shape[:3], dtype=torch.float32)


def _fake_expected_attention(
    queries: Tensor,
    keys: Tensor,
    start: Tensor | None = None,
    *,
    scaling: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    return keys.new_empty(keys.shape[:3], dtype=torch.float32)


def _fake_project_tokens(
    hidden_states: Tensor, weight: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape = hidden_states.shape[:2]
    return (
        hidden_states.new_empty(*shape, len(weight), dtype=torch.float32),
        hidden_states.new_empty(shape, dtype=torch.float32),
    )


def _fake_mix_scores(
    scores: Tensor,
    weights: Tensor,
    experts: Tensor,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    return scores.new_empty(scores.shape[1:], dtype=torch.float32)


def _fake_select_kept(
    scores: Tensor,
    start: Tensor | None = None,
    *,
    total: Sequence[int],
    sinks: int = 0,
    window: int = 0,
    floor: int = 1,
) -> tuple[Tensor, Tensor]:
    groups, rows, _ = scores.shape
    return (
        scores.new_empty(sum(total), dtype=torch.int32),
        scores.new_empty(groups * rows + 1, dtype=torch.int32),
    )


def _fake_kv_compact_(
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    packed: bool = False,
) -> None:
    return None


def _fake_ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    tail_keys: Tensor | None = None,
    tail_values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
) -> Tensor:
    batch, num_query_heads, num_queries, _ = query.shape
    return query.new_empty(batch, num_queries, num_query_heads, values.shape[1])


def _gating_topk_setup_context(
    ctx: Any,
    inputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    logits, _, mask, importance = inputs
    weights, experts, _, *statistics = output
    ctx.mark_non_differentiable(experts, *statistics)
    ctx.save_for_backward(logits, mask, importance, weights, experts)
    ctx.temperature = keyword_only_inputs["temperature"]


def _gating_topk_backward(
    ctx: Any,
    grad_weights: Tensor,
    grad_experts: None,
    grad_prob_sum: Tensor,
    grad_load: None,
    grad_entropy: None,
) -> tuple[Tensor, None, None, Tensor | None]:
    """Sum of the gradients of two softmaxes: over the chosen (weights), over all (prob_sum)."""
    logits, mask, importance, weights, experts = ctx.saved_tensors
    experts = experts.long()
    k = weights.shape[1]
    probs = reference.gate_probs(logits, ctx.temperature)
    chosen = probs.gather(-1, experts)
    counts = None if importance is None else reference.slot_counts(importance, k)
    total = (chosen if counts is None else chosen * counts).sum(-1, keepdim=True)
    slope = grad_weights - (weights * grad_weights).sum(-1, keepdim=True)
    # Where no chosen expert has any probability, the weights do not depend on the logits.
    grad_chosen = weights * slope * (total > 0)
    if mask is not None:
        probs = probs.masked_fill(~mask[:, None], 0.0)
    grad = probs * (grad_prob_sum - (probs * grad_prob_sum).sum(-1, keepdim=True))
    grad = grad.scatter_add(-1, experts, grad_chosen) / ctx.temperature
    grad_logits = torch.where(logits.isfinite(), grad, 0.0).to(logits.dtype)
    if importance is None or counts is None:
        return grad_logits, None, None, None
    # A slot grows with the importance where it counts in part; the first one always counts.
    slots = torch.arange(k, device=weights.device)
    extent = k * importance[:, None] - slots
    partly = (extent >= 0) & (extent <= 1) & (slots > 0)
    share = torch.where(total > 0, chosen / torch.where(total > 0, total, 1.0), 1.0)
    share = torch.where(total > 0, share, 1 / counts.sum(-1, keepdim=True))
    grad_importance = (k * partly * share * slope).sum(-1)
    if mask is not None:
        grad_importance = grad_importance.masked_fill(~mask, 0.0)
    return grad_logits, None, None, grad_importance


def _project_tokens_setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]
) -> None:
    hidden_states, weight, mask = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden_states, weight, mask)


def _project_tokens_backward(
    ctx: Any, grad: Tensor, grad_standout: None
) -> tuple[Tensor, Tensor, None]:
    hidden_states, weight, mask = ctx.saved_tensors
    wide = hidden_states.float()
    if mask is not None:  # whatever stands at padding, NaN included, has no part in it
        grad = grad.masked_fill(~mask[..., None], 0.0)
        wide = wide.masked_fill(~mask[..., None], 0.0)
    grad_hidden = (grad @ weight.float()).to(hidden_states.dtype)
    grad_weight = grad.flatten(0, 1).T @ wide.flatten(0, 1)
    return grad_hidden, grad_weight.to(weight.dtype), None


if _failures["cpu"] is None:
    # Meta kernels serve fake tensors too; torch.library.register_fake takes ten times as long to
    # import, as it looks through all modules for the name of this one.
    _meta = torch.library.Library("moekv", "IMPL", "Meta")  # type: ignore[no-untyped-call]
    for _fake in (
        _fake_gating_topk,
        _fake_expert_scores,
        _fake_expected_attention,
        _fake_project_tokens,
        _fake_mix_scores,
        _fake_select_kept,
        _fake_kv_compact_,
        _fake_ragged_attention,
    ):
        _meta.impl(_fake.__name__.removeprefix("_fake_"), _fake)  # type: ignore[no-untyped-call]
    torch.library.register_autograd(
        "moekv::gating_topk", _gating_topk_backward, setup_context=_gating_topk_setup_context
    )
    torch.library.register_autograd(
        "moekv::project_tokens",
        _project_tokens_backward,
        setup_context=_project_tokens_setup_context,
    )
