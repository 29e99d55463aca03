"""Write safetensors files tensor by tensor, hashing them in the same pass.

`safetensors.torch.save_file` copies all tensors first, and a hash afterwards would read the file
again.
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
    torch.int32: "I32",
    torch.bool: "BOOL",
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
    """Write a safetensors file, numbers with a fraction in `dtype` if given; return its xxh3_128.

    Tensors are moved to the CPU, made contiguous and converted one at a time, so peak memory grows
    only by the largest tensor.
    """
    # Wide dtypes first, so that every tensor is aligned to its item size.
    ordered = sorted(tensors.items(), key=lambda item: -stored_dtype(item[1], dtype).itemsize)
    header, position = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in ordered:
        kind = stored_dtype(tensor, dtype)
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


def stored_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a tensor in a file whose numbers with a fraction are in `dtype`."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def hash_file(path: Path) -> str:
    """Return the xxh3_128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor, dtype: torch.dtype | None) -> memoryview:
    plain = tensor.detach().to("cpu", stored_dtype(tensor, dtype)).contiguous().reshape(-1)
    return memoryview(plain.view(torch.uint8).numpy())


def _write_through(path: Path, contents: Iterable[memoryview]) -> str:
    """Write a file with O_DIRECT where the system supports it; return its xxh3_128.

    Writing through the page cache would take memory and several times the CPU time, both of which
    training needs.
    """
    digest, used = xxhash.xxh3_128(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    descriptor = _open_direct(path, flags)
    chunk = memoryview(mmap.mmap(-1, CHUNK_BYTES))  # page-aligned, as O_DIRECT requires
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
        _leave_direct(descriptor)  # O_DIRECT writes whole blocks only, the rest is shorter
        digest.update(chunk[:used])
        _write_all(descriptor, chunk[:used])
        os.fsync(descriptor)  # on the node that wrote the file: another one cannot flush it
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _open_direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)  # tmpfs and others have no O_DIRECT


def _leave_direct(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~DIRECT)


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:  # a write may be partial, as when the disk fills up
        try:
            content = content[os.write(descriptor, content) :]
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _leave_direct(descriptor)  # less than a block is left, or blocks exceed a page
            os.write(descriptor, content[:1])  # raises the actual error if O_DIRECT was not it
            content = content[1:]
