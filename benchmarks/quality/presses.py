"""The methods of the table, each built for a compression ratio.

Peers are all presses of kvpress that compress a prefill, at the settings that kvpress gives them;
those that read the context again, as KVzip does two or three times, are the upper anchors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvpress
import torch
from kvpress import BasePress
from torch import Tensor, nn
from transformers import PreTrainedModel

import moekv
from moekv import MoERouterPress
from moekv.cache.rows import gain
from moekv.calibration.router import SHIPPED
from moekv.experts.registry import expert_names
from moekv.models.hooks import is_sliding
from moekv.press.routing import ROUTED_EXPERTS
from moekv.routing.registry import ROUTERS

Factory = Callable[[float], BasePress]


def _scorer(cls: type[BasePress], **options: object) -> Factory:
    return lambda ratio: cls(compression_ratio=ratio, **options)


def _around(wrapper: type[BasePress], inner: Factory, **options: object) -> Factory:
    return lambda ratio: wrapper(press=inner(ratio), **options)


def _guarded(scorer: Factory) -> Factory:
    """Let a scorer keep the first and last pairs that moekv keeps in any case."""

    def make(ratio: float) -> BasePress:
        press: Any = scorer(ratio)
        score, ours = press.score, MoERouterPress()

        def guard(*args: Any, **kwargs: Any) -> Tensor:
            scores: Tensor = score(*args, **kwargs).clone()
            first = scores.amax() + 1
            scores[..., : ours.sinks] = scores[..., -ours.recent :] = first
            return scores

        press.score = guard
        return press

    return make


@dataclass
class Lent(BasePress):
    """A peer that stores what it keeps in moekv's quantised rows: in the same bytes, more pairs."""

    inner: Factory
    pairs: str
    compression_ratio: float
    fold: bool = False  # have evicted pairs join retained ones

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        """Choose as many pairs as the bytes of the ratio hold, then quantise them."""
        config = model.config.get_text_config()
        pair = torch.empty(config.head_dim, dtype=model.dtype)
        more = float(gain(self.pairs, pair, pair, biased=self.fold))
        removed = 1 - (1 - self.compression_ratio) * more
        inner = self.inner(max(removed, 0.0))
        with moekv.ragged(inner, pairs=self.pairs, fold=self.fold)(model):
            yield


def spare_windows(press: BasePress) -> BasePress:
    """Let a press of kvpress leave layers with sliding windows alone, as moekv does.

    Their caches are bounded. Pairs that leave them would count against the press alone.
    """
    hook: Callable[..., Any] = press.forward_hook

    def spare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return output if is_sliding(module) else hook(module, args, kwargs, output)

    vars(press)["forward_hook"] = spare
    return press


def _lent(inner: Factory, pairs: str, *, fold: bool = False) -> Factory:
    return lambda ratio: Lent(inner, pairs, ratio, fold)


def _duo_attention(ratio: float) -> BasePress:
    return kvpress.DuoAttentionPress(head_compression_ratio=ratio, on_the_fly_scoring=True)


_SCORERS = (
    *("CURPress", "CapPress", "CompactorPress", "ExpectedAttentionPress", "KeyDiffPress"),
    *("ExpectedAttentionStatsPress", "KVzapPress", "KnormPress", "LagKVPress"),
    *("LeverageScorePress", "NonCausalAttnPress", "ObservedAttentionPress", "PyramidKVPress"),
    *("QFilterPress", "SnapKVPress", "StreamingLLMPress", "TOVAPress"),
)

#: Methods that need one prefill and do not see the question.
PEERS: dict[str, Factory] = {name: _scorer(getattr(kvpress, name)) for name in _SCORERS} | {
    "RandomPress": _scorer(kvpress.RandomPress, seed=0),
    "LUKVPress": _scorer(kvpress.LUKVPress),
    "FastKVzipPress": _scorer(kvpress.FastKVzipPress),
    "DuoAttentionPress": _duo_attention,
}
_snapkv, _keydiff, _expected = (
    PEERS[name] for name in ("SnapKVPress", "KeyDiffPress", "ExpectedAttentionPress")
)
# kvpress gives expected attention this epsilon where it is combined with AdaKV.
_expected_ada = _scorer(kvpress.ExpectedAttentionPress, epsilon=1e-2)
PEERS |= {
    "AdaKV(SnapKV)": _around(kvpress.AdaKVPress, _snapkv),
    "AdaKV(KeyDiff)": _around(kvpress.AdaKVPress, _keydiff),
    "AdaKV(ExpectedAttention)": _around(kvpress.AdaKVPress, _expected_ada),
    "AdaKV(Compactor)": _around(kvpress.AdaKVPress, PEERS["CompactorPress"]),
    "CriticalKV(SnapKV)": lambda ratio: kvpress.CriticalKVPress(_snapkv(ratio)),
    "CriticalAdaKV(SnapKV)": _around(kvpress.CriticalAdaKVPress, _snapkv),
    "CriticalAdaKV(ExpectedAttention)": _around(
        kvpress.CriticalAdaKVPress, _scorer(kvpress.ExpectedAttentionPress, use_vnorm=False)
    ),
    "ChunkKV(SnapKV)": _around(kvpress.ChunkKVPress, _snapkv),
    "EntropyGatedChunkKV(SnapKV)": _around(kvpress.EntropyGatedChunkKVPress, _snapkv),
    "Chunk(ExpectedAttention)": _around(kvpress.ChunkPress, _expected),
    "Block(KeyDiff)": _around(kvpress.BlockPress, _keydiff),
    "Merging(SnapKV)": _around(kvpress.MergingPress, _snapkv),
}

# The same sinks as moekv: kvpress gives these none, or (Compactor) others.
_lone = {name: _guarded(PEERS[name]) for name in ("KeyDiffPress", "LeverageScorePress")}
PEERS |= {f"{name}, guarded": factory for name, factory in _lone.items()} | {
    f"AdaKV({name}), guarded": _around(kvpress.AdaKVPress, _guarded(PEERS[f"{name}Press"]))
    for name in ("KeyDiff", "Compactor")
}

#: Peers that go by the last queries, with fewer of them than kvpress gives them: better where a
#: question ends the prompt.
ASKED: dict[str, Factory] = {
    f"{name}, {count} queries": factory
    for count in (16, 32)
    for name, factory in {
        "SnapKVPress": _scorer(kvpress.SnapKVPress, window_size=count),
        "AdaKV(SnapKV)": _around(
            kvpress.AdaKVPress, _scorer(kvpress.SnapKVPress, window_size=count)
        ),
    }.items()
} | {"AdaKV(TOVA)": _around(kvpress.AdaKVPress, PEERS["TOVAPress"])}

#: Methods that read the context again.
ANCHORS: dict[str, Factory] = {
    "KVzipPress": _scorer(kvpress.KVzipPress),
    "KVgradPress": _scorer(kvpress.KVgradPress),
    "KVComposePress": _scorer(kvpress.KVComposePress),
}

#: Methods that read attention weights, which only eager attention gives.
EAGER = frozenset({"KVComposePress", "ObservedAttentionPress"})

#: moekv, and the four original experts ruling alone: the baseline that it started from.
OURS: dict[str, Factory] = {
    "moekv": _scorer(MoERouterPress),
    "moekv training-free": _scorer(MoERouterPress, router=None),
}

#: Every expert alone: what routing has to beat.
EXPERTS: dict[str, Factory] = {
    f"expert {name}": _scorer(MoERouterPress, experts=(name,), top_k=1) for name in expert_names()
}

#: What budgets that move give, with the calibrated router and without.
BUDGETS: dict[str, Factory] = {
    f"moekv{free} budget={name}": _scorer(MoERouterPress, budget=name, **options)
    for free, options in (("", {}), (" training-free", {"router": None}))
    for name in ("uniform", "layer", "head")
}

#: Without what stays in any case.
KNOBS: dict[str, Factory] = {
    f"moekv {name}=0": _scorer(MoERouterPress, **{name: 0}) for name in ("sinks", "recent")
}

#: The press as it comes, with pairs in fewer bits: folded where many leave.
DEFAULT: dict[str, Factory] = {"moekv pairs=auto fold=auto": _scorer(MoERouterPress, pairs="auto")}

#: Evicted pairs join retained ones.
FOLDED: dict[str, Factory] = {
    f"moekv pairs={pairs} fold": _scorer(MoERouterPress, pairs=pairs, fold=True)
    for pairs in ("k8v8", "k8v4", "k4v4", "auto")
}

#: Pairs in fewer bits, in the bytes that pairs as the model makes them would take; nothing folded.
QUANTISED: dict[str, Factory] = {
    f"moekv pairs={pairs}": _scorer(MoERouterPress, pairs=pairs, fold=False)
    for pairs in ("k8v8", "k8v4", "k4v4", "auto")
}

#: The best of kvpress's presses on one task or more, all of whose layers and heads keep as many.
#: They are lent the same rows: in the same bytes they keep as many more pairs.
_BEST = (
    *("AdaKV(Compactor), guarded", "AdaKV(KeyDiff), guarded", "AdaKV(ExpectedAttention)"),
    *("AdaKV(SnapKV)", "LeverageScorePress, guarded", "StreamingLLMPress"),
)
STRONG: dict[str, Factory] = {name: PEERS[name] for name in _BEST}
LENT: dict[str, Factory] = {
    f"{name}, {pairs}": _lent(factory, pairs)
    for pairs in ("k8v4", "k4v4")
    for name, factory in STRONG.items()
}
#: Their evicted pairs join retained ones as well.
LENT_FOLDED: dict[str, Factory] = {
    f"{name}, {pairs} fold": _lent(factory, pairs, fold=True)
    for pairs in ("k8v4", "k4v4")
    for name, factory in STRONG.items()
}
#: KVzip, which reads the context again, in the same rows.
LENT_KVZIP: dict[str, Factory] = {
    f"KVzipPress, {pairs}": _lent(ANCHORS["KVzipPress"], pairs) for pairs in ("k8v4", "k4v4")
}

#: moekv inside kvpress's wrappers that call ``score``, beside those of ``PEERS`` around SnapKV.
WRAPPED: dict[str, Factory] = {
    f"{name}({press})": _around(wrapper, _scorer(MoERouterPress, **options))
    for press, options in (("moekv", {}), ("moekv training-free", {"router": None}))
    for name, wrapper in {
        "AdaKV": kvpress.AdaKVPress,
        "CriticalKV": kvpress.CriticalKVPress,
        "CriticalAdaKV": kvpress.CriticalAdaKVPress,
        "Chunk": kvpress.ChunkPress,
        "ChunkKV": kvpress.ChunkKVPress,
        "Merging": kvpress.MergingPress,
    }.items()
}

#: Methods that ask a layer for its queries once more, where a replay recalls other ones.
LIVE = frozenset(WRAPPED | LENT_FOLDED)

#: Every kind of router over the same experts.
ROUTED: dict[str, Factory] = {
    f"moekv {name}": _scorer(MoERouterPress, router_type=name) for name in ROUTERS
}

#: Every kind of router over three sets of experts, beside `expected`, which all tokens share.
MERITS: dict[str, Factory] = {
    f"{router}, {name}": _scorer(
        MoERouterPress, router=None, shared="expected", router_type=router, **chosen
    )
    for router in ROUTERS
    for name, chosen in {
        "default experts": {"experts": ROUTED_EXPERTS},
        "four experts": {"num_experts": 4},
        "all experts": {"num_experts": len(expert_names()) - 1},
    }.items()
} | {
    "num_experts=auto": _scorer(MoERouterPress, num_experts="auto", router=None),
}

#: Scorers of kvpress that may stand in lists of experts.
LISTED = (
    *("ExpectedAttentionPress", "KeyDiffPress", "KnormPress", "LagKVPress"),
    *("LeverageScorePress", "SnapKVPress", "TOVAPress"),
)


def _member(name: str) -> Any:
    return getattr(kvpress, name)() if name in LISTED else name


def _listed(members: Sequence[str], **options: object) -> Factory:
    return lambda ratio: MoERouterPress(ratio, experts=list(map(_member, members)), **options)


def _draw_lists(count: int, seed: int = 0) -> dict[str, tuple[str, ...]]:
    """Draw lists of two or three experts, no two alike."""
    rng, known = random.Random(seed), sorted({*expert_names(), *LISTED})
    lists: dict[str, tuple[str, ...]] = {}
    while len(lists) < count:
        members = tuple(sorted(rng.sample(known, rng.choice((2, 3)))))
        lists[" + ".join(members)] = members
    return lists


#: Lists of experts at random, each member alone, and the lists beside the calibrated router.
LISTS = _draw_lists(20)
MEMBERS: dict[str, Factory] = {
    f"expert {name}": _listed([name]) for name in sorted(LISTED)
} | EXPERTS
IN_LISTS: dict[str, Factory] = {name: _listed(members) for name, members in LISTS.items()}
CALIBRATED_LISTS: dict[str, Factory] = {
    f"calibrated beside {name}": _listed(members, router=str(SHIPPED / "SmolLM2-135M-Instruct"))
    for name, members in LISTS.items()
}

METHODS: dict[str, Factory] = (
    PEERS
    | ASKED
    | ANCHORS
    | OURS
    | DEFAULT
    | QUANTISED
    | FOLDED
    | LENT
    | LENT_FOLDED
    | LENT_KVZIP
    | EXPERTS
    | BUDGETS
    | KNOBS
    | WRAPPED
    | ROUTED
    | MERITS
    | MEMBERS
    | IN_LISTS
    | CALIBRATED_LISTS
)


def add_routers(folder: Path) -> list[str]:
    """Add a method for each calibrated router in a folder; return their names."""
    names = []
    for path in sorted(path.parent for path in folder.glob("*/config.json")):
        names.append(f"moekv, {path.name}")
        METHODS[names[-1]] = _scorer(MoERouterPress, router=str(path))
    return names


#: Why the rest of kvpress is not in the table.
EXCLUDED = {
    "CAMPress": "compresses while decoding",
    "CompressionRatioDecodingPress": "compresses while decoding",
    "ComposedPress": "composes others",
    "DecodingPress": "compresses while decoding",
    "DMSPress": "its ratio follows a threshold on scores and cannot be set",
    "FinchPress": "sees the question",
    "KeyRerotationPress": "moves kept keys to new positions; scores are another press'",
    "PerLayerCompressionPress": "wraps another press; its ratios are the user's",
    "PrefillDecodingPress": "compresses while decoding",
    "RestoreKVPress": "needs embeddings trained for the model",
    "SimLayerKVPress": "its ratio follows a threshold and cannot be set",
    "ThinKPress": "removes channels of keys, not pairs",
}
