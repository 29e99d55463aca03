"""Token arrays of other projects: NumPy, nanoGPT, llm.c, datatrove, Megatron-LM, litdata, OLMo."""

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain_lib.data.remote import is_url
from pretrain_lib.data.tokens.arrays import TokenArray, TokenFile
from pretrain_lib.data.tokens.datatrove import open_datatrove
from pretrain_lib.data.tokens.headerless import IdType, open_headerless
from pretrain_lib.data.tokens.litdata import INDEX, is_chunk, open_chunk, read_litdata_index
from pretrain_lib.data.tokens.megatron import open_megatron
from pretrain_lib.data.tokens.places import Place, open_place
from pretrain_lib.data.tokens.shards import MANIFEST
from pretrain_lib.data.tokens.unprepared import FOREIGN_SUFFIXES
from pretrain_lib.wording import in_line

NPY_MAGIC = b"\x93NUMPY"
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # differs in the names of fields
}
LLMC_HEADER_BYTES = 1024  # 256 int32: magic, version, tokens, zeros
# By (magic, version): GPT-2 ids, LLaMA 3 ids.
LLMC_DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
LLMC_OTHERS = {
    20240326: "a model",
    20240327: "a debug state",
    20240328: "a tokenizer",
    20240522: "evaluation data",
    20240803: "a model",
}


def is_foreign(path: str | Place) -> bool:
    """Return whether a path or glob pattern names token arrays: by suffix, or litdata's index."""
    name = str(path)
    if not name.lower().endswith(FOREIGN_SUFFIXES) and name.rpartition("/")[2] != INDEX:
        return False
    return is_url(name) or not Path(name).expanduser().is_dir()


def refuse_litdata_folder(folder: Place, *, setting: str = "data.path") -> None:
    """Raise ValueError, with the remedy, if a folder is not prepared but written by litdata."""
    if not (folder / MANIFEST).is_file() and read_litdata_index(folder / INDEX) is not None:
        raise ValueError(
            f"{setting}={folder} is a folder of litdata: give its index, {setting}={folder / INDEX}"
        )


def names_tokens(validation: str) -> bool:
    """Return whether `data.validation` names token arrays or a folder rather than a rule."""
    is_place = is_foreign(validation) or is_url(validation)
    return is_place or Path(validation).expanduser().is_dir()


def open_foreign(
    path: str | Place, *, vocabulary_size: int | None, dtype: IdType | None = None
) -> TokenArray:
    """Open a token array, or all files that match a pattern (`data/train_*.bin`) as one array.

    Supported are one-dimensional `.npy` of any integer type, `.bin` of nanoGPT (uint16), llm.c,
    Megatron-LM (with its `.idx`) and litdata (with its `index.json`, which also names all chunks),
    `.ds` of datatrove, and arrays without a header of the given `dtype`. Those of Megatron-LM and
    datatrove have document ends, those of datatrove also loss masks. Raises ValueError for any
    other file, a missing one, one whose size does not fit its tokens, and if the headers or indexes
    of all files state another type than `dtype`.
    """
    tokens = open_array(path, vocabulary_size=vocabulary_size, dtype=dtype)
    check_dtype([tokens], dtype)
    return tokens


def open_array(
    path: str | Place, *, vocabulary_size: int | None, dtype: IdType | None
) -> TokenArray:
    """Open one of several arrays, of which only some may need `dtype`, as `open_foreign` does."""
    if not is_foreign(path):
        raise ValueError(
            f"{path}: a token array must end in {', '.join(FOREIGN_SUFFIXES)} or be litdata's "
            f"{INDEX}"
        )
    path = open_place(path)
    paths, may_be_chunk = _find(path), path.suffix.lower() not in (".npy", ".ds")
    index = read_litdata_index(path.parent / INDEX) if may_be_chunk else None
    if path.name == INDEX:
        if index is None:
            raise ValueError(f"{path} is not an index of litdata: it lists no chunks")
        paths = index.paths
    files = []
    for each in paths:
        _check_name(each)
        files.append(open_chunk(each, index) if index else _open_file(each, dtype))
        _check_file(files[-1])
    # A writer of several shards makes empty ones where a process of it had no documents.
    files = [file for file in files if file.num_tokens]
    if not files:
        raise ValueError(f"{path} holds no tokens")
    _check_masks(files)
    return TokenArray(files, vocabulary_size=vocabulary_size)


def check_dtype(arrays: Sequence[TokenArray], dtype: IdType | None) -> None:
    """Raise ValueError if `dtype` is given and no file of these arrays is of it.

    What a header or index states counts; prepared folders need no `dtype`.
    """
    files = [file for tokens in arrays for file in tokens.files if not file.is_shard]
    if dtype is not None and files and all(file.dtype.name != dtype for file in files):
        raise ValueError(
            f"data.dtype={dtype}, but {files[0].path} holds {files[0].dtype.name} by its header or "
            f"index, and no other file needs it; leave data.dtype out"
        )


def _find(path: Place) -> list[Place]:
    """Return the file, or those that match the pattern: only it can name hidden ones."""
    if path.is_file():
        return [path]
    try:
        found = sorted(path.parent.glob(path.name))
    except ValueError as error:
        raise ValueError(f"{path} is not a pattern of file names ({error}); write *") from error
    hidden = path.name.startswith(".")
    if files := [p for p in found if p.is_file() and (hidden or not p.name.startswith("."))]:
        return files
    if found:
        raise ValueError(f"{path} is not a file; give a file of tokens")
    if glob.has_magic(str(path.parent)):
        raise ValueError(
            f"{path}: there is no such file; only the name of the file may be a pattern, not that "
            f"of its folder: give several paths"
        )
    raise ValueError(f"{path}: there is no such file")


def _check_name(path: Place) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        name = str(path).encode(errors="backslashreplace").decode()
        raise ValueError(f"{name}: the name is not UTF-8; rename the file") from error


def _open_file(path: Place, dtype: IdType | None) -> TokenFile:
    _refuse_shard(path)
    suffix = path.suffix.lower()
    if suffix == ".ds":
        return open_datatrove(path, dtype)
    return _open_npy(path, dtype) if suffix == ".npy" else _open_bin(path, dtype)


def _refuse_shard(path: Place) -> None:
    """Raise ValueError if a file is a part of a prepared folder."""
    name = path.name.removesuffix(".ends.npy").removesuffix(".bin")
    record = path.with_name(f"{name}.json")
    if name != path.name and record.is_file() and b'"blocks_xxh3_64"' in record.read_bytes():
        raise ValueError(f"{path} is a shard of a prepared folder: give the folder {path.parent}")


def _check_file(file: TokenFile) -> None:
    """Raise ValueError unless the file holds its tokens and nothing else."""
    size = file.path.stat().st_size
    needed = file.header_bytes + file.num_tokens * file.dtype.itemsize
    if size != needed:
        raise ValueError(
            f"{file.path}: {size} bytes, but its tokens need {needed}, for {file.num_tokens} "
            f"{file.dtype.name}; copy or write the file again"
        )
    if not file.num_tokens and file.foreign_ends is None:  # nothing says that it is to be empty
        raise ValueError(f"{file.path} holds no tokens; leave it out, or write it again")


def _open_npy(path: Place, dtype: IdType | None) -> TokenFile:
    with path.open("rb") as file:
        if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
            return open_headerless(path, dtype)
        file.seek(0)
        try:
            version = np.lib.format.read_magic(file)
            shape, _, of = NPY_HEADERS[version](file)
        except Exception as error:  # numpy reads the header as Python, which raises many types
            reason = in_line(error)
            raise ValueError(f"{path} is not a .npy array: {reason}") from error
        header_bytes = file.tell()
    if len(shape) != 1 or of.kind not in "iu":
        raise ValueError(
            f"{path}: must be a one-dimensional integer array, is {of} {shape}; {_npy_remedy(of)}"
        )
    return TokenFile(path, shape[0], of, header_bytes=header_bytes)


def _npy_remedy(of: np.dtype) -> str:
    """Return how an array of ids of another shape or type is written as it is read."""
    if of.kind not in "iuf":
        return "save the ids as integers, one after the other"
    integers = ".astype('uint32')" if of.kind == "f" else ""
    return f"if it holds ids, numpy.save(NEW, numpy.load(FILE).reshape(-1){integers})"


def _open_bin(path: Place, dtype: IdType | None) -> TokenFile:
    if (index := path.with_suffix(".idx")).is_file():
        return open_megatron(path, index)
    with path.open("rb") as file:
        raw = file.read(12)
    header = np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<i4").tolist()
    magics = {magic for magic, _ in LLMC_DTYPES} | set(LLMC_OTHERS)
    if header[:1] and header[0] in magics:
        return _open_llmc(path, header)
    if int.from_bytes(raw[:4], "big") in magics:
        raise ValueError(f"{path} is a big-endian file of llm.c; write it as little-endian")
    if is_chunk(path):
        raise ValueError(
            f"{path} is a chunk of litdata, which is read by the {INDEX} beside it: there is none; "
            f"copy it there"
        )
    return open_headerless(path, dtype)


def _open_llmc(path: Place, header: list[int]) -> TokenFile:
    """Open a file of llm.c by the first three numbers of its header: magic, version, tokens."""
    if header[0] in LLMC_OTHERS:
        raise ValueError(
            f"{path} holds no tokens but {LLMC_OTHERS[header[0]]} of llm.c (magic {header[0]}); "
            f"give one of llm.c's files of tokens, such as fineweb_train_*.bin"
        )
    if (dtype := LLMC_DTYPES.get(tuple(header[:2]))) is None:
        raise ValueError(
            f"{path}: the llm.c format (magic, version) {tuple(header[:2])} is not supported; "
            f"supported are {', '.join(map(str, LLMC_DTYPES))}"
        )
    num_tokens = header[2] if len(header) == 3 else 0
    if num_tokens < 1:
        raise ValueError(
            f"{path}: its llm.c header counts {num_tokens} tokens, a number that overflowed or was "
            f"not written; write files of fewer than 2**31 tokens"
        )
    return TokenFile(path, num_tokens, np.dtype(dtype), header_bytes=LLMC_HEADER_BYTES)


def _check_masks(files: list[TokenFile]) -> None:
    """Raise ValueError if some of the files have a loss mask and others do not."""
    without = [file.path for file in files if file.mask is None]
    if without and len(without) < len(files):
        raise ValueError(
            f"{without[0]} has no loss mask ({without[0].name}.loss), but other files of the array "
            f"do; add it, or give the files without one as a path of their own"
        )


def fingerprint_array(tokens: TokenArray, *, with_ends: bool) -> tuple[str, str]:
    """Return a hash with the document ends, if `with_ends`, and one without them.

    Both cover the sizes of files and masks, and 64 evenly spaced samples of each.
    """
    stretch, digest = 2**16, hashlib.sha256()
    masks = [file.mask.path for file in tokens.files if file.mask is not None]
    for path in [*(file.path for file in tokens.files), *masks]:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as content:
            for i in range(64):
                content.seek(i * max(0, size - stretch) // 63)
                digest.update(content.read(stretch))
    identity = digest.hexdigest()
    for ends in tokens.iterate_ends() if with_ends and tokens.has_documents else ():
        digest.update(ends.tobytes())
    return digest.hexdigest(), identity
