"""A plugin of pytest for kvpress's own test suite: MoERouterPress is the press in its lists.

``fill_hub`` makes what stands for its models on the hub.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moekv import MoERouterPress

OPTIONS = (
    {"compression_ratio": 0.2},
    {"compression_ratio": 0.8},
    {"compression_ratio": 0.5, "num_experts": 6, "router_type": "adaptive"},
)
NAMES = ("MaxJeblick/llama2-0b-unit-test", "maxjeblick/llama2-0b-unit-test")


def fill_hub(folder: Path) -> None:
    """Put a tiny Llama under the names that the suite asks for into a cache of the hub's."""
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=12,  # the suite knows these sizes
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    commit = "0" * 40
    for name in NAMES:
        own = folder / f"models--{name.replace('/', '--')}"
        (own / "refs").mkdir(parents=True)
        (own / "refs" / "main").write_text(commit)
        for part in (model, _tokenizer()):
            part.save_pretrained(own / "snapshots" / commit)


def _tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def pytest_pycollect_makemodule() -> None:
    """Put the press into the lists before a file of tests reads them."""
    from tests import default_presses  # kvpress's

    default_presses.default_presses[:] = [{"cls": MoERouterPress, "kwargs": list(OPTIONS)}]
