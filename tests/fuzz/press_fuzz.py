"""Random lives of compressed caches, each beside the full cache with masks.

    python tests/fuzz/press_fuzz.py --seconds 60        # or --cases 10000, --seed 7

A life is a prefill, whole or in chunks, and some steps: tokens, compressions while decoding, crops,
rows that are selected or repeated, copies, files, masks, forwards that fail halfway; with and
without a calibrated router, in dynamic caches and in static ones, in 16 bits and in fewer. After
every step the compressed cache has to hold what the full one holds, but for what has left, and give
the logits that the full one gives where exactly that is hidden (``tests/helpers``, ``Lockstep``);
each row of a batch has to give those that it gives alone.
The seed of every life is its number; one that fails is reduced, and printed as a call that can be
put into a test.
"""

import argparse
import copy
import functools
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import pytest  # noqa: E402
import torch  # noqa: E402
from growth_cases import EXPERTS, Uneven, assert_average  # noqa: E402
from masked_reference import Lockstep  # noqa: E402
from random_router import random_router  # noqa: E402
from tiny_models import tiny_model, tokens  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402

from moekv import DecodingConfig, MoERouterPress, load_cache, save_cache  # noqa: E402
from moekv.budget import kept_pairs  # noqa: E402
from moekv.cache.ragged import RaggedLayer  # noqa: E402
from moekv.cache.rows import gain  # noqa: E402
from moekv.ops import pair_layout  # noqa: E402

FORMATS = ("16", "16", "16", "k8v8", "k8v4", "k4v4")
MODELS = ("llama", "llama_mha", "qwen3", "gemma3", "phi3")
MOST_TOKENS, MOST_ROWS = 120, 6
Step = tuple[Any, ...]


model_of = functools.cache(tiny_model)


class Fed(NamedTuple):
    """Tokens [B, N], what is shown to them, their logits, and the length with them."""

    input_ids: Tensor
    shown: Tensor | None
    logits: Tensor
    length: int


NEAR = {"16": 2e-3, "k8v8": 2e-2, "k8v4": 1e-1, "k4v4": 2e-1}
"""Of logits of a row and the same alone: numbers between two codes may be rounded to either."""


class Life(Lockstep):
    """A compressed cache, the full one, and a compressed one for each row."""

    def __init__(self, name: str, kind: str, padding: tuple[int, ...]) -> None:
        config = model_of(name, "sdpa").config
        static = StaticCache(config=config, max_cache_len=2 * MOST_TOKENS)
        self.goes_on = kind == "calibrated"  # compression: only there a router's notes are taken
        super().__init__(name, padding, static if kind == "static" else None, model_of)
        self.serial = self.loose = 0
        # Static caches have no padding, and rows of one length: as many pairs of each.
        several = kind != "static" and len(padding) > 1
        self.alone: list[DynamicCache] = [DynamicCache() for _ in padding] if several else []
        self.near = NEAR["16"]
        self.has_even_keys = name in ("qwen3", "gemma3")  # which are normed
        self.fed_in_block: list[Fed] | None = None
        self.router = random_router(self.model) if kind in ("calibrated", "once") else None

    def press(self, options: dict[str, Any], **more: Any) -> MoERouterPress:
        """Make a press, with the life's router if it has one."""
        options = {"router": self.router} | options | more
        if self.router is not None:  # which brings its experts
            options = {k: v for k, v in options.items() if k not in ("experts", "top_k")}
        elif options.get("experts") == "uneven":
            options["experts"] = [Uneven()]
        options.pop("record", None)
        return MoERouterPress(**options)

    def without_folding(self, options: dict[str, Any], **more: Any) -> dict[str, Any]:
        """See that ``fold=True`` is refused where pairs have no biases or leave more than once."""
        given = options | more
        if given.get("fold") is not True:
            return options
        if given["pairs"] != "16" and not given.get("streaming") and not given.get("decoding"):
            return options
        with pytest.raises(ValueError, match="expected (quantised pairs .* with fold|fold or )"):
            self.press(options, **more)
        return options | {"fold": "auto"}

    def folds(self, options: dict[str, Any], whole: bool) -> bool:
        """Say whether pairs that leave join others: docs/design.md, "Folding"."""
        fold, pairs = options["fold"], options["pairs"]
        if not fold or pairs == "16" or not options["compression_ratio"]:
            return False
        if fold is True:
            return True
        if not whole or options["streaming"] or self.goes_on:
            return False
        if self.router is None and "expected" not in options["experts"]:
            return False
        config = self.model.config.get_text_config()
        whole_dim = config.hidden_size // config.num_attention_heads
        dim = getattr(config, "head_dim", whole_dim)
        stored = pair_layout(pairs, dim, dim).num_bytes + 2
        return 1 - (1 - options["compression_ratio"]) * 2 * dim * 4 / stored >= 0.5

    # --- Rows alone -------------------------------------------------------------------------------

    @contextmanager
    def block(
        self, options: dict[str, Any], more: dict[str, Any] | None = None, **given: Any
    ) -> Iterator[MoERouterPress]:
        """Open a press's block, and then one for each row alone, in which the same is fed."""
        more = more or {}
        even = options.get("experts") == "uneven" and self.has_even_keys
        if even or options["budget"] == "layer":
            self.alone = []  # pairs score alike, or rows of dense layers share a length
        press = self.press(options, **more)
        self.near = max(self.near, NEAR[options.get("pairs", "16")])
        self.fed_in_block = fed = []
        try:
            with press(self.model, **given):
                yield press
        finally:
            self.fed_in_block = None
        for row in range(len(self.alone)):
            with self.press(options, **more)(self.model, **given):
                for each in fed:
                    self.feed_alone(row, each)

    def feed(self, input_ids: Tensor, shown: Tensor | None = None) -> Tensor:
        """Feed the caches of rows alone as well, in a block behind it."""
        logits = super().feed(input_ids, shown)
        fed = Fed(input_ids, shown, logits, self.length)
        if self.fed_in_block is not None:
            self.fed_in_block.append(fed)
        else:
            try:
                for row in range(len(self.alone)):
                    self.feed_alone(row, fed)
            except ValueError as error:  # whose few pairs are not worth their positions
                if shown is None or "attention mask that shows" not in str(error):
                    raise
                self.alone = []
        return logits

    def feed_alone(self, row: int, fed: Fed) -> None:
        """See that a row gives the same logits alone."""
        padding, position = int(self.padding[row]), torch.arange(fed.length)
        mask = (position >= padding).long()[None]
        if fed.shown is not None:
            mask = mask * fed.shown[row]
        position = position[fed.length - fed.input_ids.shape[1] :]
        with torch.no_grad():
            logits = self.model(
                fed.input_ids[row : row + 1],
                past_key_values=self.alone[row],
                attention_mask=mask,
                position_ids=(position - padding).clamp(min=0)[None],
                cache_position=position,
            ).logits
        real = position >= padding
        torch.testing.assert_close(
            fed.logits[row, real],
            logits[0, real],
            atol=self.near,
            rtol=self.near,
            msg=lambda text: f"row {row} answers otherwise than alone: {text}",
        )

    def crop(self, count: int) -> None:
        """Forget the newest tokens, of rows alone as well."""
        super().crop(count)
        for cache in self.alone:
            cache.crop(-count)

    def select(self, rows: list[int], how: str = "reorder_cache") -> None:
        """Go on with other rows, alone as well."""
        super().select(rows, how)
        if self.alone:
            self.alone = [copy.deepcopy(self.alone[row]) for row in rows]

    def repeat(self, times: int) -> None:
        """Repeat every row; its copies are alone as well."""
        super().repeat(times)
        self.alone = [copy.deepcopy(cache) for cache in self.alone for _ in range(times)]

    def add(self, count: int) -> None:
        """Feed tokens."""
        self.serial += 1
        self.loose += count
        self.feed(tokens(len(self.padding), count, seed=self.serial))

    # --- Steps ------------------------------------------------------------------------------------

    def prefill(self, cuts: list[int], options: dict[str, Any]) -> None:
        """Compress after a prefill, or after each of its chunks."""
        options = {"pairs": "16", "fold": "auto", "streaming": False} | options
        # Only where compression goes on is anything noted for a router.
        more = {"decoding": FAR} if self.goes_on else {}
        options = self.without_folding(options, **more)
        whole = len(cuts) == 1
        if options["fold"] is True and not whole:
            with (
                pytest.raises(ValueError, match="fold or context_length, got both"),
                self.press(options, **more)(self.model, context_length=sum(cuts)),
            ):
                raise AssertionError("not refused")
            options["fold"] = "auto"
        folds = self.folds(options, whole)
        records = {"record": True} if whole and options.get("record") else {}
        length = None if whole else sum(cuts)
        with self.block(options, more, context_length=length, **records) as press:
            for count in cuts:
                self.add(count)
        self.loose = 0
        real, ratio = self.length - self.padding, options["compression_ratio"]
        layer, stored = self.full.layers[self.whole[0]], options["pairs"]
        more_pairs = gain(stored, layer.keys, layer.values, biased=folds)
        kept = torch.tensor([kept_pairs(n, ratio, more_pairs) for n in real.tolist()])
        assert_average(self.pairs(), kept, options["budget"])
        share = float(kept.sum() / real.sum())
        if folds and share == 1:
            folds, more_pairs = False, gain(stored, layer.keys, layer.values)
        stats = press.get_stats()
        compression = stats["compression"]
        assert abs(compression["evicted"] - (1 - share)) < 1e-6
        assert abs(compression["ratio"] - (1 - share / more_pairs)) < 1e-6
        held = [self.cache.layers[index] for index in self.whole]
        assert all(x.rows.pairs == stored for x in held if isinstance(x, RaggedLayer))
        assert stored == "16" or all(isinstance(x, RaggedLayer) for x in held)
        assert [self.folded[index] for index in self.whole] == [folds] * len(held)
        acts = ratio > 0 or stored != "16" or self.goes_on
        assert stats["fold"]["used"] == (folds if acts else None)
        assert not acts or folds == (stats["fold"]["why_not"] is None)
        evicted = (1 - share) * int(real.sum()) * self.heads * len(held)
        joined, least = compression["folded"] * evicted, self.joined[0]
        assert least - 0.01 <= joined <= sum(self.joined) + 0.01, "other numbers of joined pairs"

    def more(self, count: int) -> None:
        """Feed tokens outside of blocks; a calibrated router has to see them."""
        if not self.goes_on:
            self.add(count)
            return
        with self.block({"budget": "uniform"}, {"decoding": FAR}):
            self.add(count)

    def grow(self, count: int, target: int, interval: int, options: dict[str, Any]) -> None:
        """Decode in a block in which compression goes on."""
        more = {"decoding": DecodingConfig(target, interval)}
        with self.block(self.without_folding(options, **more), more):
            for _ in range(count):
                pairs = self.pairs()
                self.add(1)
                is_token = (self.padding < self.length)[:, None]
                if (self.pairs() < pairs + is_token).any():
                    self.loose = 0
                # A cache in 16 bits is stored in fewer whole, when it is met.
                stored = max(getattr(x, "context_length", 0) for x in self.cache.layers)
                self.loose = min(self.loose, self.length - stored)
        real = self.length - self.padding
        over_model = options["budget"] in ("layer", "model")
        over = [0, 2] if over_model else [2]
        scope = self.heads * (len(self.whole) if over_model else 1)
        most = real.clamp(0, target + interval - 1)  # none, while all of a row is padding
        assert (self.pairs().sum(over) <= scope * most).all()

    def masked(self, back: list[int], row: int, count: int) -> None:
        """Hide some earlier tokens from new ones: that may be refused where places are unknown."""
        row %= len(self.padding)
        places = [self.length - n for n in back if n <= self.length - int(self.padding[row])]
        shown = torch.ones(len(self.padding), self.length + count, dtype=torch.bool)
        shown[row, places] = False
        held = [self.cache.layers[index] for index in self.whole]
        known = all(isinstance(x, RaggedLayer) and x.follows_masks for x in held)
        may_refuse = any(n > self.loose for n in back) and not known
        lengths, visible = self.lengths(), list(self.visible)
        self.serial += 1
        try:
            self.feed(tokens(len(self.padding), count, seed=self.serial), shown)
        except ValueError as error:
            if not may_refuse or "attention mask that shows" not in str(error):
                raise
            self.take_off(lengths)
            self.visible, self.length = visible, self.length - count
            return
        self.loose += count

    def lengths(self, cache: Any = None) -> list[int]:
        """Say the true lengths of a cache's layers, by default of the batch's."""
        return [int(layer.get_seq_length()) for layer in (cache or self.cache).layers]

    def take_off(self, lengths: list[int], cache: Any = None) -> None:
        """Crop the tokens that some layers have got before others failed."""
        for layer, length in zip((cache or self.cache).layers, lengths, strict=True):
            if layer.get_seq_length() > length:
                layer.crop(length)
        assert self.lengths(cache) == lengths

    def fail(self, count: int, layer: int) -> None:
        """Break down in a layer: what was there stays, and can be cropped off again."""
        layers = self.model.model.layers
        module = layers[layer % len(layers)].self_attn
        lengths = self.lengths()

        def break_down(*_: Any) -> None:
            raise ArithmeticError("broken")

        handle = module.register_forward_pre_hook(break_down)
        try:
            for cache in (self.cache, *self.alone):
                self.try_to_feed(cache, len(self.padding) if cache is self.cache else 1, count)
                self.take_off(lengths, cache)
        finally:
            handle.remove()
        self.see()

    def try_to_feed(self, cache: Any, rows: int, count: int) -> None:
        """Feed tokens to a model that breaks down."""
        with (
            pytest.raises(ArithmeticError, match="broken"),
            torch.no_grad(),
            self.press({"budget": "uniform"}, decoding=FAR)(self.model),
        ):
            self.model(
                tokens(rows, count, seed=-1),
                past_key_values=cache,
                position_ids=torch.arange(self.length, self.length + count)[None],
            )

    def shorten(self, count: int) -> None:
        """Crop, where all heads end with the same tokens."""
        if count >= self.length or "gemma3" in type(self.model).__name__.lower():
            return
        reach = min(getattr(x, "run", 0) for x in self.cache.layers)
        if count <= self.loose + reach:
            self.crop(count)
            self.loose = max(self.loose - count, 0)
            return
        whole = self.pairs().sum() == self.pairs().numel() // len(self.padding) * int(
            (self.length - self.padding).sum()
        )
        try:
            copy.deepcopy(self.cache).crop(-count)
        except ValueError:
            return
        assert whole, "cropped into a compressed context"

    def rows(self, rows: list[int], how: str) -> None:
        """Go on with other rows."""
        batch = len(self.padding)
        rows = [row % batch for row in rows]
        self.select(rows, how if len(rows) == batch else "batch_select_indices")

    def times(self, count: int) -> None:
        """Repeat every row."""
        if len(self.padding) * count <= MOST_ROWS:
            self.repeat(count)

    def deepcopy(self) -> None:
        """Go on with a copy."""
        self.cache = copy.deepcopy(self.cache)

    def file(self) -> None:
        """Go on with what was saved and loaded."""
        with tempfile.TemporaryDirectory() as folder:
            save_cache(self.cache, f"{folder}/cache", self.model)
            self.cache = load_cache(f"{folder}/cache", self.model)


FAR = DecodingConfig(10_000, 1)


def draw(seed: int) -> tuple[str, str, tuple[int, ...], list[Step]]:
    """Draw a life."""
    r = random.Random(seed)
    length = r.randint(2, 50)
    kind = r.choice(["plain"] * 4 + ["calibrated"] * 2 + ["static", "once"])
    padded = kind != "static" and r.random() < 0.5
    batch = r.randint(1, 3)
    padding = tuple(r.randint(0, length - 1) * padded for _ in range(batch))
    ratio = r.choice([0.0, 0.3, 0.6, 0.9])

    def options(**more: Any) -> dict[str, Any]:
        return more | {
            "budget": "uniform"
            if kind == "static"
            else r.choice(["uniform", "layer", "head", "model"]),
            "experts": r.choice([EXPERTS, ["selective"], "uneven"]),
            "pairs": "16" if kind == "static" else r.choice(FORMATS),
            "fold": r.choice([False, "auto", True]),
            "record": r.random() < 0.2,
            "top_k": 1,
            "sinks": r.randint(0, 3),
            "recent": r.randint(0, 6),
            "window": r.randint(1, 9),
        }

    cuts = [length]
    if kind != "static" and r.random() < 0.3:
        ends = sorted({r.randint(1, length) for _ in range(r.randint(1, 4))} | {length})
        cuts = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    streaming = len(cuts) == 1 and kind != "static" and r.random() < 0.3
    prefill = options(compression_ratio=ratio, streaming=streaming)
    if streaming and prefill["budget"] == "layer":  # which is refused
        prefill["budget"] = "uniform"
    if r.random() < 0.3:  # whose queries "auto" needs to fold; alone where compression ends here
        others = [] if len(cuts) == 1 and not streaming else ["selective"]
        prefill["experts"] = ["expected", *others]
    steps: list[Step] = [("prefill", cuts, prefill)]
    kinds = ["more", "masked", "file"]
    if kind == "calibrated":  # which has to see all tokens, and these are fed outside of blocks
        kinds.remove("masked")
    if kind != "static":
        kinds += ["more"] * 2 + ["shorten", "shorten", "rows", "times", "deepcopy"]
    if kind in ("plain", "calibrated"):  # which another press may go on with
        kinds += ["grow"] * 4 + ["fail"]
    for _ in range(r.randint(1, 8)):
        step = r.choice(kinds)
        arguments: dict[str, Any] = {
            "more": lambda: (r.randint(1, 9),),
            "grow": lambda: (r.randint(1, 6), r.randint(1, 30), r.randint(1, 4), options()),
            "shorten": lambda: (r.randint(1, 9),),
            "rows": lambda: (
                [r.randint(0, 5) for _ in range(r.randint(1, 4))],
                r.choice(["reorder_cache", "batch_select_indices"]),
            ),
            "times": lambda: (r.randint(1, 2),),
            "deepcopy": tuple,
            "file": tuple,
            "fail": lambda: (r.randint(1, 3), r.randint(0, 2)),
            "masked": lambda: (
                [r.randint(1, r.choice([4, 4, 60])) for _ in range(r.randint(1, 3))],
                r.randint(0, 5),
                r.randint(1, 3),
            ),
        }
        steps.append((step, *arguments[step]()))
    return r.choice(MODELS), kind, padding, [*steps, ("more", 2)]


def live(name: str, kind: str, padding: tuple[int, ...], steps: list[Step]) -> None:
    """Live through the steps; raise at the first that goes wrong."""
    life = Life(name, kind, padding)
    for step, *arguments in steps:
        if life.length < MOST_TOKENS:
            getattr(life, step)(*arguments)
    for module in life.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, "hooks that stay"


def error_of(name: str, kind: str, padding: tuple[int, ...], steps: list[Step]) -> str | None:
    """Say how a life goes wrong; None: it does not."""
    try:
        live(name, kind, padding, steps)
    except Exception:
        model_of.cache_clear()  # whatever it has left on them
        return traceback.format_exc(limit=-3)
    return None


def reduce(name: str, kind: str, padding: tuple[int, ...], steps: list[Step]) -> tuple[Any, ...]:
    """Leave out steps, rows and tokens, as long as the life goes wrong."""
    changed = True
    while changed:
        changed = False
        for i in range(len(steps) - 1, 0, -1):
            fewer = steps[:i] + steps[i + 1 :]
            if error_of(name, kind, padding, fewer):
                steps, changed = fewer, True
        for b in range(len(padding) - 1 if len(padding) > 1 else -1, -1, -1):
            fewer_rows = padding[:b] + padding[b + 1 :]
            if fewer_rows and error_of(name, kind, fewer_rows, steps):
                padding, changed = fewer_rows, True
        for i, step in enumerate(steps):
            if len(step) > 1 and isinstance(step[1], int) and step[1] > 1:
                half = [*steps[:i], (step[0], step[1] // 2, *step[2:]), *steps[i + 1 :]]
                if error_of(name, kind, padding, half):
                    steps, changed = half, True
    return name, kind, padding, steps


def main() -> int:
    """Live lives until time is up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0, help="of the first life")
    given = parser.parse_args()
    begin, failed, number = time.monotonic(), 0, given.seed
    while number < given.seed + given.cases and time.monotonic() - begin < given.seconds:
        life = draw(number)
        if error := error_of(*life):
            failed += 1
            print(f"seed {number} fails:\n{error}\nreduced:\nlive{reduce(*life)!r}", flush=True)
        number += 1
    print(f"presses: {number - given.seed} lives from seed {given.seed} on, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
