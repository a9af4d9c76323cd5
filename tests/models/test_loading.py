"""Where models come from. What the default model then says: tests/cli/test_demo.py."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from moekv.models import loading as models
from moekv.models.index import ModelUnavailableError


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"expected a folder with a model, got {tmp_path}, without"):
        models.load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["no-such/model", "no such model", "a/b/c", ""])
def test_a_name_that_nothing_has(name: str) -> None:
    with pytest.raises(ModelUnavailableError, match="is no local folder, and neither"):
        models.load_model(name)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        models.load_model(str(tmp_path), dtype=torch.float32)
