"""Every architecture that the newest transformers knows, as docs/models.md says."""

import pytest
import transformers
from every_model import IMAGE_MODELS, TEXT_MODELS
from model_sweep import KINDS, PAGE, outcome, read_page, render
from packaging.version import Version

SAID, VERSION = read_page()
IS_CURRENT = transformers.__version__ == VERSION
IS_OLDER = Version(transformers.__version__) < Version(VERSION)

pytestmark = pytest.mark.skipif(IS_OLDER, reason=f"transformers is older than {VERSION}")


SLOW = {"blt", "kimi_linear", "kosmos-2", "kosmos-2.5"}  # which take many seconds each
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in ([] if IS_OLDER else [*TEXT_MODELS, *IMAGE_MODELS])
]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_served_or_refused(name: str) -> None:
    found = outcome(name)  # which raises what is neither
    assert found.startswith(KINDS)
    assert found == SAID.get(name, found) or not IS_CURRENT


@pytest.mark.skipif(not IS_CURRENT, reason=f"transformers is not {VERSION}")
def test_the_page_is_current() -> None:
    assert PAGE.read_text() == render(SAID, VERSION)
