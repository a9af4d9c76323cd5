"""Every architecture that the newest transformers knows, as docs/models.md says."""

import pytest
import transformers
from every_model import IMAGE_MODELS, TEXT_MODELS
from model_sweep import KINDS, PAGE, outcome, read_page, render
from packaging.version import Version

SAID, VERSION = read_page()
IS_CURRENT = transformers.__version__ == VERSION
IS_OLDER = Version(transformers.__version__) < Version(VERSION)

ASKED_FOR = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "idefics3", "mllama"),
    *("llama4_text", "deepseek_v2", "deepseek_v3", "gpt_oss", "gemma3n_text", "phi3", "phimoe"),
    *("phi4_multimodal", "doge", "nemotron", "qwen3_next", "qwen3_5", "qwen3_5_text", "lfm2"),
    *("jamba", "bamba", "granitemoehybrid"),
)
"""Families that are to work: in each transformers that has them."""

NAMES = [] if IS_OLDER else [*TEXT_MODELS, *IMAGE_MODELS]


@pytest.mark.skipif(IS_OLDER, reason=f"transformers is older than {VERSION}")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_served_or_refused(name: str) -> None:
    found = outcome(name)  # which raises what is neither
    assert found.startswith(KINDS)
    assert found == SAID.get(name, found) or not IS_CURRENT


@pytest.mark.skipif(not IS_CURRENT, reason=f"transformers is not {VERSION}")
def test_the_page_is_current() -> None:
    assert PAGE.read_text() == render(SAID, VERSION)


@pytest.mark.parametrize("name", ASKED_FOR)
def test_families_that_people_asked_for(name: str) -> None:
    """By the page, where all are tried. Older versions' hybrids have caches of their own."""
    is_known = name in (*TEXT_MODELS, *IMAGE_MODELS)
    found = SAID[name] if IS_CURRENT else outcome(name) if is_known else "not tried: it is newer"
    if found.startswith("not tried") and IS_OLDER:
        pytest.skip(found)
    assert found.startswith("works")
