"""A model and a story for commands."""

from pathlib import Path

import pytest
from character_tokenizer import character_tokenizer
from cli_cases import STORY
from tiny_models import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of a few weights in a local folder; its tokens are ASCII characters."""
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    return path
