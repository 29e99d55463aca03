"""The held-out validation set: documents chosen by a hash of their text, or the first tokens."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_lib.data.pool import count
from pretrain_lib.data.text.encoder import Encoder
from pretrain_lib.data.text.formats import Document, Rejected, is_one_document
from pretrain_lib.data.text.sources import FileSource, Source
from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.data.tokens.shards import write_shard

HASH_SHARE = 0.01  # share of documents held out by `hash`
SCANNED_FILES, SCANNED_BYTES = 1000, 200 * 2**20  # most text that `holds_out_nothing` reads


def parse_validation(rule: str) -> tuple[str, float]:
    """Parse a rule into `("hash", share)`, `("first", tokens)` or `("none", 0)`.

    Raises ValueError for any other rule.
    """
    kind, _, amount = str(rule).partition(":")
    with contextlib.suppress(ValueError, OverflowError):
        if kind == "hash" and 0 < (share := float(amount or HASH_SHARE)) < 1:
            return kind, share
        if kind == "first" and (tokens := int(float(amount))) > 0:
            return kind, tokens
        if rule == "none":
            return kind, 0
    is_path = kind not in ("hash", "first", "none") and not Path(str(rule)).expanduser().is_dir()
    raise ValueError(
        f"data.validation={rule} must be hash, hash:SHARE, first:TOKENS or none (or, for a run on "
        f"tokens, the path of an array or a prepared folder"
        + (f"; there is no folder {rule})" if is_path else ")")
    )


def hash_fraction(key: bytes) -> float:
    """Hash the text of a document, or its digest, to [0, 1): duplicates share a split."""
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def holds_out_nothing(sources: Sequence[Source], validation: str) -> bool:
    """Return whether a rule is known to hold out no text, before the text is tokenized.

    Under `hash` it is known only of a few `.txt` files, whose documents are the files.
    """
    kind, share = parse_validation(validation)
    if kind != "hash":
        return kind == "none"
    if not all(isinstance(source, FileSource) for source in sources):
        return False
    files = [file for source in sources for file in source.files]
    size = sum(file.stat().st_size for file in files)
    if size > SCANNED_BYTES or len(files) > SCANNED_FILES or not all(map(is_one_document, files)):
        return False
    return not any(
        isinstance(document, Document)
        and hash_fraction(document.digest or document.text.encode()) < share
        for source in sources
        for unit in source.units()
        for document in source.documents(unit)
    )


@dataclass(frozen=True)
class HeldOut:
    """How much of a unit is in the validation split of `first:TOKENS`."""

    documents: int = 0  # whole ones
    tokens: int = 0  # of the next document, which is split between validation and training


def write_first_tokens(
    validation: str, units: Iterable[tuple[Source, object]], encoder: Encoder, folder: Path
) -> dict[int, HeldOut]:
    """Write the validation split of `first:TOKENS`: exactly the first TOKENS tokens.

    Returns how much of each unit is held out, by unit index. Does nothing under other rules.
    """
    kind, missing = parse_validation(validation)
    held_out: dict[int, HeldOut] = {}
    if kind != "first":
        return held_out
    documents: list[np.ndarray] = []
    text_bytes, goes_on = 0, False
    for index, position, document in _enumerate(units):
        is_left_out = isinstance(document, Rejected) or document.is_blank
        texts = [] if is_left_out else [document.text.encode()]
        ids, _ = encoder.encode(texts, begins=is_left_out or document.begins)
        part = ids[: int(missing)]
        whole = len(part) == len(ids)
        held_out[index] = HeldOut(position + 1) if whole else HeldOut(position, len(part))
        if len(part):
            if goes_on and not document.begins:  # the next part of a large file
                documents[-1] = np.concatenate([documents[-1], part])
            else:
                documents.append(part)
            goes_on = not document.ends
            size = len(document.text.encode())
            if not whole:
                size = count_first_bytes(encoder.tokenizer, part, begins=document.begins)
            text_bytes += size
            missing -= len(part)
            count(documents=1, tokens=len(part), text_bytes=size)
        if not missing:
            break
    # The rest of a document that is split here becomes a document of the training split.
    tokens = np.concatenate([np.empty(0, encoder.dtype), *documents])
    ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
    write_shard(folder, "validation-first", tokens, ends, text_bytes=text_bytes)
    return held_out


def count_first_bytes(tokenizer: Tokenizer, ids: np.ndarray, *, begins: bool) -> int:
    """Return the size in bytes of the text of the first tokens, which may end in a character.

    `begins` says whether a document begins with them, or its next part.
    """
    before = None if begins else tokenizer.end_of_text_id - 1  # any other id
    return tokenizer.count_bytes(ids, before=before)


def _enumerate(
    units: Iterable[tuple[Source, object]],
) -> Iterator[tuple[int, int, Document | Rejected]]:
    """Yield `(unit index, position in the unit, document)` for all documents."""
    for index, (source, unit) in enumerate(units):
        for position, document in enumerate(source.documents(unit)):
            yield index, position, document
