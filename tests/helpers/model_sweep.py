"""Tries the press on a tiny random model of every architecture that transformers knows.

``python tests/helpers/model_sweep.py`` writes docs/models.md; names alone are tried and printed.
"""

import copy
import inspect
import re
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from every_model import IMAGE_MODELS, TEXT_MODELS, build
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moekv import DecodingConfig, Expert, LayerView, MoERouterPress
from moekv.cache.ragged import RaggedLayer
from moekv.models.hooks import cache_argument
from moekv.ops import ScoreKind

LENGTH, STEPS, WINDOW = 70, 3, 13
PADDING, TARGET, INTERVAL = 11, 20, 2
SECONDS = 60
KINDS = ("works", "refused", "left alone", "not tried")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PARTS = {"kosmos-2": "text_model"}
"""What reads text where a model's own forward wants an image at each step: `generate` calls it."""
BY_HAND = "\n## How models are run\n"
"""Where the part of the page begins that nothing generates."""


class WrongError(AssertionError):
    """What a model says under a press is not what it would say."""


class Spy(Expert):
    """Remembers the window's queries."""

    name, kinds = "spy", (ScoreKind.MASS,)

    def __init__(self) -> None:
        self.queries: dict[nn.Module, Tensor] = {}

    def scores(self, view: LayerView) -> Tensor:
        self.queries[view.module] = view.queries.clone()
        return view.scores_of(ScoreKind.MASS)


class Recorder:
    """Stands around all attention functions: notes queries, and masks what a cache has evicted."""

    def __init__(self) -> None:
        self.queries: dict[nn.Module, Tensor] = {}
        self.visible: dict[int, Tensor] = {}  # [B, H, T] of layers of `full`
        self.full: list[Any] = []
        self.masked: set[int] = set()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        kind = type(ALL_ATTENTION_FUNCTIONS)
        plain = kind.get_interface

        def get(functions: Any, name: str, default: Any) -> Any:
            function = plain(functions, name, default)

            def attention(
                module: nn.Module,
                query: Tensor,
                key: Any,
                value: Any,
                attention_mask: Any,
                **k: Any,
            ) -> Any:
                if (masked := self._mask(module, query, key, value, attention_mask, k)) is not None:
                    return masked, None
                result = function(module, query, key, value, attention_mask, **k)
                self.queries[module] = query.detach().clone()
                return result

            return attention

        kind.get_interface = get
        try:
            yield
        finally:
            kind.get_interface = plain

    def _mask(
        self,
        module: nn.Module,
        query: Tensor,
        key: Any,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor | None:
        """Attention over the full cache as if what is not visible were not there."""
        index = self._layer_of(module, key)
        if index not in self.visible or type(key) is not Tensor:
            return None
        self.masked.add(index)
        seen = self.visible[index]
        if key.shape[1] != seen.shape[1]:  # made of one latent
            seen = seen[:, :1].expand(-1, key.shape[1], -1)
        new = key.shape[2] - seen.shape[2]
        seen = torch.cat([seen, seen.new_ones(*seen.shape[:2], new)], 2)[:, :, None]
        groups, scaling = query.shape[1] // key.shape[1], options.get("scaling")
        key, value, seen = (x.repeat_interleave(groups, 1) for x in (key, value, seen))
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if cap := options.get("softcap"):
            logits = cap * torch.tanh(logits / cap)
        if mask is not None:
            mask = mask[..., : key.shape[2]]
            is_flag = mask.dtype == torch.bool
            logits = logits.masked_fill(~mask, -torch.inf) if is_flag else logits + mask
        logits = logits.masked_fill(~seen, -torch.inf)
        if (sinks := options.get("s_aux")) is not None:
            sinks = sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sinks], -1)
        return (logits.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)

    def _layer_of(self, module: Any, key: Any) -> int:
        """Its own, or another's, whose pairs it shares."""
        for index, layer in enumerate(self.full if isinstance(key, Tensor) else ()):
            keys = getattr(layer, "keys", None)
            if keys is not None and keys.data_ptr() == key.data_ptr():
                return index
        return getattr(module, "layer_idx", -1)


def _feed(
    model: Any,
    cache: Any,
    ids: Tensor,
    first: int,
    *,
    told: bool = False,
    masked: bool = True,
    **seen: Any,
) -> Tensor:
    """Logits of the last token. Told its positions, a model does not take them from its pairs.

    By a mask, some count them that stand behind an image, and want them of all tokens.
    """
    inputs: dict[str, Any] = {}
    if masked:
        inputs["attention_mask"] = torch.ones(1, first + ids.shape[1]).long()
    if told and "position_ids" in inspect.signature(model.forward).parameters:
        inputs = {"position_ids": torch.arange(first, first + ids.shape[1])[None]}
    elif told:
        inputs, cache.get_seq_length = {}, lambda *_, **__: first
    inputs |= seen | cache_argument(model, cache)
    out = model(input_ids=ids, use_cache=True, **inputs)
    return out.logits[:, -1]  # type: ignore[no-any-return]


def _steps(model: Any, cache: Any, ids: Tensor, **how: bool) -> list[Tensor]:
    ahead = range(LENGTH, LENGTH + STEPS)
    return [_feed(model, cache, ids[:, i : i + 1], i, **how) for i in ahead]


def _pairs(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, H, L, D] of a cache layer, at the right end, and how many [B, H]."""
    if isinstance(layer, RaggedLayer):
        return layer.to_dense()
    return layer.keys, layer.values, torch.full(layer.keys.shape[:2], layer.keys.shape[2])


def _kept(layer: Any, full: Any) -> Tensor:
    """Which of a full layer's pairs [B, H, T] a compressed one has, in order."""
    keys, values, lengths = _pairs(layer)
    seen = torch.zeros(full.keys.shape[:3], dtype=torch.bool)
    for b, h in torch.cartesian_prod(*map(torch.arange, seen.shape[:2])).tolist():
        first, at = keys.shape[2] - int(lengths[b, h]), 0
        same = _alike(keys[b, h, first:], full.keys[b, h])
        same &= _alike(values[b, h, first:], full.values[b, h])
        for row in same:
            found = row[at:].nonzero()
            if not len(found):
                raise WrongError("a pair that the full cache has not")
            at += int(found[0]) + 1
            seen[b, h, at - 1] = True
    return seen


def _alike(some: Tensor, others: Tensor) -> Tensor:
    """Which of some rows [n, D] are which others [T, D]; those of steps are rounded otherwise."""
    differences = (some[:, None] - others).abs().amax(-1)
    return differences <= 1e-4 * others.abs().amax(-1)


def _close(got: Tensor, expected: Tensor, what: str) -> None:
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-9))
    if not error < 2e-3:
        raise WrongError(f"{what}: relative error {error:.3g}")


def _is_full(layer: Any) -> bool:
    return type(layer) is DynamicLayer


def _sees_all(layer: Any) -> bool:
    """Whether attention over a cache layer of any kind is over all that was fed."""
    name = type(layer).__name__  # the second is not known to older ones
    return name in ("DynamicLayer", "LinearAttentionAndFullAttentionLayer")


@torch.no_grad()
def try_press(model: PreTrainedModel, image: tuple[int, ...] = (), **seen: Any) -> str:
    """Say what a press does on a model.

    Parameters
    ----------
    model : PreTrainedModel
    image : tuple of int
        Tokens that stand for an image within the prompt.
    **seen
        Inputs of the prompt beside its tokens, such as ``pixel_values``.

    Returns
    -------
    str
        "works"; "refused: ...", or "left alone: ..." where no layer has full attention, with the
        error that came before anything ran; or "not tried: ..." with what the model itself says to
        a text and a cache.

    Raises
    ------
    WrongError
        It went on otherwise than over the same pairs of a full cache; at ratio 0 it was not as
        without a press; or an expert saw other queries than attention.
    """
    ids = torch.randint(3, 100, (1, LENGTH + STEPS), generator=torch.Generator().manual_seed(1))
    ids[:, 20 : 20 + len(image)] = torch.tensor(image, dtype=torch.long)
    prompt, recorder = ids[:, :LENGTH], Recorder()
    with recorder.at_work():
        try:
            full = DynamicCache(config=model.config)
            plain = _feed(model, full, prompt, 0, **seen)
        except Exception as error:
            return f"not tried: {_short(error)}"
        own = {i: layer for i, layer in enumerate(full.layers) if _is_full(layer)}
        if own and not any(layer.get_seq_length() for layer in own.values()):
            return "not tried: it fills no cache"
        crossed = {i: own.pop(i) for i in [*own] if own[i].get_seq_length() != LENGTH}
        half, ran = DynamicCache(config=model.config), []
        embedding = next(x for x in model.modules() if isinstance(x, nn.Embedding))
        handle = embedding.register_forward_hook(lambda *_: ran.append(1))
        try:
            with MoERouterPress(0.5)(model):
                first = _feed(model, half, prompt, 0, **seen)
        except Exception as error:
            if ran or not str(error).startswith("expected"):
                raise
            said = "refused" if any(map(_sees_all, full.layers)) else "left alone"
            return f"{said}: {_short(error)}"
        finally:
            handle.remove()
        for i, layer in crossed.items():
            if layer.get_seq_length() and not torch.equal(half.layers[i].keys, layer.keys):
                raise WrongError("pairs of a cross attention have left")
        if not own:
            raise WrongError("it was served without a layer of full attention")
        _close(first, plain, "a first prompt at .5")
        recorder.visible = {i: _kept(half.layers[i], layer) for i, layer in own.items()}
        kept = sum(int(seen.sum()) for seen in recorder.visible.values())
        if kept != sum(seen.numel() for seen in recorder.visible.values()) // 2:
            raise WrongError(f"{kept} pairs are kept")
        _compare_steps(model, recorder, full, half, ids, seen)
        _compare_prefill(model, recorder, plain, prompt, seen)
        without = "" if image else _compare_rows(model, recorder, ids)
    return f"works: {len(own)} of {len(full.layers)} layers{without}"


def _compare_steps(
    model: PreTrainedModel,
    recorder: Recorder,
    full: Any,
    half: Any,
    ids: Tensor,
    seen: dict[str, Any],
) -> None:
    visible, recorder.full = recorder.visible, full.layers
    masked = not any(hasattr(module, "rope_deltas") for module in model.modules())
    expected = _steps(model, full, ids, masked=masked)
    recorder.visible, recorder.full = {}, []
    if not set(visible) <= recorder.masked:  # layers that attend by themselves
        if recorder.masked:
            raise WrongError("attention that cannot be masked")
        cut = DynamicCache(config=model.config)
        _feed(model, cut, ids[:, :LENGTH], 0, **seen)
        for i, kept in visible.items():
            layer: Any = cut.layers[i]
            at = kept.nonzero()[:, 2].view(*kept.shape[:2], -1, 1)
            layer.keys, layer.values = (x.take_along_dim(at, 2) for x in (layer.keys, layer.values))
        expected = _steps(model, cut, ids, told=True)
    for got, wanted in zip(_steps(model, half, ids, masked=masked), expected, strict=True):
        _close(got, wanted, "decoding at .5")


def _compare_rows(model: PreTrainedModel, recorder: Recorder, ids: Tensor) -> str:
    """Two rows, the first with padding, in steps of a block that compress again.

    Returns
    -------
    str
        What is refused of that, for the table.
    """
    rows = torch.cat([ids[:, LENGTH:], ids[:, :LENGTH], ids[:, LENGTH:]], 1)[:, : LENGTH + STEPS]
    rows = torch.cat([rows, ids])
    without = []
    decoding, padding = DecodingConfig(TARGET, INTERVAL), PADDING
    try:
        with MoERouterPress(0.5, decoding=decoding)(model):
            pass
    except ValueError as error:
        if not str(error).startswith("expected"):
            raise
        without.append("`decoding`")
        decoding = None
    for padding in (PADDING, 0):
        mask = torch.ones_like(rows)
        mask[0, :padding] = 0
        try:
            _compare_batch(model, recorder, rows, mask, decoding)
            break
        except ValueError as error:
            if not padding or not str(error).startswith("expected"):
                raise
            without.append("padding")
    return f", without {' and '.join(without)}" if without else ""


def _compare_batch(
    model: PreTrainedModel,
    recorder: Recorder,
    ids: Tensor,
    mask: Tensor,
    decoding: DecodingConfig | None,
) -> None:
    """Each step over what is held before it, against the full cache without the other pairs.

    Where layers attend by themselves, against the same step over a copy outside the block.
    """

    def feed(cache: Any, first: int, end: int) -> Tensor:
        return _feed_rows(model, cache, ids, mask, first, end)

    press = MoERouterPress(0.5, decoding=decoding)
    full, half = DynamicCache(config=model.config), DynamicCache(config=model.config)
    recorder.visible, recorder.full, recorder.masked = {}, [], set()
    plain = feed(full, 0, LENGTH)
    own = {
        i: layer
        for i, layer in enumerate(full.layers)
        if _is_full(layer) and layer.get_seq_length() == LENGTH
    }
    with press(model):
        first = feed(half, 0, LENGTH)
    _close(first, plain, "a first prompt of two rows at .5")
    held, rows = [], [_held_by_rows(half, own)]
    for end in range(LENGTH + 1, LENGTH + STEPS + 1):
        held.append(sum(int(_pairs(half.layers[i])[2].sum()) for i in own))
        other = copy.deepcopy(half)
        if set(own) <= recorder.masked or end == LENGTH + 1:
            recorder.visible = {i: _kept(half.layers[i], layer) for i, layer in own.items()}
            recorder.full = full.layers
            expected = feed(full, end - 1, end)
            recorder.visible, recorder.full = {}, []
        if not set(own) <= recorder.masked:  # layers that attend by themselves
            expected = feed(other, end - 1, end)
        with press(model):
            got = feed(half, end - 1, end)
        _close(got, expected, f"step {end - LENGTH} of two rows")
        rows.append(_held_by_rows(half, own))
    heads = sum(layer.keys.shape[:2].numel() for layer in own.values())
    if decoding is not None and not max(held) <= (TARGET + INTERVAL) * heads:
        raise WrongError(f"{max(held)} pairs are held in {heads} heads")
    if decoding is not None and not held[-1] < held[-2]:
        raise WrongError(f"no step has compressed: {held} pairs")
    for row, text in enumerate(ids):
        alone = text[mask[row] > 0][None]
        _compare_alone(model, press, alone, plain[row], [*own], [step[row] for step in rows])


def _feed_rows(
    model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, first: int, end: int
) -> Tensor:
    counts = not any(hasattr(module, "rope_deltas") for module in model.modules())
    given = {"attention_mask": mask[:, :end]} if counts or not first else {}
    return _feed(model, cache, ids[:, first:end], first, masked=False, **given)


def _held_by_rows(cache: Any, indices: Iterable[int]) -> list[list[Tensor]]:
    """Copy the keys [n, D] of each row's heads, in some layers of a cache."""
    found: list[list[Tensor]] = []
    for index in indices:
        keys, _, lengths = _pairs(cache.layers[index])
        found = found or [[] for _ in keys]
        for b, h in torch.cartesian_prod(*map(torch.arange, lengths.shape)).tolist():
            found[b].append(keys[b, h, keys.shape[2] - int(lengths[b, h]) :].clone())
    return found


def _compare_alone(
    model: PreTrainedModel,
    press: MoERouterPress,
    text: Tensor,
    plain: Tensor,
    indices: list[int],
    held: list[list[Tensor]],
) -> None:
    """Hold what a row had in a batch, after the prompt and each step, to what it has alone.

    As many pairs; and the same but for near ties, where padding has not moved their positions and
    the model says of the prompt what it says in the batch, ``plain``.
    """
    cache, count = DynamicCache(config=model.config), text.shape[1]
    fed, ones = [0, *range(count - STEPS, count + 1)], torch.ones_like(text)
    other = DynamicCache(config=model.config)
    said = _feed_rows(model, other, text, ones, 0, count - STEPS)[0]
    is_same = count == LENGTH + STEPS and bool(torch.isclose(said, plain, atol=1e-3).all())
    for (first, end), keys in zip(pairwise(fed), held, strict=True):
        with press(model):
            _feed_rows(model, cache, text, ones, first, end)
        alone = _held_by_rows(cache, indices)[0]
        if (n := sum(map(len, keys))) != (m := sum(map(len, alone))):
            raise WrongError(f"a row of two holds {n} pairs after {end} tokens, alone {m}")
        if is_same:
            same = sum(int(_alike(a, b).any(1).sum()) for a, b in zip(keys, alone, strict=True))
            if same < 0.95 * n:
                raise WrongError(f"a row of two holds {same} of the {n} pairs that it holds alone")


def _compare_prefill(
    model: PreTrainedModel,
    recorder: Recorder,
    plain: Tensor,
    prompt: Tensor,
    seen: dict[str, Any],
) -> None:
    spy = Spy()
    recorder.queries.clear()
    with MoERouterPress(0.0, experts=[spy], top_k=1, window=WINDOW)(model):
        got = _feed(model, DynamicCache(config=model.config), prompt, 0, **seen)
    _close(got, plain, "ratio 0")
    for layer, queries in spy.queries.items():
        if layer in recorder.queries:
            _close(queries, recorder.queries[layer][:, :, -WINDOW:], "queries")


def _short(error: Exception) -> str:
    """The beginning of the first line, in words that do not change from run to run."""
    text = re.sub(r"0x[0-9a-f]+|[|`]", "", str(error)).strip().partition("\n")[0]
    return f"{type(error).__name__}: {textwrap.shorten(text, 110, placeholder=' …')}"


def outcome(name: str) -> str:
    """Say what a press does on the tiny model of an entry of the auto-mappings."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {SECONDS} s of a processor")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = build(name)
            except Exception as error:
                return f"not tried: {_short(error)}"
            return try_press(getattr(model, PARTS[name]) if name in PARTS else model)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def render(found: dict[str, str], version: str) -> str:
    """Render docs/models.md of what was found with the transformers that runs."""
    lines = [
        "# Models",
        "",
        "What `MoERouterPress(0.5)` does on a tiny random model of every architecture in the",
        f"auto-mappings of transformers {version}, on a CPU and with text alone.",
        "`python tests/helpers/model_sweep.py` has written the tables; `make test-latest` tries",
        "every row again. [Below](#how-models-are-run): several processes and devices, and weights",
        "that are stored in other ways.",
        "",
        "- *works*: a prompt's logits are those without a press, at ratio 0 and where half of its",
        "  pairs leave behind it; experts see the queries that the model's own attention asks;",
        "  decoding then is that over the full cache with these pairs masked. So it is for two",
        "  rows, one of them padded, with `decoding`, in steps that evict, and each row retains",
        "  what it retains alone: all but what is named behind *without*, which is refused.",
        "  (Models that attend in their own code are held to steps in which nothing leaves there.)",
        "  Layers that see the whole past are compressed, so many of the tiny model's; others are",
        "  left alone. Kosmos-2's forward wants an image at each step: its text model is tried,",
        "  which `generate` calls.",
        "- *refused*: an error before anything ran.",
        "- *left alone*: the same, where no layer has full attention: states, windows, indices.",
        "- *not tried*: the shrunk configuration makes no model that reads text into a cache. That",
        "  says nothing about the real one.",
    ]
    for title, names in (("Text", TEXT_MODELS), ("Image and text", IMAGE_MODELS)):
        rows = {name: found[name] for name in names}
        counts = [sum(x.startswith(kind) for x in rows.values()) for kind in KINDS]
        share = counts[0] / (counts[0] + counts[1])
        lines += [
            *("", f"## {title}", ""),
            "{} work, {} are refused, {} are left alone, {} were not tried.".format(*counts),
            f"Of those with layers of full attention that were tried, {share:.0%} work.",
            *("", "| model | outcome |", "|---|---|"),
            *(f"| {name} | {result} |" for name, result in rows.items()),
        ]
    _, title, by_hand = PAGE.read_text().partition(BY_HAND)
    return "\n".join(lines) + "\n" + title + by_hand


def read_page() -> tuple[dict[str, str], str]:
    """Read outcomes, and the version of transformers, off docs/models.md."""
    text = PAGE.read_text()
    rows = re.findall(r"^\| (?!model )(\S+) \| (.+) \|$", text, re.MULTILINE)
    return dict(rows), text.partition("transformers ")[2].partition(",")[0]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    found, bad = {}, 0
    for name in sys.argv[1:] or [*TEXT_MODELS, *IMAGE_MODELS]:
        try:
            found[name] = outcome(name)
        except Exception as error:
            found[name], bad = f"WRONG: {_short(error)}", bad + 1
        print(f"{name}: {found[name]}", flush=True)
    if len(sys.argv) == 1 and not bad:
        PAGE.write_text(render(found, transformers.__version__))
    sys.exit(bad > 0)
