"""Safetensors files, written tensor by tensor and hashed on the way.

`safetensors.torch.save_file` copies all tensors first, and hashing afterwards reads them again.
"""

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch
import xxhash

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
CHUNK_BYTES = 2**22
DIRECT = getattr(os, "O_DIRECT", 0)  # not on macOS


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> str:
    """Write a safetensors file; return its xxh3_128.

    Tensors on other devices are fetched, views made contiguous and `dtype` applied one at a time,
    so memory grows by the largest of them.
    """
    # Wide ones first, so that each begins at a multiple of its width.
    ordered = sorted(tensors.items(), key=lambda item: -(dtype or item[1].dtype).itemsize)
    header, position = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in ordered:
        kind = dtype or tensor.dtype
        end = position + tensor.numel() * kind.itemsize
        header[name] = {
            "dtype": DTYPES[kind],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    contents = (_bytes_of(tensor, dtype) for _, tensor in ordered)
    start = memoryview(len(raw).to_bytes(8, "little") + raw)
    return _write_through(path, chain([start], contents))


def hash_file(path: Path) -> str:
    """Return the xxh3_128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor, dtype: torch.dtype | None) -> memoryview:
    plain = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
    return memoryview(plain.view(torch.uint8).numpy())


def _write_through(path: Path, contents: Iterable[memoryview]) -> str:
    """Write a file past the page cache where the system can; return its xxh3_128.

    The cache would take several times the processor time, from training that needs it, and memory.
    """
    digest, used = xxhash.xxh3_128(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    descriptor = _open_direct(path, flags)
    chunk = memoryview(mmap.mmap(-1, CHUNK_BYTES))  # aligned, as what goes past the cache must be
    try:
        for content in contents:
            while content:
                taken = min(len(content), CHUNK_BYTES - used)
                chunk[used : used + taken] = content[:taken]
                content, used = content[taken:], used + taken
                if used == CHUNK_BYTES:
                    digest.update(chunk)
                    _write_all(descriptor, chunk)
                    used = 0
        _leave_direct(descriptor)  # the rest is no whole block
        digest.update(chunk[:used])
        _write_all(descriptor, chunk[:used])
        os.fsync(descriptor)  # here, where it was written: another node cannot do it
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _open_direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)  # a file system in memory, and others


def _leave_direct(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~DIRECT)


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:  # a disk that fills up, or a limit, takes a part of it first
        try:
            content = content[os.write(descriptor, content) :]
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _leave_direct(descriptor)  # no whole block is left, or they are larger than a page
            os.write(descriptor, content[:1])  # raises what is wrong, if that was not it
            content = content[1:]
