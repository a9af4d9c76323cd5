"""vLLM's attention of one layer, with scoring and compression before or after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from moekv.integrations.vllm.options import ServingOptions
from moekv.integrations.vllm.refusals import check_engine, check_layer


class CompressingAttention(CPUAttentionBackendImpl):
    """vLLM's attention on CPUs, whose prompts are compressed when they are complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        options = ServingOptions.read(config.additional_config)
        assert options is not None
        check_engine(config, options)
        check_layer("alibi_slopes", self.alibi_slopes)
        check_layer("sinks", self.sinks)
        check_layer("kv_sharing_target_layer_name", self.kv_sharing_target_layer_name)
        check_layer("sliding_window", None if self.sliding_window == -1 else self.sliding_window)
        decodes = self.attn_type == AttentionType.DECODER
        check_layer("attn_type", None if decodes else self.attn_type)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend, and score the prompts of the step; its last layer compresses them."""
        step = getattr(attn_metadata, "step", None)
        if step is None or not step.only_heads:
            super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        if step is None:
            return output
        worker = attn_metadata.worker
        if step.heads is not None:
            step.heads.attend(worker.layers[layer.layer_name], layer, query, output)
        for part in step.parts:
            worker.rate(part, layer, query)
        for part in step.parts:  # when all have been rated: some share blocks
            worker.compress(part, layer)
        return output
