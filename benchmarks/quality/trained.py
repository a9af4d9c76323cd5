"""Trains small models from scratch that recall what they have read: no hub, no texts, minutes.

``python -m benchmarks.quality.trained FOLDER --kind mixtral`` leaves a folder that transformers
loads, with a tokenizer, and ``tasks.jsonl``, questions in the form of ``--suite``: ::

    python -m benchmarks.quality run --model FOLDER --suite ruler --data FOLDER/tasks.jsonl ...

The language is made up: words that follow each other by chance, each one of six (prose), and facts
between them, a name and its number of two words. A text ends in questions, "? name", answered with
the number, and in "Repeat the previous context exactly." with a passage of it, from which copying
is learnt: questions about names are answered, passages are not repeated without a mistake. Nothing
but the context has the answer, and nobody has tuned a press for these models' attention.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from moekv.calibration.oracle import REPEAT

from .tasks import Sample

KINDS = ("llama", "mixtral", "olmoe")
TASKS = ("facts", "many_facts")

PROSE, NAMES, NUMBERS = (
    [f"{c}{i}" for i in range(n)] for c, n in (("w", 64), ("n", 48), ("d", 32))
)
ASK, AGAIN, END = "?", tuple(REPEAT.split()), "."
WORDS = ("<unk>", END, ASK, *AGAIN, *PROSE, *NAMES, *NUMBERS)
_NUMBER_OF = {word: number for number, word in enumerate(WORDS)}

GIVEN = 4
"""Words of a passage to repeat that count as asked, not as answered."""


@dataclass(frozen=True)
class Stage:
    """Steps of training on texts of one length: `facts` names, and a passage to repeat."""

    steps: int
    length: int
    batch: int
    facts: int
    passage: int


# Copying is learnt where there is much of it, and then holds in longer texts.
STAGES = (Stage(600, 72, 32, 4, 24), Stage(300, 160, 16, 10, 24), Stage(300, 400, 8, 24, 32))


def _followers() -> list[list[str]]:
    """Say which six words may follow each: the same language for every model."""
    rng = random.Random("language")
    return [rng.sample(PROSE, 6) for _ in PROSE]


_FOLLOWERS = _followers()


def prose(rng: random.Random, count: int) -> list[str]:
    """Draw words, each one of the six that may follow the last."""
    number, words = rng.randrange(len(PROSE)), []
    for _ in range(count):
        words.append(PROSE[number])
        number = _NUMBER_OF[rng.choice(_FOLLOWERS[number])] - _NUMBER_OF[PROSE[0]]
    return words


def make_context(
    rng: random.Random, length: int, num_facts: int
) -> tuple[list[str], list[list[str]]]:
    """Draw a context of `length` words, and the facts in it: name, two words of the number."""
    facts = [
        [name, rng.choice(NUMBERS), rng.choice(NUMBERS)] for name in rng.sample(NAMES, num_facts)
    ]
    words = prose(rng, length - 4 * num_facts)
    places = sorted(rng.choices(range(len(words) + 1), k=num_facts))
    pieces, last = [], 0
    for place, fact in zip(places, facts, strict=True):
        pieces += [words[last:place], [*fact, END]]
        last = place
    return [*chain(*pieces), *words[last:]], facts


def make_sample(task: str, index: int, *, length: int = 384, seed: int = 0) -> Sample:
    """Make one question about a context of `length` words; the same arguments, the same one."""
    rng = random.Random(f"{seed}/{task}/{length}/{index}")
    context, facts = make_context(rng, length, 36 if task == "many_facts" else 8)
    text = " ".join(context)
    name, *number = rng.choice(facts)
    return Sample(text, ASK, name, " ".join(number), chat=False)


def make_text(rng: random.Random, length: int) -> str:
    """Draw a context as a text to calibrate a router with."""
    return " ".join(make_context(rng, length, rng.choice((8, 16, 36)))[0])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words."""
    backend = Tokenizer(models.WordLevel(_NUMBER_OF, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=WORDS[0])


def make_model(kind: str, seed: int) -> PreTrainedModel:
    """Make a model of random weights: dense, or a mixture of eight experts of which two act."""
    options: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 128 if kind == "llama" else 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind != "llama":
        options |= {"num_experts_per_tok": 2, "output_router_logits": True}
        options["num_local_experts" if kind == "mixtral" else "num_experts"] = 8
        options["router_aux_loss_coef"] = 0.02
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **options)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _lesson(rng: random.Random, stage: Stage) -> tuple[list[int], list[bool]]:
    """Draw a text with its questions, as numbers, and which of them are answers."""
    passage, asked = stage.passage, stage.facts
    body = stage.length - 4 * asked - len(AGAIN) - passage
    words, facts = make_context(rng, body, stage.facts)
    at = rng.choice((0, rng.randrange(body - passage)))
    again = words[at : at + passage]
    is_answer = [False] * len(words)
    for fact in rng.choices(facts, k=asked):
        words += [ASK, *fact]
        is_answer += [False, False, True, True]
    words += [*AGAIN, *again]
    is_answer += [False] * (len(AGAIN) + GIVEN) + [True] * (passage - GIVEN)
    return [_NUMBER_OF[word] for word in words], is_answer


def train(kind: str, seed: int, stages: Sequence[Stage] = STAGES, *, say: bool = False) -> Any:
    """Train a model: one core, minutes. The same arguments, on one machine, give the same model."""
    model: Any = make_model(kind, seed).train()
    rng = random.Random(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    total, step = sum(stage.steps for stage in stages), 0
    for stage in stages:
        for _ in range(stage.steps):
            step += 1
            rate = min(step / 50, 1) * min((total - step + 1) / (0.4 * total), 1)
            for group in optimiser.param_groups:
                group["lr"] = 3e-3 * rate
            rows = [_lesson(rng, stage) for _ in range(stage.batch)]
            ids = torch.tensor([row[0] for row in rows])
            answers = torch.tensor([row[1] for row in rows])[:, 1:]
            out = model(ids, use_cache=False)
            lost = functional.cross_entropy(
                out.logits[:, :-1].mT.float(), ids[:, 1:], reduction="none"
            )
            loss = lost[answers].mean() + 0.3 * lost[~answers].mean()
            if kind != "llama":
                loss = loss + model.config.router_aux_loss_coef * out.aux_loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if say and step % 50 == 0:
                right = out.logits[:, :-1].argmax(-1) == ids[:, 1:]
                share = right[answers].float().mean().item()
                print(f"step {step} of {total}: {share:.0%} of the answers' words", flush=True)
    if kind != "llama":
        model.config.output_router_logits = False  # of no use where it generates
    return model.eval()


@torch.no_grad()
def right(model: Any, tokenizer: PreTrainedTokenizerBase, task: str, count: int) -> float:
    """Share of the words of `count` answers that a model finds, from the full cache."""
    good = 0.0
    for index in range(count):
        sample = make_sample(task, index, seed=-1)
        prompt = " ".join((sample.context, sample.question, sample.answer_prefix))
        before, answer = (tokenizer(text).input_ids for text in (prompt, sample.answer))
        logits = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1]
        good += (logits.argmax(-1) == torch.tensor(answer)).float().mean().item()
    return good / count


def save(model: Any, folder: Path, *, seed: int, samples: int = 16) -> PreTrainedTokenizerFast:
    """Save a model with its tokenizer and the questions, as JSON lines for ``--suite``."""
    tokenizer = make_tokenizer()
    model.config.name_or_path = str(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with (folder / "tasks.jsonl").open("w") as file:
        for task in TASKS:
            for index in range(samples):
                made = make_sample(task, index, seed=seed)
                row = {
                    "task": task,
                    "context": made.context,
                    "question": made.question,
                    "answer_prefix": made.answer_prefix,
                    "answer": made.answer,
                }
                file.write(json.dumps(row) + "\n")
    return tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, and say what share of the questions is answered."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="llama")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    model = train(args.kind, args.seed, say=True)
    tokenizer = save(model, args.folder, seed=args.seed)
    for task in TASKS:
        print(f"{task}: {right(model, tokenizer, task, 32):.0%} of the words of 32 answers")


if __name__ == "__main__":
    main()
