"""What is held out for validation: some documents by their text, or the first tokens. Floor 1."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_lib.data.shards import token_dtype, write_shard
from pretrain_lib.data.sources import Source
from pretrain_lib.data.tokenizer import Tokenizer

HASH_SHARE = 0.01  # of the documents, held out by `hash`


def parse_validation(rule: str) -> tuple[str, float]:
    """Return `("hash", share)`, `("first", tokens)` or `("none", 0)`."""
    kind, _, amount = rule.partition(":")
    with contextlib.suppress(ValueError, OverflowError):
        if kind == "hash" and 0 < (share := float(amount or HASH_SHARE)) < 1:
            return kind, share
        if kind == "first" and (tokens := int(float(amount))) > 0:
            return kind, tokens
        if rule == "none":
            return kind, 0
    raise ValueError(
        f"data.validation={rule} must be hash, hash:SHARE, first:TOKENS, the path of a token "
        f"array, or none"
    )


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone: duplicates share a side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


@dataclass(frozen=True)
class HeldOut:
    """What a unit gave to the validation split of `first:TOKENS`."""

    documents: int = 0
    tokens: int = 0  # of the document after those, which is cut


def write_first_tokens(
    validation: str,
    sources: list[Source],
    units: list[tuple[int, int]],
    tokenizer: Tokenizer,
    folder: Path,
) -> list[HeldOut]:
    """Write the validation split of `first:TOKENS`, exactly so many: what each unit gave to it."""
    kind, missing = parse_validation(validation)
    held_out = [HeldOut()] * len(units)
    if kind != "first":
        return held_out
    documents, text_bytes = [], 0
    for index, (s, u) in enumerate(units):
        for position, text in enumerate(sources[s].documents(sources[s].units()[u])):
            ids = tokenizer.encode_documents([text])[0] if text.strip() else np.empty(0, np.int64)
            part = ids[: int(missing)]
            missing -= len(part)
            documents += [part] if len(part) else []
            whole = len(part) == len(ids)
            text_bytes += len((text if whole else tokenizer.decode(part[1:])).encode())
            held_out[index] = HeldOut(position + 1) if whole else HeldOut(position, len(part))
            if not missing:
                break
        if not missing:
            break
    dtype = token_dtype(tokenizer.vocabulary_size)
    write_shard(folder, "validation-first", documents, dtype=dtype, text_bytes=text_bytes)
    return held_out
