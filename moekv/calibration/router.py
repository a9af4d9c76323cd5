"""Calibrated routers: fitted to a model by `moekv.calibrate`, and used by a press.

Every expert of a calibrated router estimates, for every pair of every head and layer, the log of
the attention that later tokens will pay to it. All are on this one scale, so that one threshold
over the model sets each head's length. ``learned`` reads a pair's hidden state, its place in the
text and its key, and was fitted; ``expected`` was not, and serves texts unlike those of the
calibration. The gate weighs them for every token and layer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moekv.calibration.model_card import TEMPLATE, facts
from moekv.experts.learned import LearnedExpert
from moekv.experts.registry import fitted_experts
from moekv.files import whole_file
from moekv.models.fingerprint import (
    TOLERANCE,
    architecture,
    check_same,
    describe,
    distance,
    fingerprint,
    short,
)
from moekv.models.hooks import with_choice
from moekv.routing.base import BaseMoERouter

_logger = logging.getLogger("moekv")

_OF_THE_MIXIN = frozenset(
    {
        *("revision", "cache_dir", "force_download", "proxies", "resume_download"),
        *("local_files_only", "token", "map_location", "strict"),
    }
)

FORMAT = 2
"""Format of saved routers: 2 has a gate over all experts, 1 had one without ``learned``."""

SHIPPED = Path(__file__).parents[1] / "data" / "routers"
"""Routers that come with the package, a folder for each model."""


def _check_format(found: int) -> None:
    if found != FORMAT:
        raise ValueError(
            f"expected a calibrated router of format {FORMAT}, got one of format {found}, which "
            "another version of moekv has made; `moekv calibrate` makes a new one"
        )


class CalibratedGate(BaseMoERouter):
    """Gate of one layer, over all experts of a calibrated router, which owns the weights.

    Parameters
    ----------
    router : CalibratedRouter
    index : int
        Of the layer in the model.
    backend : str
    """

    def __init__(self, router: CalibratedRouter, index: int, *, backend: str) -> None:
        num_experts = len(router.experts)
        super().__init__(
            router.hidden_size,
            num_experts,
            router.top_k,
            choices=router.choices,
            backend=backend,
        )
        row = router.layers.index(index)
        self.gate.weight.data.copy_(router.gate_weight[row])
        self.gate.bias.data.copy_(router.gate_bias[row])

    def logits(self, read: Tensor) -> Tensor:
        """Compute the gate's logits from projected hidden states.

        Parameters
        ----------
        read : Tensor [B, N, H + E]
            See :meth:`CalibratedRouter.project`.

        Returns
        -------
        Tensor [B, N, E]
        """
        return read[..., -self.num_experts :] + self.gate.bias


class CalibratedRouter(
    nn.Module, PyTorchModelHubMixin, library_name="moekv", model_card_template=TEMPLATE
):
    """Gates, experts' scales and the ``learned`` expert of every layer of one model.

    Made by ``moekv.calibrate``; saved and loaded by ``save_pretrained``, ``from_pretrained`` and
    ``push_to_hub``.

    Parameters
    ----------
    model : str
        Fingerprint of the model that it was fitted to (``moekv.models.fingerprint.fingerprint``).
    layers : sequence of L ints
        Indices of the model's attention layers that it serves.
    hidden_size, num_kv_heads : int
        Of these layers.
    experts : sequence of str
        Names of the experts beside ``learned``, which comes first: E in all.
    top_k : int
        Experts per token, 1 to E.
    choices : int
        Experts of the model itself, whose weights for each token the gates and ``learned`` read
        behind the hidden state; 0: they do not.
    recipe : dict, optional
        How it was fitted; for information.
    format : int
        Of the saved router.

    Raises
    ------
    ValueError
        An option is out of range, an expert unknown, or the router of another format.
    """

    def __init__(
        self,
        *,
        model: str,
        layers: Sequence[int],
        hidden_size: int,
        num_kv_heads: int,
        experts: Sequence[str],
        top_k: int,
        choices: int = 0,
        recipe: dict[str, Any] | None = None,
        format: int = FORMAT,
    ) -> None:
        super().__init__()
        _check_format(format)
        if not 1 <= top_k <= 1 + len(experts):
            raise ValueError(
                f"expected top_k between 1 and {1 + len(experts)} experts, got {top_k}"
            )
        self.model = model
        self.layers = list(layers)
        self.hidden_size, self.num_kv_heads = hidden_size, num_kv_heads
        self.top_k, self.choices = top_k, choices
        self.recipe = recipe or {}
        #: All experts, ``learned`` first.
        self.experts = [LearnedExpert(self), *fitted_experts(experts)]
        num_layers, num_experts = len(self.layers), len(self.experts)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(num_layers, *shape), requires_grad=False)

        self.surrogate_weight = parameter(num_kv_heads, self.width)
        self.surrogate_place = parameter(num_kv_heads, 3)
        self.surrogate_novelty = parameter(num_kv_heads)
        self.surrogate_bias = parameter(num_kv_heads)
        self.gate_weight = parameter(num_experts, self.width)
        self.gate_bias = parameter(num_experts)
        self.gain = parameter(num_experts, num_kv_heads)
        self.offset = parameter(num_experts, num_kv_heads)
        self.gain.data[:, 0] = 1  # `learned` is on the common scale
        self._local: dict[Any, tuple[Tensor, ...]] = {}
        self._gates: dict[Any, CalibratedGate] = {}
        self._reader: str | None = None

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> CalibratedRouter:
        if "model" not in options:
            raise ValueError("its config.json cannot be found")
        _check_format(options.get("format", 1))  # format 1 did not store its number
        if os.path.isdir(model_id):  # the mixin would print a message for a folder
            own = {k: v for k, v in options.items() if k not in _OF_THE_MIXIN}
            file = os.path.join(model_id, SAFETENSORS_SINGLE_FILE)
            if not os.path.isfile(file):
                raise ValueError(f"its {SAFETENSORS_SINGLE_FILE} cannot be found")
            return cls._load_as_safetensor(cls(**own), file, "cpu", True)
        router: CalibratedRouter = super()._from_pretrained(
            model_id=model_id, **{"strict": True} | options
        )
        return router

    @classmethod
    def _load_as_pickle(cls, *_: Any, **__: Any) -> Any:
        """Refuse pickles, which the mixin falls back to."""
        raise ValueError(f"expected {SAFETENSORS_SINGLE_FILE} in it, got a pickle of torch")

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the tensors, with the mode that other files get."""
        with whole_file(save_directory / SAFETENSORS_SINGLE_FILE) as temporary:
            save_model(self, temporary)

    def generate_model_card(self, *args: Any, **options: Any) -> ModelCard:
        """Make the model card, for the hub and the saved folder."""
        name = self.recipe.get("model_name", self.model)
        return super().generate_model_card(*args, **{"name": name, "facts": facts(self)} | options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the router; see huggingface_hub's ``ModelHubMixin.push_to_hub``."""
        card = {"router_id": repo_id} | (options.pop("model_card_kwargs", None) or {})
        url: str = super().push_to_hub(repo_id, model_card_kwargs=card, **options)
        return url

    def _apply(self, *args: Any, **kwargs: Any) -> CalibratedRouter:
        self._local, self._gates, self._reader = {}, {}, None
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    @property
    def width(self) -> int:
        """Numbers that are read of a token: its hidden state, and the model's choice."""
        return self.hidden_size + self.choices

    def check(self, model: PreTrainedModel) -> float:
        """Check that the router was fitted to a model, and return the distance of its weights.

        Returns
        -------
        float
            See ``moekv.models.fingerprint.distance``.

        Raises
        ------
        ValueError
            It was fitted to another model; the message names both.
        """
        name = self.recipe.get("model_name", "another model")
        given = model.config.name_or_path or type(model).__name__
        what = f"the model that the router was calibrated for, {name} ({short(self.model)})"
        try:
            return check_same(self.model, model, what)
        except ValueError as error:
            raise ValueError(f"{error}: {given}; `moekv calibrate` makes a router for it") from None

    def surrogate(self, index: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parameters of a layer's ``learned`` expert beside those of hidden states.

        Parameters
        ----------
        index : int
            Of the layer in the model.
        device : torch.device

        Returns
        -------
        place [H, 3], novelty [H], bias [H] : Tensor, float32
        """
        key = (index, device, "surrogate")
        if key not in self._local:
            row = self.layers.index(index)
            parts = (self.surrogate_place, self.surrogate_novelty, self.surrogate_bias)
            self._local[key] = tuple(part[row].to(device, torch.float32) for part in parts)
        place, novelty, bias = self._local[key]
        return place, novelty, bias

    def project(self, index: int, hidden_states: Tensor, choice: Tensor | None = None) -> Tensor:
        """Project hidden states [B, N, hidden] for ``learned`` and the gate: [B, N, H + E].

        They take as many bytes as a layer's pairs, or several times that, so they are read once.
        With them what the model chose, see ``moekv.models.hooks.with_choice``, if it is read.
        """
        key = (index, hidden_states.device, hidden_states.dtype)
        if key not in self._local:
            row = self.layers.index(index)
            weight = torch.cat([self.surrogate_weight[row], self.gate_weight[row]])
            self._local[key] = (weight.to(hidden_states.device, hidden_states.dtype),)
        (weight,) = self._local[key]
        return functional.linear(with_choice(hidden_states, choice, self.choices), weight)

    def read(self, index: int, projected: Tensor) -> Tensor:
        """Return the part of the ``learned`` scores that depends on hidden states.

        Where the cache is compressed more than once, it is noted when a token is fed.

        Parameters
        ----------
        index : int
            Of the layer in the model.
        projected : Tensor [B, N, H + E]
            See :meth:`project`.

        Returns
        -------
        Tensor [B, H, N], float32
        """
        *_, bias = self.surrogate(index, projected.device)
        return projected[..., : self.num_kv_heads].transpose(1, 2) + bias[:, None]

    @property
    def reader(self) -> str:
        """Digest of the weights of :meth:`read`: notes of one router cannot be used by another."""
        if self._reader is None:
            digest = hashlib.blake2b(digest_size=16)
            for part in (self.surrogate_weight, self.surrogate_bias):
                digest.update(part.detach().float().cpu().numpy().tobytes())
            self._reader = digest.hexdigest()
        return self._reader

    def scale(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Affine maps of all experts of L layers to the common scale: gain, offset [E, L, H]."""
        key = (tuple(indices), device, "scale")
        if key not in self._local:
            rows = [self.layers.index(index) for index in indices]
            parts = self.gain[rows], self.offset[rows]
            self._local[key] = tuple(
                part.to(device, torch.float32).transpose(0, 1).contiguous() for part in parts
            )
        gain, offset = self._local[key]
        return gain, offset

    def gate(self, index: int, like: Tensor, *, backend: str = "auto") -> CalibratedGate:
        """Return the gate of a layer, for the device and the dtype of some hidden states. Frozen.

        It has no history, so it is made once and shared.
        """
        key = (index, like.device, like.dtype, backend)
        if key not in self._gates:
            with torch.device("cpu"):  # whatever the caller's default is
                gate = CalibratedGate(self, index, backend=backend)
            self._gates[key] = gate.to(like.device, like.dtype)
            gate.freeze()
        return self._gates[key]


def shipped_router(model: PreTrainedModel) -> tuple[CalibratedRouter | None, float]:
    """Find the router that comes with the package for a model.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    router : CalibratedRouter or None
        None where there is none within the distance ``moekv.models.fingerprint.TOLERANCE``. If
        there is one for the architecture, a warning of the logger ``moekv`` names the distance.
    distance : float
        Of the model's weights from those that it was fitted to.
    """
    files = sorted(SHIPPED.glob("*/config.json"))
    folders = {file.parent: _model_of(file.parent) for file in files}
    if not folders:
        return None, float("inf")
    same = f"{architecture(model)}-"
    folders = {folder: name for folder, name in folders.items() if name.startswith(same)}
    if not folders:  # whose weights need not be read
        return None, float("inf")
    own = fingerprint(model)
    far, folder = min((distance(name, own), folder) for folder, name in folders.items())
    if far <= TOLERANCE:
        return _load(folder), far
    if far < float("inf"):
        _logger.warning(
            "the router that comes with moekv for this architecture is left out, as the weights "
            "that it was fitted to are not these: %s. `moekv calibrate` makes a router for them; "
            "router=None says that none is wanted",
            describe(folders[folder], own),
        )
    return None, far


def _model_of(folder: Path) -> str:
    """Read the model of a router in a folder of the package."""
    found: Any = json.loads((folder / "config.json").read_text())
    return str(found["model"])


def is_folder(name: str) -> bool:
    """Return whether a router's name is a folder rather than an id on the hub.

    Raises
    ------
    ValueError
        It can only be a folder, and there is no such folder.
    """
    if os.path.isdir(name):
        return True
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(
            f"expected the folder or hub id of a calibrated router, got {name!r}, from which none "
            "can be read: there is no such folder"
        )
    return False


def load_router(name: str | Path) -> CalibratedRouter:
    """Load a saved router.

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
        There is no router that can be read.
    """
    try:
        router: CalibratedRouter = CalibratedRouter.from_pretrained(name)
    except (OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected the folder or hub id of a calibrated router, got {str(name)!r}, from which "
            f"none can be read: {error}"
        ) from error
    return router


_load = functools.lru_cache(maxsize=2)(load_router)
