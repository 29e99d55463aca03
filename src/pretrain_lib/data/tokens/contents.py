"""Detect files without a header that hold something other than token ids.

What is found here leaves no doubt: real ids are never taken for it.
"""

import codecs
import re
from itertools import product

import numpy as np

from pretrain_lib.data.tokens.places import Place

HEAD_BYTES = 64
ALONE = "write the ids alone"
MAGICS = {
    b"\x93NUMPY": "a NumPy array (rename it to end in .npy)",
    b"\x1f\x8b\x08": "data compressed by gzip (decompress it)",
    b"\x28\xb5\x2f\xfd": "data compressed by zstd (decompress it)",
    b"\xfd7zXZ\x00": "data compressed by xz (decompress it)",
    b"PK\x03\x04": f"a ZIP archive, as of torch.save or numpy.savez ({ALONE})",
    b"PAR1\x15": f"a Parquet table ({ALONE})",
    b"ARROW1\0\0": f"an Arrow table ({ALONE})",
    b"\x89HDF\r\n\x1a\n": f"an HDF5 file ({ALONE})",
}
# From protocol 4 on a frame with its size follows, before it what begins lists, objects, arrays and
# what torch.save wrote before it wrote ZIP archives.
PICKLE = re.compile(
    rb"\x80[\x04\x05]\x95.{4}\0{4}"
    rb"|\x80[\x02\x03](?:[\]}]q\0|c[\w.]+\n\w+\n|\x8a\nl\xfc\x9cF\xf9 j)",
    re.DOTALL,
)
# Control characters are rare in text; the high bytes of ids are full of them.
CONTROLS = sorted({*range(0x20), 0x7F} - {*b"\t\n\v\f\r\x1b"})
RARELY = 1000  # at most one in that many
PRINTABLE = [*b"\t\n\r", *range(0x20, 0x7F)]
MOSTLY, FEWEST_BYTES = 0.8, 64  # of text beyond ASCII
# The type, the highest id in it, and how many values and different ones are no chance.
FLOATS = (("f4", 2**24, 8, 2), ("f8", 2**32, 8, 2), ("f2", 2**16, 64, 9))


def refuse_container(path: Place) -> None:
    """Raise ValueError if a file begins as one of another format does."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    kinds = [kind for magic, kind in MAGICS.items() if head.startswith(magic)]
    if PICKLE.match(head):
        kinds = [f"a pickle, as of pickle.dump or torch.save ({ALONE})"]
    if _is_safetensors(path, head):
        kinds = [f"tensors of safetensors ({ALONE})"]
    for kind in kinds:
        raise ValueError(f"{path} holds {kind}; give data.dtype=uint16 if it holds bare ids")


def refuse_values(path: Place, samples: list[bytes]) -> None:
    """Raise ValueError if samples of a file are of text or of floats."""
    if is_text(samples):
        raise ValueError(
            f"{path} holds text: tokenize it by `pretrain prepare`, or give data.dtype=uint16 if "
            f"it holds ids (uint8 if each is a byte)"
        )
    raw = b"".join(part[: len(part) // 8 * 8] for part in samples)
    if (dtype := _find_floats(raw)) is not None:
        order = "big-endian " if dtype.startswith(">") else ""
        raise ValueError(
            f"{path} holds whole numbers as {order}{np.dtype(dtype).name}: write them as integers, "
            f"numpy.fromfile(FILE, '{dtype}').astype('<u4').tofile(NEW), and give "
            f"data.dtype=uint32; or give data.dtype=uint16 if it holds ids"
        )


def is_text(samples: list[bytes]) -> bool:
    """Return whether samples of a file have hardly any controls, and are UTF-8 or mostly ASCII.

    Each may begin and end within a character.
    """
    raw = b"".join(part for part in samples)
    counts = np.bincount(np.frombuffer(raw, "u1"), minlength=256)
    printable = counts[PRINTABLE].sum()
    if printable == len(raw) or len(raw) < FEWEST_BYTES:
        return 0 < printable == len(raw)
    if counts[CONTROLS].sum() * RARELY > len(raw):
        return False
    try:
        for part in samples:
            begins = next((i for i, byte in enumerate(part[:4]) if byte & 0xC0 != 0x80), 4)
            codecs.getincrementaldecoder("utf-8")().decode(part[begins:], final=False)
    except UnicodeDecodeError:
        return bool(printable >= MOSTLY * len(raw))
    return True


def _is_safetensors(path: Place, head: bytes) -> bool:
    """Return whether a file is the size of a JSON object, the object, and tensors."""
    size = int.from_bytes(head[:8], "little")
    if head[8:10] != b'{"' or size > path.stat().st_size - 8:
        return False
    with path.open("rb") as file:
        header = file.read(8 + size)
    return header.rstrip(b" ").endswith(b"}")


def _find_floats(raw: bytes) -> str | None:
    """Return the type of which all values are whole numbers, as ids in floats are."""
    for order, (kind, highest, fewest, different) in product("<>", FLOATS):
        with np.errstate(invalid="ignore"):
            values = np.frombuffer(raw, order + kind).astype("f8")
            whole = (values >= 0) & (values <= highest) & (values == np.floor(values))
        if len(values) >= fewest and whole.all() and len(np.unique(values)) >= different:
            return order + kind
    return None
