"""Models for ``golden.py``, and what it records of them."""

from __future__ import annotations

import copy
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moekv import CalibratedRouter, DecodingConfig, MoERouterPress

NEW = 7
"""Tokens that are generated, unless a case says otherwise."""

VOCABULARY = 128
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# --- Models ---------------------------------------------------------------------------------------

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
    "initializer_range": 0.2,  # the default, 0.02, makes attention all but uniform
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SHAPE | {"num_hidden_layers": 10}))


def _gemma3() -> PreTrainedModel:
    sliding, full = "sliding_attention", "full_attention"
    config = Gemma3TextConfig(
        **_SHAPE | {"num_hidden_layers": 5},
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=16,
        layer_types=[sliding, full, sliding, full, full],
    )
    return Gemma3ForCausalLM(config)


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=24))


def _phi3() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return Phi3ForCausalLM(Phi3Config(**_SHAPE, rope_parameters=rope))


def _word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY)} | {"<s>": 1}
    del words["w1"]
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", bos_token="<s>")


def _story(count: int, seed: int) -> str:
    """Sentences of a text that says something here and there, and repeats itself."""
    chance = random.Random(seed)
    who = ["The keeper", "A sailor", "Old Marta", "The captain", "Nobody", "Her brother"]
    did = ["counted", "lost", "remembered", "painted", "repaired", "sold", "looked for"]
    what = ["the lamp", "seven ropes", "a green boat", "the log book", "every window", "the map"]
    where = ["in the harbour", "on the stairs", "before the storm", "at noon", "in 1874"]
    parts = who, did, what, where
    lines = [" ".join(chance.choice(part) for part in parts) for _ in range(count)]
    lines[count // 2] = f"The code of the door is {chance.randrange(1000, 9999)}"
    return ". ".join(lines) + "."


@dataclass
class Subject:
    """A model on which cases run, in every dtype and with every attention that they ask for."""

    name: str
    prototype: PreTrainedModel
    tokenizer: Any
    is_tiny: bool
    variants: dict[Any, PreTrainedModel] = field(default_factory=dict)
    references: dict[Any, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def tiny(cls, name: str) -> Subject:
        """Make one of random weights that depend on its name alone."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = TINY[name]().eval()
        return cls(name, _ready(model), _word_tokenizer(), is_tiny=True)

    @classmethod
    def smollm2(cls) -> Subject:
        """Load the real one."""
        from moekv.models import load_model

        transformers.utils.logging.disable_progress_bar()
        model, tokenizer = load_model(dtype=BF16)
        return cls("smollm2", _ready(model), tokenizer, is_tiny=False)

    def model(self, attention: str, dtype: torch.dtype) -> PreTrainedModel:
        """Give a model that is nobody else's, but for its weights."""
        key = attention, dtype
        if key not in self.variants:
            model = copy.deepcopy(self.prototype).to(dtype)
            model.set_attn_implementation(attention)
            self.variants[key] = model
        shared = {id(weights): weights for weights in self.variants[key].parameters()}
        return copy.deepcopy(self.variants[key], shared)

    def prompt(self, seed: int) -> Tensor:
        """Token ids [1, T]."""
        if self.is_tiny:
            chance = torch.Generator().manual_seed(seed)
            return torch.randint(3, VOCABULARY, (1, 150), generator=chance)
        return self.tokenizer(_story(34, seed), return_tensors="pt").input_ids[:, :384]

    def context(self) -> tuple[str, list[str]]:
        """Give a text and questions about it."""
        if self.is_tiny:
            words = " ".join(f"w{i}" for i in self.prompt(0)[0].tolist())
            return words, ["w5 w6 w7", "w9 w10 w11 w12"]
        return _story(34, 0), ["What is the code of the door?", "Who painted a green boat?"]


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    model.generation_config.eos_token_id = None  # as many tokens as are asked for
    return model


TINY = {"llama": _llama, "gemma3": _gemma3, "qwen3": _qwen3, "phi3": _phi3}


def fingerprint(model: PreTrainedModel) -> str:
    """Name a model as calibrated routers do, see ``moekv``'s module of this name."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)}".encode())
        values = parameter.detach().flatten()
        values = values[:: max(len(values) // 64, 1)][:64].to(BF16).contiguous()
        digest.update(values.view(torch.uint8).numpy().data)
    return f"{model.config.model_type}-{digest.hexdigest()[:16]}"


def random_router(model: PreTrainedModel, **options: Any) -> CalibratedRouter:
    """Build a calibrated router whose every number matters."""
    router = CalibratedRouter(
        model=fingerprint(model),
        layers=list(range(model.config.num_hidden_layers)),
        hidden_size=model.config.hidden_size,
        num_kv_heads=model.config.num_key_value_heads,
        recipe={"model_name": "a model of random weights"},
        **{"experts": ["expected", "semantic"], "top_k": 2} | options,
    )
    chance = torch.Generator().manual_seed(1)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=chance)
    return router


# --- What is recorded -----------------------------------------------------------------------------


def _plain(x: Any) -> Tensor:
    return x.detach().as_subclass(torch.Tensor)


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def digest_of(x: Tensor) -> str:
    """Name a tensor by dtype, shape and contents."""
    x = _plain(x)
    digest = hashlib.sha256(_bytes(x.reshape(-1))).hexdigest()[:32]
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} {digest}"


def _ranges(positions: Sequence[int | None]) -> str:
    """Write positions shortly; those that are not known as ``?``."""
    runs: list[list[Any]] = []
    for position in positions:
        if runs and (
            runs[-1][1] is position is None
            or (None not in (position, runs[-1][1]) and position == runs[-1][1] + 1)
        ):
            runs[-1][1] = position
            runs[-1][2] += 1
        else:
            runs.append([position, position, 1])
    return ",".join(
        f"?x{count}" if first is None else f"{first}" if first == last else f"{first}-{last}"
        for first, last, count in runs
    )


def _find(rows: Tensor, among: Tensor) -> str:
    """Find rows [n, D] among those of a head [T, D]."""
    if rows.shape[-1:] != among.shape[-1:] or rows.dtype != among.dtype:
        return "?"
    places = {_bytes(row): t for t, row in reversed(list(enumerate(among)))}
    return _ranges([places.get(_bytes(row)) for row in rows])


def _tensors_of(layer: Any) -> tuple[str, dict[str, Tensor]]:
    """Give the kind of a cache layer, and what it holds."""
    if getattr(layer, "stored_keys", None) is not None:
        tail = {}
        for name in ("tail_keys", "tail_values"):
            found = getattr(layer, name, None)
            if found is None:
                found = getattr(layer, f"_{name}")[:, :, : layer.tail_length]
            tail[name] = found
        names = ("stored_keys", "stored_values", "begin", "end")
        return "ragged", {name: _plain(getattr(layer, name)) for name in names} | tail
    kind = "sliding" if getattr(layer, "is_sliding", False) else "dense"
    if getattr(layer, "max_cache_len", None) is not None and kind == "dense":
        kind = "static"
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or not getattr(layer, "is_initialized", True):
        return "empty", {}
    if isinstance(keys, Tensor):
        return kind, {"keys": _plain(keys), "values": _plain(values)}
    keys, values, lengths = layer.to_dense()
    return "to_dense", {"keys": keys, "values": values, "lengths": lengths}


def describe_layer(layer: Any, among: Tensor | None) -> dict[str, Any]:
    """Say what a cache layer holds.

    Parameters
    ----------
    layer : CacheLayerMixin
    among : Tensor [B, H, T, D], optional
        The keys of the same prompt in a cache that nobody compressed.
    """
    kind, tensors = _tensors_of(layer)
    if kind == "empty":
        return {"kind": kind}
    if kind == "ragged":
        stored, tail = tensors["stored_keys"], tensors["tail_keys"]
        begin, end = tensors["begin"].tolist(), tensors["end"].tolist()
        heads = [
            [torch.cat([stored[a:b], rest]) for a, b, rest in zip(*of_row, strict=True)]
            for of_row in zip(begin, end, tail, strict=True)
        ]
    else:
        heads = [list(row) for row in tensors["keys"]]
    described: dict[str, Any] = {
        "kind": kind,
        "tensors": {name: digest_of(x) for name, x in tensors.items()},
        "lengths": [[len(head) for head in row] for row in heads],
        "reported_length": int(layer.get_seq_length()),
        "storage_bytes": _storage_bytes(tensors),
    }
    if among is not None:
        repeats = max(len(heads) // len(among), 1)
        described["kept"] = [
            [_find(head, other) for head, other in zip(row, among[b // repeats], strict=True)]
            for b, row in enumerate(heads)
        ]
    return described


def _storage_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of the storages of keys and values, room to grow included."""
    pairs = [x for name, x in tensors.items() if name.endswith(("keys", "values"))]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in pairs}
    return sum(storages.values())


def _for_json(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(key): _for_json(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_for_json(value) for value in x]
    if isinstance(x, Tensor):
        return x.tolist()
    return x


class Bench:
    """One case: its model, and what has been recorded so far."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.runs: list[dict[str, Any]] = []
        self.press: Any = None  # whose statistics are recorded
        self.set_up()

    def set_up(self, attention: str = "sdpa", dtype: torch.dtype = FP32) -> None:
        """Choose a variant of the model."""
        self.variant = attention, dtype
        self.model = self.subject.model(attention, dtype)

    def prompts(self, batch: int = 1, seed: int = 0) -> Tensor:
        """Give token ids [B, T]."""
        rows = [self.subject.prompt(seed + i) for i in range(batch)]
        return torch.cat([row[:, : min(r.shape[1] for r in rows)] for row in rows])

    def make(self, ratio: float = 0.6, **options: Any) -> MoERouterPress:
        """Make a press, and keep it for its statistics.

        Classes among the experts are built, and so are numbers for `decoding` and the router that
        is called ``"random"``.
        """
        if isinstance(options.get("experts"), list):
            options["experts"] = [e() if isinstance(e, type) else e for e in options["experts"]]
        if isinstance(options.get("decoding"), tuple):
            options["decoding"] = DecodingConfig(*options["decoding"])
        if options.get("router") == "random":
            options["router"] = random_router(self.model)
        self.press = MoERouterPress(ratio, **options)
        return self.press

    def generate(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        *,
        mask: Tensor | None = None,
        new: int = NEW,
        among: bool = True,
        **options: Any,
    ) -> Any:
        """Generate greedily, and record it."""
        out = self.silently(self.model, input_ids, cache, mask, new, **options)
        logits = [_plain(x) for x in out.logits]
        best = logits[-1].float().topk(2, dim=-1)
        self.runs.append(
            {
                "tokens": out.sequences[:, input_ids.shape[1] :].tolist(),
                "logits": [digest_of(x) for x in logits],
                "last_logits": {"best": best.indices.tolist(), "value": best.values.tolist()},
                "layers": self.describe(
                    out.past_key_values, self._reference(input_ids, mask) if among else None
                ),
            }
        )
        return out

    @staticmethod
    def silently(
        model: PreTrainedModel,
        input_ids: Tensor,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        new: int = 1,
        **options: Any,
    ) -> Any:
        """Generate greedily, and record nothing."""
        if cache is not None:
            options["past_key_values"] = cache
        return model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids) if mask is None else mask,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=[0],  # its embedding is 0, for which kvpress finds no fake key
            disable_compile=True,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )

    def _reference(self, input_ids: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Keys [B, H, T, D] of all layers, of a prefill without a press."""
        key = (*self.variant, _bytes(input_ids), None if mask is None else _bytes(mask))
        known = self.subject.references
        if key not in known:
            cache = DynamicCache()  # without a config no layer forgets
            self.silently(self.subject.model(*self.variant), input_ids, cache, mask)
            known[key] = [layer.keys[:, :, : input_ids.shape[1]] for layer in cache.layers]
        return known[key]

    @staticmethod
    def describe(cache: Cache, among: list[Tensor] | None) -> list[dict[str, Any]]:
        """Describe all layers of a cache."""
        given = [None] * len(cache.layers) if among is None else among
        return [describe_layer(*pair) for pair in zip(cache.layers, given, strict=True)]

    def note(self, **what: Any) -> None:
        """Record something else."""
        self.runs.append(_for_json(what))

    def stats(self) -> Any:
        """Give the press's statistics, in full."""
        return None if self.press is None else _for_json(self.press.get_stats())


Case = Callable[[Bench], None]


def shown_error(error: BaseException) -> str:
    """Write an error without addresses."""
    return re.sub(r"0x[0-9a-f]+", "0x...", f"{type(error).__name__}: {error}")


def record_case(subject: Subject, case: Case) -> dict[str, Any]:
    """Run a case."""
    torch.manual_seed(0)
    bench = Bench(subject)
    recorded: dict[str, Any] = {}
    try:
        with torch.no_grad():
            case(bench)
    except Exception as error:
        recorded["error"] = shown_error(error)
    try:
        recorded["stats"] = bench.stats()
    except Exception as error:
        recorded["stats"] = shown_error(error)
    return recorded | {"runs": bench.runs}
