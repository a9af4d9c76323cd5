"""The worker's side: the classes that vLLM uses, its own unless moekv is configured."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from moekv.integrations.vllm.manager import CompressedSpec
from moekv.integrations.vllm.options import ServingOptions


class Backend(CPUAttentionBackend):
    """vLLM's attention on CPUs, which compresses where it was asked to.

    Attributes
    ----------
    options : ServingOptions or None
        Those of the engine that is being made: vLLM asks for the spec of layers right after it has
        made them, when no configuration is at hand any more.
    """

    options: ClassVar[ServingOptions | None] = None

    @staticmethod
    def get_impl_cls() -> Any:
        """Return the class of a layer's attention, which is about to be made."""
        Backend.options = ServingOptions.read(get_current_vllm_config().additional_config)
        if Backend.options is None:
            return CPUAttentionBackend.get_impl_cls()
        from moekv.integrations.vllm.attention import CompressingAttention

        return CompressingAttention

    @staticmethod
    def get_builder_cls() -> Any:
        """Return the class that builds a step's metadata; it reads the option itself."""
        from moekv.integrations.vllm.builder import CompressingBuilder

        return CompressingBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Return the spec whose manager frees blocks."""
        if Backend.options is None or type(spec) is not FullAttentionSpec:
            return spec
        return CompressedSpec.of(spec, Backend.options)
