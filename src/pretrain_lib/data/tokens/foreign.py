"""Token arrays of other projects: `.npy`, `.bin` of nanoGPT and llm.c, `.ds` of datatrove."""

from pathlib import Path

import numpy as np

from pretrain_lib.data.tokens.arrays import TokenArray, TokenFile

FOREIGN_SUFFIXES = (".npy", ".bin", ".ds")
LLMC_HEADER_BYTES = 1024  # 256 int32: magic, version, tokens, zeros
# By (magic, version): GPT-2 ids, LLaMA 3 ids.
LLMC_DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}


def is_foreign(path: str | Path) -> bool:
    """Return whether a path or glob pattern has the suffix of a token array."""
    return str(path).endswith(FOREIGN_SUFFIXES)


def names_tokens(validation: str) -> bool:
    """Return whether `data.validation` names token arrays or a folder rather than a rule."""
    return is_foreign(validation) or Path(validation).expanduser().is_dir()


def open_foreign(path: str | Path, *, vocabulary_size: int | None) -> TokenArray:
    """Open a token array, or all files that match a pattern (`data/train_*.bin`) as one array.

    Supported are one-dimensional `.npy` of any integer type, `.bin` of nanoGPT (uint16) and llm.c,
    and `.ds` of datatrove, which also has document ends. Raises ValueError for any other file, a
    missing one, or one whose size does not fit its tokens.
    """
    if not is_foreign(path):
        raise ValueError(f"{path}: a token array must end in {', '.join(FOREIGN_SUFFIXES)}")
    folder, pattern = Path(path).parent, Path(path).name
    paths = [Path(path)] if Path(path).is_file() else sorted(folder.glob(pattern))
    if not paths:
        raise ValueError(f"{path}: there is no such file")
    return TokenArray([_open_file(p) for p in paths], vocabulary_size=vocabulary_size)


def _open_file(path: Path) -> TokenFile:
    file = {".npy": _open_npy, ".bin": _open_bin, ".ds": _open_datatrove}[path.suffix](path)
    needed = file.header_bytes + file.num_tokens * file.dtype.itemsize
    if path.stat().st_size < needed or not file.num_tokens:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, but its tokens need {needed}")
    return file


def _open_npy(path: Path) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a .npy array: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: must be a one-dimensional integer array, is {array.dtype} {array.shape}"
        )
    return TokenFile(path, len(array), array.dtype, header_bytes=array.offset)


def _open_bin(path: Path) -> TokenFile:
    header, size = np.fromfile(path, dtype="<i4", count=3).tolist(), path.stat().st_size
    if header[:1] and header[0] in {magic for magic, _ in LLMC_DTYPES}:
        if (dtype := LLMC_DTYPES.get(tuple(header[:2]))) is None:
            raise ValueError(
                f"{path}: the llm.c format (magic, version) {tuple(header[:2])} is not supported; "
                f"supported are {', '.join(map(str, LLMC_DTYPES))}"
            )
        return TokenFile(path, header[2], np.dtype(dtype), header_bytes=LLMC_HEADER_BYTES)
    if path.with_suffix(".json").is_file():
        raise ValueError(f"{path} is a shard of a prepared folder: give the folder {path.parent}")
    if size % 2:
        raise ValueError(f"{path}: {size} bytes are not a whole number of uint16 ids")
    return TokenFile(path, size // 2, np.dtype("<u2"))


def _open_datatrove(path: Path) -> TokenFile:
    """Open a datatrove file with its index of document ends.

    The last document end is the number of tokens, which tells 2-byte ids from 4-byte ids.
    """
    index, size = path.with_name(f"{path.name}.index"), path.stat().st_size
    if not index.is_file():
        raise ValueError(f"{path}: its index {index.name} is missing")
    last = np.fromfile(index, dtype="<u8", offset=max(0, index.stat().st_size - 8)).tolist()
    bytes_per_id = size // last[0] if last and last[0] else 0
    if bytes_per_id not in (2, 4) or size % last[0]:
        raise ValueError(f"{path}: {size} bytes do not fit the documents that {index.name} lists")
    return TokenFile(path, last[0], np.dtype(f"<u{bytes_per_id}"), ends_file=index)
