"""Calibrated routers: what `moekv.calibrate` fits to a model, and what a press does with it.

The scores of a calibrated router estimate, for every pair of every head and layer, the log of the
attention that later tokens will pay to it. All are on this one scale, so that one threshold over
the model sets each head's length. Two experts are shared by all tokens: ``learned``, which reads a
pair's hidden state and its place in the text, and ``expected``, which was not fitted to anything
and holds where the texts of the calibration do not reach. As much say is routed, token by token, to
experts that look at what the prefill itself shows; they correct ``learned``, with which they were
fitted.
"""

from __future__ import annotations

import contextlib
import functools
import io
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moekv.experts import Expert, build_experts
from moekv.fingerprint import fingerprint
from moekv.routers import SharedExpertRouter
from moekv.view import LayerView

SHIPPED = Path(__file__).parent / "data" / "routers"
"""Routers that come with the package, a folder for each model."""


@functools.lru_cache(maxsize=8)
def places(lengths: tuple[int, ...], num_keys: int, device: torch.device) -> Tensor:
    """Describe where each pair of each row stands. All layers of a forward ask the same.

    Logarithms, as attention falls off with distance like a power law; the distance from the end
    with two units, a token and a hundred, as heads differ in their reach.

    Parameters
    ----------
    lengths : tuple of B ints
        Real pairs, at the right of each row.
    num_keys : int
    device : torch.device

    Returns
    -------
    Tensor [B, 3, T], float32
        ``log(1 + age)``, ``log(1 + age / 128)`` and ``log(1 + position)``; 0 at padding. Not to be
        written to.
    """
    rows = []
    for length in lengths:
        position = torch.arange(length, device=device, dtype=torch.float32)
        row = _describe(length - 1 - position, position)
        rows.append(functional.pad(row, (num_keys - length, 0)))
    return torch.stack(rows)


def _describe(age: Tensor, position: Tensor) -> Tensor:
    return torch.stack([age.log1p(), (age / 128).log1p(), position.log1p()])


class LearnedExpert(Expert):
    """Estimates the log of the attention that a pair will receive from its hidden state and place.

    A linear surrogate for each KV head, as in KVzap (Jegou and Jeblick, 2026), of the scores that
    reading the context again would give (KVzip, Kim et al., 2025); with the place beside the hidden
    state, since some heads look back a few tokens only, whatever these say.

    Parameters
    ----------
    router : CalibratedRouter
        Owns the weights.
    """

    name = "learned"
    comparable = True
    finite = True

    def __init__(self, router: CalibratedRouter) -> None:
        self.router = router

    def scores(self, view: LayerView) -> Tensor:
        """Rate the pairs: from their hidden states, or from what was noted of these."""
        index: int = view.module.layer_idx  # type: ignore[assignment]
        _, place, _ = self.router.surrogate(index, view.hidden_states)
        if view.notes is not None:
            read, position = view.notes
            where = _describe(position[..., -1:] - position, position)
            return read + torch.einsum("bhp,pbht->bht", place[view.heads], where)
        assert view.aligned
        where = places(view.lengths, view.keys.shape[2], view.keys.device)
        read = self.router.read(index, view.hidden_states)
        return torch.baddbmm(read, place.expand(len(where), -1, -1), where)


class CalibratedRouter(nn.Module, PyTorchModelHubMixin, library_name="moekv"):
    """Routers, experts' scales and the ``learned`` expert of every layer of one model.

    Made by ``moekv.calibrate``; saved and loaded by ``save_pretrained``, ``from_pretrained`` and
    ``push_to_hub``.

    Parameters
    ----------
    model : str
        Fingerprint of the model that it was fitted to (``moekv.fingerprint.fingerprint``).
    layers : sequence of L ints
        Indices of the model's attention layers that it serves.
    hidden_size, num_kv_heads : int
        Of these layers.
    experts : sequence of E str
        Names of the routed experts.
    top_k : int
        Routed experts per token.
    shared : sequence of str
        Names of comparable experts whose scores all tokens consult beside ``learned``; together
        they have as much say as what was fitted.
    recipe : dict, optional
        How it was fitted, for people to read.

    Raises
    ------
    ValueError
        An option is out of range, or an expert unknown.
    """

    def __init__(
        self,
        *,
        model: str,
        layers: Sequence[int],
        hidden_size: int,
        num_kv_heads: int,
        experts: Sequence[str],
        top_k: int = 2,
        shared: Sequence[str] = ("expected",),
        recipe: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= len(experts):
            raise ValueError(f"expected top_k between 1 and {len(experts)} experts, got {top_k}")
        self.model = model
        self.layers = list(layers)
        self.hidden_size, self.num_kv_heads = hidden_size, num_kv_heads
        self.top_k = top_k
        self.recipe = recipe or {}
        self.routed = build_experts(list(experts))
        self.shared = build_experts(list(shared)) if shared else []
        if odd := [expert.name for expert in self.shared if not expert.comparable]:
            raise ValueError(f"expected shared experts with comparable scores, got {odd}")
        num_layers, num_experts = len(self.layers), len(self.routed)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(num_layers, *shape), requires_grad=False)

        self.surrogate_weight = parameter(num_kv_heads, hidden_size)
        self.surrogate_place = parameter(num_kv_heads, 3)
        self.surrogate_bias = parameter(num_kv_heads)
        self.gate_weight = parameter(num_experts, hidden_size)
        self.gate_bias = parameter(num_experts)
        self.gain = parameter(num_experts, num_kv_heads)
        self.offset = parameter(num_experts, num_kv_heads)
        self._local: dict[Any, tuple[Tensor, ...]] = {}
        self._gates: dict[Any, SharedExpertRouter] = {}

    def _apply(self, *args: Any, **kwargs: Any) -> CalibratedRouter:
        self._local, self._gates = {}, {}
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    @property
    def experts(self) -> list[Expert]:
        """All experts: the shared ones, then the routed ones."""
        return [LearnedExpert(self), *self.shared, *self.routed]

    def check(self, model: PreTrainedModel) -> None:
        """Raise ``ValueError`` naming both models unless the router was fitted to this one."""
        if (found := model_fingerprint(model)) != self.model:
            name = self.recipe.get("model_name", "another model")
            raise ValueError(
                f"expected the model that the router was calibrated for, {name} ({self.model}), "
                f"got {model.config.name_or_path or type(model).__name__} ({found}); "
                "`moekv calibrate` makes a router for it"
            )

    def surrogate(self, index: int, like: Tensor) -> tuple[Tensor, ...]:
        """Weights of the ``learned`` expert of a layer, beside some hidden states.

        Parameters
        ----------
        index : int
            Of the layer in the model.
        like : Tensor
            Gives the device, and the dtype of the weight.

        Returns
        -------
        weight [H, hidden], place [H, 3], bias [H] : Tensor
        """
        key = (index, like.device, like.dtype)
        if key not in self._local:
            row = self.layers.index(index)
            self._local[key] = (
                self.surrogate_weight[row].to(like.device, like.dtype),
                self.surrogate_place[row].to(like.device, torch.float32),
                self.surrogate_bias[row].to(like.device, torch.float32),
            )
        return self._local[key]

    def read(self, index: int, hidden_states: Tensor) -> Tensor:
        """Read hidden states [B, N, hidden]: the ``learned`` scores but for the place, [B, H, N].

        In float32. Where the cache is compressed more than once these are noted when a token comes.
        """
        weight, _, bias = self.surrogate(index, hidden_states)
        return functional.linear(hidden_states, weight).transpose(1, 2) + bias[:, None]

    def scale(self, index: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Affine maps of all experts of a layer to the common scale: gain, offset [experts, H].

        Each shared expert has one part of the weight, and the routed ones share another. Multiplied
        by the number of parts the mixture is the sum of what was fitted, ``learned`` and the routed
        ones, and of the mean of the other shared experts.
        """
        key = (index, device)
        if key not in self._local:
            row, others = self.layers.index(index), len(self.shared)
            fitted = functional.pad(self.gain[row].float(), (0, 0, 1 + others, 0), value=1.0)
            fitted[1 : 1 + others] /= max(others, 1)
            offset = functional.pad(self.offset[row].float(), (0, 0, 1 + others, 0))
            parts = 2 + others
            self._local[key] = (parts * fitted).to(device), (parts * offset).to(device)
        gain, offset = self._local[key]
        return gain, offset

    def gate(self, index: int, like: Tensor, *, backend: str = "auto") -> SharedExpertRouter:
        """Give the gate of a layer, for the device and the dtype of some hidden states. Frozen.

        It keeps no history, so that whoever asks for the same one shares it.
        """
        key = (index, like.device, like.dtype, backend)
        if key not in self._gates:
            row = self.layers.index(index)
            router = SharedExpertRouter(
                self.hidden_size,
                len(self.routed),
                self.top_k,
                num_shared=1 + len(self.shared),
                backend=backend,
            )
            router.gate.weight.data.copy_(self.gate_weight[row])
            router.gate.bias.data.copy_(self.gate_bias[row])
            self._gates[key] = router.to(like.device, like.dtype)
            router.freeze()
        return self._gates[key]


_fingerprints: weakref.WeakKeyDictionary[PreTrainedModel, str] = weakref.WeakKeyDictionary()


def model_fingerprint(model: PreTrainedModel) -> str:
    """Fingerprint of a model, computed once for each object."""
    if model not in _fingerprints:
        _fingerprints[model] = fingerprint(model)
    return _fingerprints[model]


def shipped_router(model: PreTrainedModel) -> CalibratedRouter | None:
    """Find the router that comes with the package for a model.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    CalibratedRouter or None
        None where no fingerprint matches.
    """
    folder = SHIPPED / model_fingerprint(model)
    return _load(folder) if folder.is_dir() else None


def load_router(name: str | Path) -> CalibratedRouter:
    """Load a router that was saved.

    Parameters
    ----------
    name : str or path
        Its folder, or its id on the hub.

    Returns
    -------
    CalibratedRouter

    Raises
    ------
    ValueError
        There is none that can be read.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints what it reads from
            router: CalibratedRouter = CalibratedRouter.from_pretrained(name)
    except (OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected the folder or hub id of a calibrated router, got {str(name)!r}, from which "
            f"none can be read: {error}"
        ) from error
    return router


_load = functools.lru_cache(maxsize=2)(load_router)
