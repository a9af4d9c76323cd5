"""The options, and which blocks of a prompt are retained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from moekv.budget import check_ratio, kept_pairs

KEY = "moekv"
"""Of ``additional_config``."""

BUDGETS = ("model", "uniform")


class Gap(NamedTuple):
    """Blocks [0, start) of a request, which are given back, when what stays is in [start, full)."""

    start: int
    full: int

    @property
    def kept(self) -> int:
        """Number of whole blocks that are retained."""
        return self.full - self.start


@dataclass(frozen=True)
class ServingOptions:
    """Options of ``additional_config={"moekv": {...}}``.

    Parameters
    ----------
    compression_ratio : float
        Share of a prompt's pairs to remove, in [0, 1). What stays is rounded up to whole blocks.
    budget : str
        ``"model"``: blocks move between the heads of all layers. ``"uniform"``: each head keeps as
        many.
    sinks, recent : int
        First and last positions of a prompt that every head keeps.
    interval : int, optional
        Compress after every so many tokens of a prompt, and of an answer, too. None: once, when the
        whole prompt has been computed.

    Raises
    ------
    ValueError, TypeError
        An option is out of range, or no number.
    """

    compression_ratio: float = 0.5
    budget: str = "model"
    sinks: int = 4
    recent: int = 16
    interval: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_ratio(self.compression_ratio)
        if self.budget not in BUDGETS:
            raise ValueError(f"expected budget among {', '.join(BUDGETS)}, got {self.budget!r}")
        for name in ("sinks", "recent"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 16:
                raise ValueError(f"expected {name} an integer from 0 to 16, got {value!r}")
        every = self.interval
        if every is not None and (not isinstance(every, int) or every < 32):
            raise ValueError(f"expected interval None or an integer from 32 on, got {every!r}")

    @classmethod
    def read(cls, additional_config: object) -> ServingOptions | None:
        """Read vLLM's ``additional_config``; None: moekv was not asked for.

        Raises
        ------
        ValueError, TypeError
            What stands there is no mapping, or names an option that there is not.
        """
        if not isinstance(additional_config, Mapping) or KEY not in additional_config:
            return None
        given = additional_config[KEY]
        if not isinstance(given, Mapping):
            raise TypeError(
                f'expected additional_config["{KEY}"] a mapping of options, got {given!r}'
            )
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in names]:
            raise ValueError(
                f"expected moekv options among {', '.join(names)}, got {', '.join(unknown)}"
            )
        values: dict[str, Any] = dict(given)
        return cls(**values)

    def last_point(self, prompt: int, computed: int) -> int:
        """Return after how many computed tokens a request was last compressed, 0 if never."""
        if computed < prompt:
            return 0 if self.interval is None else computed // self.interval * self.interval
        behind = computed - prompt
        return computed - (behind if self.interval is None else behind % self.interval)

    def next_point(self, prompt: int, computed: int) -> int | None:
        """Return after how many tokens it is compressed next, None if never."""
        if computed >= prompt:
            return (
                None if self.interval is None else self.last_point(prompt, computed) + self.interval
            )
        if self.interval is None:
            return prompt
        return min(self.last_point(prompt, computed) + self.interval, prompt)

    def gap(
        self, prompt: int, block_size: int, ratio: float | None = None, computed: int | None = None
    ) -> Gap | None:
        """Return the blocks of a request that have been freed.

        It depends only on what scheduler and workers both know of a request, so they agree without
        communication.

        Parameters
        ----------
        prompt : int
            Tokens of its prompt.
        block_size : int
            Tokens of a block.
        ratio : float, optional
            The request's own ``compression_ratio``.
        computed : int, optional
            Tokens that have been computed; by default all of the prompt. Until then as many pairs
            are retained as will be of it, later the ratio's share of all.

        Returns
        -------
        Gap or None
            The block that is filled in part stays as it is. None: none has been.
        """
        point = self.last_point(prompt, prompt if computed is None else computed)
        full, rest = divmod(point, block_size)
        ratio = self.compression_ratio if ratio is None else ratio
        wanted = kept_pairs(max(point, prompt), ratio) - rest
        kept = max(1, -(-wanted // block_size))
        return Gap(full - kept, full) if kept < full else None


def own_ratio(extra_args: Mapping[str, Any] | None) -> float | None:
    """Read the ``compression_ratio`` that a request asks for itself.

    Parameters
    ----------
    extra_args : mapping, optional
        vLLM's, of sampling parameters: ``{"moekv": {"compression_ratio": 0.9}}``, or as its server
        takes them, without mappings in mappings: ``{"moekv": 0.9}``.

    Raises
    ------
    ValueError
        It is no ratio, or something else is asked for.
    """
    given = (extra_args or {}).get(KEY)
    if given is None:
        return None
    name = "compression_ratio"
    if isinstance(given, Mapping):
        if list(given) != [name]:
            raise ValueError(
                f'moekv: expected extra_args["{KEY}"] {{"{name}": ...}}, got {given!r}'
            )
        given = given[name]
    try:
        check_ratio(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"moekv: {error}") from None
    return float(given)
