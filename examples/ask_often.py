"""A document is compressed once, for several questions, then saved and loaded."""

import sys
import tempfile
from pathlib import Path

import moekv

DOCUMENT = (
    "The harbour board met on 3 May. The engineer, Mr. Tolland, reported that the new crane cost "
    "4,300 pounds. Mr. Harding said that he had signed the contract himself. "
    + "The tide tables were read and approved. Fees for small boats stay as they are. "
    * 12
)

model, tokenizer = moekv.load_model(*sys.argv[1:2])
press = moekv.MoERouterPress(compression_ratio=0.5)
context = moekv.compress(model, tokenizer, DOCUMENT, press=press)
print(context)
for question in ("What did the new crane cost?", "When did the harbour board meet?"):
    print(question, "->", context.ask(question, max_new_tokens=24))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "harbour.safetensors"
    context.save(path)
    print(f"saved: {path.stat().st_size:,} bytes")
    again = moekv.load_context(path, model, tokenizer)
    print("loaded:", again.ask("What did the new crane cost?", max_new_tokens=24))
