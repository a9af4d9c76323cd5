"""Prompt length and ratio of each request, which vLLM gives to logits processors as this one.

It changes no logits. The scheduler has the same of the requests themselves.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from moekv.integrations.vllm.options import KEY, ServingOptions, own_ratio
from moekv.integrations.vllm.plugin import logger


class Request(NamedTuple):
    """Tokens of a request's prompt, and its own ratio."""

    prompt: int
    ratio: float | None


class Requests(LogitsProcessor):
    """The requests of a worker's batch by row.

    Attributes
    ----------
    rows : dict of Request
    """

    current: ClassVar[Requests | None] = None
    """That of the worker made last in this process."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.rows: dict[int, Request] = {}
        self._is_on = ServingOptions.read(vllm_config.additional_config) is not None
        Requests.current = self

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse invalid ratios when a request arrives.

        One with a ratio of its own is computed from its beginning: how much of a cached prefix can
        be read follows from the engine's ratio.
        """
        if own_ratio(sampling_params.extra_args) is not None:
            sampling_params.skip_reading_prefix_cache = True

    def update_state(self, batch_update: Any) -> None:
        """Track requests that arrive, leave, or move to other rows."""
        process_dict_updates(self.rows, batch_update, self._read)

    def _read(self, params: Any, prompt: list[int] | None, answer: list[int]) -> Request | None:
        ratio = own_ratio(params.extra_args)
        if not self._is_on:
            if ratio is not None:
                logger.warning(
                    'moekv is off in this engine: extra_args["%s"] does nothing; expected '
                    "additional_config with moekv's options",
                    KEY,
                )
            return None
        return None if prompt is None else Request(len(prompt), ratio)

    def is_argmax_invariant(self) -> bool:
        """Return True: no logits are changed."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """Give the logits back."""
        return logits
