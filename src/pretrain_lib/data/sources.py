"""Where text comes from: the embedded corpus, local files, and datasets of the Hugging Face hub.

A source is cut into units of work before any work starts, so what is written later does not depend
on how many processes write it. Floor 0.
"""

import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

EMBEDDED_CORPUS = "python-stdlib"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
LOCAL_SUFFIXES = (".txt", ".jsonl")
UNIT_BYTES = (4 * 2**20, 64 * 2**20)  # smallest and largest unit of local text
UNIT_ROWS = 50_000  # of a hub dataset


@dataclass(frozen=True)
class FileSlice:
    """Bytes `[start, stop)` of a file; a JSON line belongs to the slice that it begins in."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class FileSource:
    """Local files: a `.txt` is one document, every line of a `.jsonl` is one."""

    name: str
    files: tuple[Path, ...]
    text_field: str

    def identity(self) -> dict:
        """Return what this source's documents depend on: names, sizes and hashes of its files."""
        digest = xxhash.xxh3_128()
        for path in self.files:
            digest.update(f"{path.name}|{path.stat().st_size}|".encode())
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
        name = Path(self.name).name  # the same text under another path is the same source
        return {"name": name, "files": len(self.files), "xxh3_128": digest.hexdigest()}

    def estimated_bytes(self) -> int:
        """Return the size of the text in bytes."""
        return sum(path.stat().st_size for path in self.files)

    def units(self) -> list[tuple[FileSlice, ...]]:
        """Cut the files into units of near-equal size, in an order that depends on them alone."""
        smallest, largest = UNIT_BYTES
        size = min(max(self.estimated_bytes() // 256, smallest), largest)
        units: list[list[FileSlice]] = [[]]
        filled = 0
        for piece in (piece for path in self.files for piece in _slices(path, size)):
            if filled >= size:
                units.append([])
                filled = 0
            units[-1].append(piece)
            filled += piece.stop - piece.start
        return [tuple(unit) for unit in units]

    def documents(self, unit: tuple[FileSlice, ...]) -> Iterator[str]:
        """Yield the text of each document of a unit, empty ones included."""
        for piece in unit:
            if piece.path.suffix == ".jsonl":
                yield from _json_lines(piece, self.text_field)
            else:
                yield _decode(piece.path.read_bytes(), str(piece.path))


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub (`OWNER/NAME[:CONFIG]`), its `train` split, loaded by `datasets`."""

    name: str
    text_field: str

    def identity(self) -> dict:
        """Return what this source's documents depend on."""
        return {"name": self.name, "split": "train"}

    def estimated_bytes(self) -> int | None:
        """Return the size of the text in bytes as the hub states it; None if it does not."""
        from datasets import load_dataset_builder

        info = self._ask_hub(load_dataset_builder).info
        return info.dataset_size or info.download_size

    def units(self) -> list[tuple[int, int]]:
        """Cut the rows into units `(first, end)`."""
        rows = len(self._rows())
        return [(row, min(row + UNIT_ROWS, rows)) for row in range(0, rows, UNIT_ROWS)]

    def documents(self, unit: tuple[int, int]) -> Iterator[str]:
        """Yield the text of each document of a unit, empty ones included."""
        rows = self._rows()
        if self.text_field not in rows.column_names:
            raise ValueError(
                f"data.text_field={self.text_field!r} is no column of {self.name}; "
                f"it has {', '.join(rows.column_names)}"
            )
        for row in range(*unit):
            yield rows[row][self.text_field] or ""  # a column may hold nulls

    def _rows(self):  # noqa: ANN202 (a datasets.Dataset; naming it would import datasets here)
        from datasets import load_dataset

        return self._ask_hub(load_dataset, split="train")

    def _ask_hub(self, load, **options):  # noqa: ANN001, ANN003, ANN202
        path, _, config = self.name.partition(":")
        try:
            return load(path, config or None, **options)
        except Exception as error:  # datasets and the hub client raise many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"data.source={self.name} could not be loaded from the hub ({reason}). Without a "
                f"network use local files (--data.source corpus.jsonl), a folder made by "
                f"`pretrain prepare` elsewhere (--data.path FOLDER), or the embedded corpus "
                f"(--data.source {EMBEDDED_CORPUS})"
            ) from error


Source = FileSource | HubSource


def open_source(name: str, *, text_field: str = "text") -> Source:
    """Return the source called `name`: the embedded corpus, a file, a folder, or a hub dataset.

    Raises ValueError for a missing path, a kind of file that is not read, or a source without text.
    """
    path = Path(name).expanduser()
    if name == EMBEDDED_CORPUS:
        files = _standard_library_files()
    elif path.is_dir():
        found = (p for p in path.rglob("*") if p.suffix in LOCAL_SUFFIXES and p.is_file())
        files = tuple(sorted(found))
        if not files:
            raise ValueError(f"data.source={name}: the folder holds no .txt or .jsonl file")
    elif path.is_file():
        if path.suffix not in LOCAL_SUFFIXES:
            raise ValueError(
                f"data.source={name}: the file must end in .txt (one document) or .jsonl (one "
                f"document a line, in the field {text_field!r}); token arrays (.npy, .bin) are "
                f"given as --data.path"
            )
        files = (path,)
    elif HUB_NAME.fullmatch(name) and not name.startswith("."):
        return HubSource(name, text_field)
    else:
        raise ValueError(
            f"data.source={name}: there is no such file or folder, and it is neither "
            f"{EMBEDDED_CORPUS} nor a hub dataset OWNER/NAME[:CONFIG]"
        )
    if not sum(file.stat().st_size for file in files):
        raise ValueError(f"data.source={name} is empty: it needs at least one document with text")
    return FileSource(name, files, text_field)


def _standard_library_files() -> tuple[Path, ...]:
    """Return the sources of the running interpreter's standard library, tests left out."""
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


def _slices(path: Path, size: int) -> list[FileSlice]:
    end = path.stat().st_size
    if path.suffix != ".jsonl":
        return [FileSlice(path, 0, end)]
    return [FileSlice(path, start, min(start + size, end)) for start in range(0, end, size)]


def _json_lines(piece: FileSlice, text_field: str) -> Iterator[str]:
    with piece.path.open("rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # what is left of a line that began in the slice before
        while (offset := file.tell()) < piece.stop:
            line = file.readline()
            if not line.strip():
                continue
            where = f"{piece.path}, line at byte {offset}"
            try:
                text = json.loads(_decode(line, where))[text_field]
                text.encode()  # JSON can spell halves of characters, which are no text
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{where}: each line must be a JSON object with a text in the field "
                    f"{text_field!r} (--data.text_field), in UTF-8; it is {line[:60]!r}..."
                ) from error
            yield text


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: the text is not UTF-8 ({error}); convert it first") from error
