"""Counters of what compression freed, beside vLLM's own metrics, and a line in its log."""

from __future__ import annotations

import time
from functools import cache

from prometheus_client import Counter
from vllm import envs

from moekv.integrations.vllm.plugin import logger


class Metrics:
    """Counts in the scheduler's process, where blocks are given back.

    Prometheus collects them over processes if ``PROMETHEUS_MULTIPROC_DIR`` names a folder before
    they start, which ``moekv serve`` sees to.
    """

    def __init__(self) -> None:
        names = {
            "prompts_compressed": "Prompts whose KV pairs were compressed.",
            "blocks_freed": "KV blocks that were given back as prompts were compressed.",
            "pairs_computed": "KV pairs of a head, on average, of prompts that were compressed.",
            "pairs_kept": "KV pairs of a head, on average, that stayed of them.",
        }
        self._counters = {name: Counter(f"moekv:{name}", text) for name, text in names.items()}
        self._since = dict.fromkeys(names, 0)
        self._said = float("-inf")

    @staticmethod
    @cache
    def of() -> Metrics:
        """Those of this process: Prometheus takes a name once."""
        return Metrics()

    def freed(self, blocks: int) -> None:
        """Count blocks that have been given back."""
        self._count(blocks_freed=blocks)

    def compressed(self, prompt: int, kept: int) -> None:
        """Count a prompt of so many tokens, as many pairs of which were retained."""
        self._count(prompts_compressed=1, pairs_computed=prompt, pairs_kept=kept)
        self._say()

    def _count(self, **numbers: int) -> None:
        for name, number in numbers.items():
            self._counters[name].inc(number)
            self._since[name] += number

    def _say(self) -> None:
        if time.monotonic() - self._said < envs.VLLM_LOG_STATS_INTERVAL:
            return
        logger.info(
            "moekv: prompts compressed: %d, blocks freed: %d, pairs kept: %d of %d",
            *(self._since[x] for x in ("prompts_compressed", "blocks_freed", "pairs_kept")),
            self._since["pairs_computed"],
        )
        self._said, self._since = time.monotonic(), dict.fromkeys(self._since, 0)
