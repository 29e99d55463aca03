"""Sources of text: the embedded corpus, local files, or the rows of a dataset (`data.text.rows`).

A source is divided into units of work before any work starts, so the output does not depend on the
number of processes.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pretrain_lib.data.text.formats import (
    SUFFIXES,
    Document,
    FileSlice,
    Rejected,
    cut_file,
    is_one_document,
    is_readable,
    read_documents,
)
from pretrain_lib.data.text.rows import EMBEDDED_CORPUS, HUB_NAME, DatasetSource, HubSource

UNIT_BYTES = (4 * 2**20, 64 * 2**20)  # smallest and largest unit of local text


@dataclass(frozen=True)
class FileSource:
    """Local files: a document per `.txt` file, per JSON line, and per `.parquet` row."""

    name: str
    files: tuple[Path, ...]
    text_field: str

    def identity(self, *, content: bool = True) -> dict:
        """Return what determines the documents of this source: file names, sizes and hashes."""
        digest = xxhash.xxh3_128()
        for path in self.files:
            digest.update(f"{path.name}|{path.stat().st_size}|".encode())
            with path.open("rb") as file:
                while content and (chunk := file.read(2**20)):
                    digest.update(chunk)
        name = Path(self.name).name  # the same text under another path is the same source
        return {"name": name, "files": len(self.files), "xxh3_128": digest.hexdigest()}

    def estimated_bytes(self) -> int:
        """Return the size of the text in bytes; a guess for compressed files."""
        whole = {"text_field": self.text_field, "cut_text": False}
        pieces = (piece for path in self.files for piece in cut_file(path, 2**62, **whole))
        return sum(piece.text_bytes for piece in pieces)

    def units(self, *, cut_text: bool = True) -> list[tuple[FileSlice, ...]]:
        """Divide the files into units of similar size, in an order that depends only on the files.

        `cut_text` says whether a large `.txt` file, which is one document, may be split too.
        """
        smallest, largest = UNIT_BYTES
        size = min(max(self.estimated_bytes() // 256, smallest), largest)
        units: list[list[FileSlice]] = []
        filled = size
        for path in self.files:
            pieces = cut_file(path, size, text_field=self.text_field, cut_text=cut_text)
            alone = is_one_document(path) and len(pieces) > 1
            for piece in pieces:
                if filled >= size or alone:
                    units.append([])
                    filled = 0
                units[-1].append(piece)
                filled = size if alone else filled + piece.text_bytes
        return [tuple(unit) for unit in units]

    def unit_bytes(self, unit: tuple[FileSlice, ...]) -> int:
        """Return the approximate size of a unit's text in bytes."""
        return sum(piece.text_bytes for piece in unit)

    def documents(self, unit: tuple[FileSlice, ...]) -> Iterator[Document | Rejected]:
        """Yield the documents of a unit, including empty ones; an unreadable one is `Rejected`."""
        for piece in unit:
            yield from read_documents(piece, self.text_field)


Source = FileSource | DatasetSource | HubSource


def open_source(name: str, *, text_field: str = "text") -> Source:
    """Open the source `name`: the embedded corpus, a file, a folder, or a Hub dataset.

    Raises ValueError for a missing path, an unsupported file type, or a source without text.
    """
    path = Path(name).expanduser()
    known = ", ".join(SUFFIXES)
    if name == EMBEDDED_CORPUS:
        files = _standard_library_files()
    elif path.is_dir():
        files = tuple(sorted(p for p in path.rglob("*") if is_readable(p) and p.is_file()))
        if not files:
            raise ValueError(f"data.source={name}: the folder holds none of {known}")
    elif path.is_file():
        if not is_readable(path):
            raise ValueError(
                f"data.source={name}: the file must end in one of {known} (a .txt file is one "
                f"document; the others have one per line or row, in the field {text_field!r}); "
                f"pass token arrays (.npy, .bin, .ds) as --data.path"
            )
        files = (path,)
    elif path.exists():
        raise ValueError(
            f"data.source={name} is a pipe or device, which cannot be read again after a restart; "
            f"write its content to a file first"
        )
    elif HUB_NAME.fullmatch(name) and not name.startswith("."):
        return HubSource(name, text_field)
    else:
        raise ValueError(
            f"data.source={name}: there is no such file or folder, and it is neither "
            f"{EMBEDDED_CORPUS} nor a Hub dataset OWNER/NAME[:CONFIG][@REVISION]"
        )
    if not sum(file.stat().st_size for file in files):
        raise ValueError(f"data.source={name} is empty: it needs at least one document with text")
    return FileSource(name, files, text_field)


def _standard_library_files() -> tuple[Path, ...]:
    """Return the source files of this interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not left_out & set(path.relative_to(root).parts[:-1]) and path.stat().st_size
    )
    return tuple(file for file in files if _is_utf8(file))


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
