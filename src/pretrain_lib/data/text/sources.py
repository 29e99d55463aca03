"""Sources of text: Python's standard library, local files, the rows of a dataset (`dataset_rows`).

A source is divided into units of work before any work starts, so the output does not depend on the
number of processes.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash

from pretrain_lib.data.remote import RemoteFile
from pretrain_lib.data.text.dataset_rows import DatasetSource, HubSource
from pretrain_lib.data.text.documents import Document, Fields, FileSlice, Rejected
from pretrain_lib.data.text.formats import cut_file, is_one_document, read_documents
from pretrain_lib.data.text.unchanged import State, check_unchanged, check_versions, state_of

UNIT_BYTES = (4 * 2**20, 64 * 2**20)  # smallest and largest unit of local text


@dataclass(frozen=True)
class FileSource:
    """Files, local or remote: a document per `.txt` file, per JSON line, and per `.parquet` row."""

    name: str
    files: tuple[Path | RemoteFile, ...]
    text_field: str
    separator: str | None = None
    """A line that separates the documents of a `.txt` file; None: the file is one document."""
    skipped: tuple[tuple[str, int], ...] = ()
    """How many files of a folder are not read, by kind."""
    loss_spans: str | None = None
    """A field of JSON lines with the spans of the text that count as targets."""

    @cached_property
    def states(self) -> dict[Path | RemoteFile, State]:
        """The states of the files when this was first asked for: when the source was opened."""
        return {path: state_of(path) for path in self.files}

    def identity(self, *, content: bool = True) -> dict:
        """Return what determines the documents of this source: file names, sizes and hashes.

        A remote file is identified by its version (etag, checksum or time), not by its content.
        """
        digest = xxhash.xxh3_128()
        for path in self.files:
            digest.update(os.fsencode(path.name) + f"|{path.stat().st_size}|".encode())
            if isinstance(path, RemoteFile):
                digest.update(path.version.encode())
                continue
            with path.open("rb") as file:
                while content and (chunk := file.read(2**20)):
                    digest.update(chunk)
        name = Path(self.name).name  # the same text under another path is the same source
        return {"name": name, "files": len(self.files), "xxh3_128": digest.hexdigest()}

    def estimated_bytes(self) -> int:
        """Return the size of the text in bytes; a guess for compressed files."""
        pieces = (p for path in self.files for p in self._cut(path, 2**62, cut_text=False))
        return sum(piece.text_bytes for piece in pieces)

    def _cut(self, path: Path, size: int, *, cut_text: bool) -> list[FileSlice]:
        return cut_file(
            path, size, cut_text=cut_text, text_field=self.text_field, separator=self.separator
        )

    def units(self, *, cut_text: bool = True) -> list[tuple[FileSlice, ...]]:
        """Divide the files into units of similar size, in an order that depends only on the files.

        `cut_text` says whether a large `.txt` file, which is one document, may be split too.
        """
        smallest, largest = UNIT_BYTES
        size = min(max(self.estimated_bytes() // 256, smallest), largest)
        units: list[list[FileSlice]] = []
        filled = size
        for path in self.files:
            pieces = self._cut(path, size, cut_text=cut_text)
            alone = is_one_document(path) and self.separator is None and len(pieces) > 1
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
        """Yield the documents of a unit, including empty ones; an unreadable one is `Rejected`.

        Raises ValueError for a damaged file, and for a local one that was written to meanwhile.
        """
        fields = Fields(self.text_field, self.loss_spans)
        for piece in unit:
            self._check_unchanged(piece.path)
            yield from read_documents(piece, fields, separator=self.separator)
            self._check_unchanged(piece.path)

    def _check_unchanged(self, path: Path | RemoteFile) -> None:
        if not isinstance(path, RemoteFile):
            check_unchanged(path, self.states[path])

    def check_versions(self) -> None:
        """Raise ValueError if a remote file is no longer what it was when it was listed."""
        if any(isinstance(file, RemoteFile) for file in self.files):
            check_versions(self.name, self.files)


Source = FileSource | DatasetSource | HubSource
