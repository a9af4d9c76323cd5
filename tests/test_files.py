"""Files that are written whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from moekv.files import whole_file


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def current_umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        assert Path(temporary).parent == path.resolve().parent
        Path(temporary).write_text(text)


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_have_the_mode_of_any_other(tmp_path: Path, umask: int, expected: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "x", "a")
    finally:
        os.umask(before)
    assert mode(tmp_path / "x") == expected
    os.chmod(tmp_path / "x", 0o640)
    write(tmp_path / "x", "b")
    assert mode(tmp_path / "x") == 0o640 and (tmp_path / "x").read_text() == "b"


def test_a_writer_may_replace_the_file_by_one_of_its_own(tmp_path: Path) -> None:
    """As safetensors does, whose files only their owner may read."""
    with whole_file(tmp_path / "x") as temporary:
        own = tmp_path / "own"
        own.touch(0o600)
        own.rename(temporary)
    assert mode(tmp_path / "x") == 0o666 & ~current_umask()


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "x"
    link.symlink_to(target)
    for text in ("of a link to nothing", "of a link to a file"):
        write(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert os.listdir(tmp_path / "there") == ["x"]


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match=r"levels of symbolic links.*loop"):
        write(tmp_path / "loop", "a")
    with (
        pytest.raises(ValueError, match="expected the path of a file, got an empty one"),
        whole_file(""),
    ):
        pass
    assert os.listdir(tmp_path) == ["loop"] and (tmp_path / "loop").is_symlink()


def test_what_was_there_stays_after_an_exception(tmp_path: Path) -> None:
    write(tmp_path / "x", "old")
    with pytest.raises(KeyError), whole_file(tmp_path / "x") as temporary:
        Path(temporary).write_text("new")
        raise KeyError
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]
