"""One page that shows what was retained of a prefill: a template, and its data."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moekv.files import whole_file
from moekv.report.pieces import split_into_pieces
from moekv.report.recording import LayerRecord, Recording
from moekv.units import kind

_PLACE = "/*data*/null"
"""Placeholder of the data in the template."""


def write_page(
    path: str | os.PathLike[str],
    recording: Recording,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor | Sequence[int],
    *,
    row: int = 0,
) -> None:
    """Write the page, see ``MoERouterPress.report``.

    Parameters
    ----------
    path : path
        The file to write or replace.
    recording : Recording
    tokenizer : PreTrainedTokenizerBase
    input_ids : Tensor [B, T] or [T], or sequence of T ints
    row : int

    Raises
    ------
    TypeError, ValueError
        Tokenizer or tokens are not what they should be, there are more or fewer tokens than were
        prefilled, or there is no such row.
    OSError
        The file cannot be written.
    """
    if isinstance(tokenizer, type) or not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(f"expected a tokenizer, got {kind(tokenizer)}")
    tokens = _tokens(input_ids, recording, row)
    data = _data(recording, tokenizer, tokens, row)
    # No text may end the script that contains it.
    encoded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = files("moekv.report").joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split(_PLACE)
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(before + encoded + after)


def _tokens(input_ids: Tensor | Sequence[int], recording: Recording, row: int) -> list[int]:
    """Return the real tokens of a row."""
    try:
        ids = torch.as_tensor(input_ids, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"expected input_ids as a tensor, got {input_ids!r:.99}") from None
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"expected input_ids as integers, got {ids.dtype}")
    batch, length = len(recording.starts), recording.num_tokens
    if not isinstance(row, int) or not 0 <= row < batch:
        raise ValueError(f"expected a row from 0 to {batch - 1}, got {row!r}")
    if ids.dim() == 1 and batch == 1:
        ids = ids[None]
    if ids.shape != (batch, length):
        raise ValueError(
            f"expected input_ids [{batch}, {length}], the prompt that was recorded last, got "
            f"{list(ids.shape)}"
        )
    found: list[int] = ids[row, recording.starts[row] :].tolist()
    return found


def _data(
    recording: Recording, tokenizer: PreTrainedTokenizerBase, tokens: list[int], row: int
) -> dict[str, Any]:
    """Collect what the page draws. Waits for the device."""
    start = recording.starts[row]
    pieces = split_into_pieces(tokenizer, tokens)
    begins = torch.tensor([begin for begin, _ in pieces], device="cpu")
    of_token = torch.zeros(len(tokens), dtype=torch.int64, device="cpu")
    of_token[begins[1:]] = 1
    of_token = of_token.cumsum(0)  # the number of each token's piece
    spoken = [_spoken(layer, row, start, len(recording.experts)) for layer in recording.layers]
    shape = len(spoken), len(recording.experts), len(pieces)
    by_piece = torch.zeros(shape, dtype=torch.int64, device="cpu")
    by_piece.index_add_(2, of_token, torch.stack(spoken))
    return {
        "press": recording.press,
        "budget": recording.budget,
        "bytes": [recording.bytes_before, recording.bytes_after],
        "rows": len(recording.starts),
        "row": row,
        "tokens": len(tokens),
        "sinks": recording.sinks,
        "recent": recording.recent,
        "experts": list(recording.experts),
        "layers": [
            {
                "index": layer.index,
                "kept": layer.kept[row].sum(-1).tolist(),
                "weights": layer.weights[row].tolist(),
            }
            for layer in recording.layers
        ],
        "pieces": [text for _, text in pieces],
        "begins": begins.tolist(),
        "spoken": _encoded(by_piece),
    }


def _spoken(layer: LayerRecord, row: int, start: int, num_experts: int) -> Tensor:
    """Count the heads that kept a token, by the expert that picked it: [E, T]."""
    kept, speakers = layer.kept[row, :, start:].cpu(), layer.speakers[row, :, start:].cpu()
    return torch.stack([(kept & (speakers == e)).sum(0) for e in range(num_experts)])


def _encoded(counts: Tensor) -> str:
    """Write counts as 16-bit numbers, low byte first, in base64."""
    numbers = counts.clamp(max=0xFFFF).flatten()
    pairs = torch.stack([numbers & 0xFF, numbers >> 8], -1).to(torch.uint8)
    return base64.b64encode(pairs.numpy().tobytes()).decode("ascii")
