"""Token arrays of litdata: chunks written for its `TokensLoader`, listed by an `index.json`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_lib.data.remote import Unreachable
from pretrain_lib.data.tokens.arrays import TokenFile
from pretrain_lib.data.tokens.places import Place
from pretrain_lib.files.reading import parse_json
from pretrain_lib.wording import in_line

INDEX = "index.json"
# By the number in `data_format`: litdata's tables of torch and NumPy types.
ID_TYPES = {
    "no_header_tensor": {11: "u1", 12: "i1", 13: "i2", 14: "i2", 15: "i4", 16: "i4", 17: "i8"}
    | {18: "i8", 20: "u2"},
    "no_header_numpy": dict(enumerate(("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"))),
}


@dataclass(frozen=True)
class LitdataIndex:
    """The chunks of a folder: for each file name, its record in `index.json`."""

    path: Place
    dtype: np.dtype
    chunks: dict[str, dict]

    @property
    def paths(self) -> list[Place]:
        """The files, in the order of the index."""
        return [self.path.parent / name for name in self.chunks]


def read_litdata_index(path: Place) -> LitdataIndex | None:
    """Read an `index.json`, or return None if it is missing or no index of litdata.

    Raises ValueError if it is damaged, since it decides how chunks are read, or if it lists other
    data than bare ids: compressed, encrypted, several fields.
    """
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict) or not {"config", "chunks"} <= content.keys():
            return None
        config, chunks = content["config"], content["chunks"]
        fields, names = list(config["data_format"]), [Path(c["filename"]).name for c in chunks]
    except Unreachable:
        raise
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        reason = in_line(error) or type(error).__name__
        raise ValueError(
            f"{path} cannot be read ({reason}), and decides how chunks beside it are read; copy or "
            f"write it again, or move it away if it is not of litdata"
        ) from error
    for key in ("compression", "encryption"):
        if config.get(key):
            raise ValueError(
                f"{path}: chunks with {key} ({in_line(config[key])}) are not read; "
                f"write them without"
            )
    kind, _, number = str(fields[0]).partition(":") if len(fields) == 1 else ("", "", "")
    code = ID_TYPES.get(kind, {}).get(int(number) if number.isdigit() else None)
    if code is None or config.get("item_loader", "TokensLoader") != "TokensLoader":
        raise ValueError(
            f"{path}: data_format={fields} for {in_line(config.get('item_loader'))} is not an "
            f"array of ids; write it by litdata.optimize with item_loader=TokensLoader() and "
            f"integers"
        )
    return LitdataIndex(path, np.dtype(f"<{code}"), dict(zip(names, chunks, strict=True)))


def is_chunk(path: Place) -> bool:
    """Return whether a file begins as a chunk does: its places lead to the end of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = np.frombuffer(file.read(8), "<u4") if size >= 16 else np.zeros(2, "<u4")
        items, first = head.tolist()
        if not items or first != 4 * (items + 2) or first > size:
            return False
        file.seek(first - 4)
        return int.from_bytes(file.read(4), "little") == size


def open_chunk(path: Place, index: LitdataIndex) -> TokenFile:
    """Open a chunk: uint32 number of items, uint32 place of each and of the end, then the ids."""
    record = index.chunks.get(path.name)
    if record is None:
        raise ValueError(f"{path}: {index.path} does not list it; move it to another folder")
    size = path.stat().st_size if path.is_file() else None
    items, num_tokens = record.get("chunk_size"), record.get("dim")
    if size is None or not all(isinstance(n, int) and n >= 0 for n in (items, num_tokens)):
        _refuse(path, "missing" if size is None else f"{index.path.name} has no count of its ids")
    header_bytes, needed = 4 * (items + 2), 4 * (items + 2) + num_tokens * index.dtype.itemsize
    if size != needed:
        _refuse(
            path,
            f"{size} bytes, but {num_tokens} {index.dtype.name} ids in {items} items need {needed}",
        )
    with path.open("rb") as file:
        header = np.frombuffer(file.read(header_bytes), "<u4").astype(np.int64)
    expected = (items, header_bytes, size)
    if (header[0], header[1], header[-1]) != expected or (np.diff(header[1:]) < 0).any():
        _refuse(path, f"its header does not list {items} items from byte {header_bytes} to {size}")
    return TokenFile(path, num_tokens, index.dtype, header_bytes=header_bytes)


def _refuse(path: Place, reason: str) -> None:
    raise ValueError(f"{path}: {reason}; copy or write the chunks and their {INDEX} again")
