"""Arrays of tokens that others wrote: `.npy`, nanoGPT's `.bin`, llm.c's `.bin`. Floor 1."""

from pathlib import Path

import numpy as np

from pretrain_lib.data.shards import TokenArray, TokenFile

FOREIGN_SUFFIXES = (".npy", ".bin")
LLMC_GPT2_MAGIC, LLMC_HEADER_BYTES = 20240520, 1024
LLMC_MAGICS = (LLMC_GPT2_MAGIC, 20240801)  # the second: LLaMA 3 tokens


def open_foreign(path: Path, *, vocabulary_size: int) -> TokenArray:
    """Open a `.npy` of any integer type, a nanoGPT `.bin` (uint16), or an llm.c `.bin`."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.suffix not in FOREIGN_SUFFIXES:
        raise ValueError(f"{path}: a token array must end in .npy or .bin")
    file = _open_npy(path) if path.suffix == ".npy" else _open_bin(path)
    needed = file.header_bytes + file.num_tokens * file.dtype.itemsize
    if path.stat().st_size < needed or not file.num_tokens:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, but its tokens need {needed}")
    return TokenArray([file], vocabulary_size=vocabulary_size)


def _open_npy(path: Path) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a .npy array: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: needs one dimension of integers, has {array.dtype} {array.shape}"
        )
    return TokenFile(path, len(array), array.dtype, header_bytes=array.offset)


def _open_bin(path: Path) -> TokenFile:
    header, size, dtype = np.fromfile(path, dtype="<i4", count=3), path.stat().st_size, "<u2"
    if len(header) == 3 and header[0] in LLMC_MAGICS:
        if header[0] != LLMC_GPT2_MAGIC or header[1] != 1:
            raise ValueError(
                f"{path}: of llm.c's formats only version 1 of GPT-2 tokens is read, this is "
                f"magic {header[0]}, version {header[1]}"
            )
        return TokenFile(path, int(header[2]), np.dtype(dtype), header_bytes=LLMC_HEADER_BYTES)
    if path.with_suffix(".json").is_file():
        raise ValueError(f"{path} is a shard of a prepared folder: give the folder {path.parent}")
    if size % 2:
        raise ValueError(f"{path}: {size} bytes are not whole uint16 ids")
    return TokenFile(path, size // 2, np.dtype(dtype))
