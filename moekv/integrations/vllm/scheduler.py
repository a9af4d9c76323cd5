"""The scheduler: no step continues past where a request is compressed, as at its prompt's end.

It is compressed when all layers have computed that far, so tokens that are computed in the same
step attend to all pairs. Those that a preempted request had generated would: vLLM recomputes them
with the prompt.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.v1.core.sched.scheduler import Scheduler

from moekv.integrations.vllm.options import ServingOptions
from moekv.integrations.vllm.refusals import ARCHITECTURES


class CompressingScheduler(Scheduler):
    """vLLM's scheduler, which recomputes a preempted request's answer in a step of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = ServingOptions.read(self.vllm_config.additional_config)
        assert options is not None
        self._options = options
        # vLLM's one place where a request's part of a step is cut, which it asks if this is set.
        self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(self, request: Any, num_new_tokens: int, *found: int) -> int:
        computed: int = request.num_computed_tokens + sum(found)
        point = self._options.next_point(request.num_prompt_tokens, computed)
        return num_new_tokens if point is None else min(num_new_tokens, point - computed)


class SchedulerChoice(VerifyAndUpdateConfig):
    """Sets the scheduler in vLLM's configuration, through its hook for model architectures."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Set it if moekv is configured.

        Raises
        ------
        ValueError, TypeError
            Another was named already, or moekv's options are wrong.
        """
        if ServingOptions.read(vllm_config.additional_config) is None:
            return
        given = vllm_config.scheduler_config
        if given.scheduler_cls is not None:
            raise ValueError(
                f"moekv: expected vLLM's own scheduler, got scheduler_cls {given.scheduler_cls!r}"
            )
        given.scheduler_cls = f"{__name__}.{CompressingScheduler.__name__}"


def register() -> None:
    """Register the hook for the models that can be served. Idempotent."""
    for name in ARCHITECTURES:
        MODELS_CONFIG_MAP.setdefault(name, SchedulerChoice)
