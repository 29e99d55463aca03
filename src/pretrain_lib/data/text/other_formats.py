"""Refuse files that do not hold what their names say: UTF-8 text, compressed as the name says."""

import codecs
from pathlib import Path

from pretrain_lib.data.text.compression import compression_of
from pretrain_lib.wording import show_path

START_BYTES = 512  # the header of a tar archive
MARKS = {  # those of UTF-32 first: one of UTF-16 begins one of them
    "UTF-32LE": codecs.BOM_UTF32_LE,
    "UTF-32BE": codecs.BOM_UTF32_BE,
    "UTF-16LE": codecs.BOM_UTF16_LE,
    "UTF-16BE": codecs.BOM_UTF16_BE,
}
# Where in four bytes the low bytes of characters are. All others are the numbers of alphabets, of
# which those up to Arabic are below 8; text in UTF-8 has such bytes as an exception. Those up to
# Burmese are below 17, like tabs and line feeds; a NUL, the half of a space, tells them from these.
LOW_BYTES = {"UTF-16LE": {0, 2}, "UTF-16BE": {1, 3}, "UTF-32LE": {0}, "UTF-32BE": {3}}
ALPHABETS, MORE_ALPHABETS = bytes(range(8)), bytes(range(17))
MOST, HALF, FEW, RARE = 3 / 4, 1 / 2, 1 / 16, 1 / 128
LEAST_BYTES = 32  # of which an encoding can be told


def refuse_other_format(path: Path, start: bytes, *, is_unpacked: bool) -> None:
    """Raise ValueError if a file that begins with `start` is no text in UTF-8.

    `is_unpacked` says whether `start` is what a compressed file expands to.
    """
    shown, kind = f"data.source: {show_path(path)}", compression_of(start)
    if kind is not None and is_unpacked:
        raise ValueError(f"{shown} is compressed twice (it holds a {kind} file); decompress both")
    if kind is not None:
        raise ValueError(
            f"{shown} is compressed as {kind} files are; rename it to {show_path(path)}{kind}"
        )
    if (archive := archive_of(start)) is not None:
        raise ValueError(f"{shown} is a {archive} archive, not text; unpack it")
    if (encoding := encoding_of(start)) is not None:
        raise ValueError(
            f"{shown} is text in {encoding}, not UTF-8; convert it, such as by "
            f"iconv -f {encoding} -t UTF-8"
        )


def archive_of(start: bytes) -> str | None:
    """Return which archives begin so, None for text."""
    if start.startswith(b"PK\3\4"):
        return "zip"
    return "tar" if start[257:265] in (b"ustar\x0000", b"ustar  \0") else None


def encoding_of(start: bytes) -> str | None:
    """Return the encoding of text that begins so if its characters have two or four bytes."""
    for name, mark in MARKS.items():
        if start.startswith(mark):
            return name
    if len(start) < LEAST_BYTES:
        return None
    parts = [start[place::4] for place in range(4)]
    kinds = (b"\0", ALPHABETS, MORE_ALPHABETS)
    nuls, shares, more = ([_share(part, kind) for part in parts] for kind in kinds)
    for name, low in LOW_BYTES.items():
        high = set(range(4)) - low
        if max(shares[i] for i in low) <= FEW and min(shares[i] for i in high) >= MOST:
            return name
        has_spaces = sum(nuls[i] for i in high) >= RARE * len(high)
        if has_spaces and max(more[i] for i in low) <= HALF and min(more[i] for i in high) >= MOST:
            return name
    return None


def _share(part: bytes, kind: bytes) -> float:
    return 1 - len(part.translate(None, kind)) / len(part)
