"""Open one path of a run's data and check its ids against the model's vocabulary."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_lib.config.settings import DataConfig
from pretrain_lib.data.prepare.holdout import parse_validation
from pretrain_lib.data.prepare.job import TOKENIZER_FOLDER
from pretrain_lib.data.prepare.spool import Spool
from pretrain_lib.data.text.tokenizer import Tokenizer, load_tokenizer
from pretrain_lib.data.tokens.arrays import TokenArray, open_split
from pretrain_lib.data.tokens.foreign import is_foreign, names_tokens, open_foreign
from pretrain_lib.data.tokens.shards import read_manifest
from pretrain_lib.data.windows.best_fit import BestFitPlan
from pretrain_lib.wording import plural

SCANNED_TOKENS, SCAN_STEP = 2**30, 2**24  # limit on the foreign ids checked at startup, and chunk


@dataclass(frozen=True)
class HeldOut:
    """A held-out set for validation."""

    name: str
    """The name of its path, which identifies it in the metrics of a run."""
    tokens: TokenArray
    rule: str
    """How it was chosen: hash:SHARE, first:TOKENS, or a path."""
    weight: float = 1.0
    """Its share of the tokens read at a validation, relative to the other held-out sets."""


@dataclass(frozen=True)
class Corpus:
    """The data of a run: training and validation tokens, with their tokenizer."""

    name: str
    train: tuple[TokenArray, ...]
    """One per path; empty with streaming."""
    validation: tuple[HeldOut, ...]
    """One per path with a held-out set; empty without validation."""
    tokenizer: Tokenizer | None
    fingerprint: str
    id_range: tuple[int, int]
    dtype: str
    plans: tuple[BestFitPlan, ...] | None = None
    spool: Spool | None = None


def open_path(path: Path, data: DataConfig, vocabulary_size: int) -> Corpus:
    """Open a prepared folder or a foreign token array."""
    if is_foreign(path):
        return _open_array(path, data, vocabulary_size)
    return _open_prepared(path, data, vocabulary_size)


def _open_prepared(folder: Path, data: DataConfig, vocabulary_size: int) -> Corpus:
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    if data.tokenizer and load_tokenizer(data.tokenizer).sha256 != manifest["tokenizer_sha256"]:
        raise ValueError(
            f"data.tokenizer={data.tokenizer} is not the tokenizer that data.path={folder} was "
            f"prepared with ({folder / TOKENIZER_FOLDER}); omit data.tokenizer, or prepare the "
            f"text again"
        )
    train = manifest["splits"]["train"]
    check_ids(train["highest_id"], manifest["vocabulary_size"], vocabulary_size, folder)
    return Corpus(
        name=f"{', '.join(manifest['sources'])} in {folder}",
        train=(open_split(folder, "train"),),
        validation=open_validation(folder, data, manifest, vocabulary_size),
        tokenizer=tokenizer,
        fingerprint=manifest["fingerprint"],
        id_range=(train["lowest_id"], train["highest_id"]),
        dtype=np.dtype(manifest["dtype"]).name,
    )


def open_validation(
    folder: Path, data: DataConfig, manifest: dict, vocabulary_size: int
) -> tuple[HeldOut, ...]:
    """Open the held-out set of a prepared folder, or the one that `data.validation` names."""
    if names_tokens(data.validation):
        path = Path(data.validation).expanduser()
        return (_open_validation_path(path, manifest["tokenizer_sha256"], vocabulary_size),)
    wanted, there = parse_validation(data.validation), manifest["validation"]
    if wanted[0] == "none":
        return ()
    if wanted != parse_validation(there) and data.source is not None:
        raise ValueError(
            f"data.validation={data.validation}, but data.path={folder} was prepared with {there}; "
            f"set data.validation={there}, or give another folder"
        )
    if not manifest["splits"]["validation"]["tokens"]:
        documents = plural(manifest["splits"]["train"]["documents"], "document")
        none = "" if there == "none" else f", which held out none of {documents}"
        raise ValueError(
            f"data.path={folder} has no validation text: it was prepared with {there}{none}; set "
            f"data.validation=none to train without, or prepare the text into another folder with "
            f"first:TOKENS of the source"
        )
    return (HeldOut(folder.name, open_split(folder, "validation"), there),)


def _open_validation_path(
    path: Path, tokenizer_sha256: str | None, vocabulary_size: int
) -> HeldOut:
    """Open a token array, or the held-out set of a prepared folder, all of it if it has none."""
    if is_foreign(path):
        tokens = open_foreign(path, vocabulary_size=vocabulary_size)
        lowest, highest = _id_range(tokens)
        check_ids(lowest if lowest < 0 else highest, None, vocabulary_size, path)
        return HeldOut(path.name, tokens, str(path))
    manifest = read_manifest(path)
    if tokenizer_sha256 not in (None, manifest["tokenizer_sha256"]):
        raise ValueError(
            f"data.validation={path} was prepared with another tokenizer than data.path; prepare "
            f"it with the tokenizer folder of data.path"
        )
    check_ids(manifest["vocabulary_size"] - 1, None, vocabulary_size, path)
    split = "validation" if manifest["splits"]["validation"]["tokens"] else "train"
    return HeldOut(path.name, open_split(path, split), f"{split} of {path}")


def _open_array(path: Path, data: DataConfig, vocabulary_size: int) -> Corpus:
    train = open_foreign(path, vocabulary_size=vocabulary_size)
    if not names_tokens(data.validation) and data.validation != "none":
        raise ValueError(
            f"data.validation={data.validation} cannot hold out text of data.path={path}, which is "
            f"a token array: set data.validation=PATH of another array (.npy, .bin, .ds) or "
            f"prepared folder, or data.validation=none"
        )
    lowest, highest = _id_range(train)
    check_ids(lowest if lowest < 0 else highest, None, vocabulary_size, path)
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    validation = ()
    if data.validation != "none":
        held_out, sha256 = Path(data.validation).expanduser(), tokenizer and tokenizer.sha256
        validation = (_open_validation_path(held_out, sha256, vocabulary_size),)
    return Corpus(
        name=str(path),
        train=(train,),
        validation=validation,
        tokenizer=tokenizer,
        fingerprint=_fingerprint(train),
        id_range=(lowest, highest),
        dtype=train.files[0].dtype.name,
    )


def check_ids(
    worst: int, tokenizer_size: int | None, vocabulary_size: int, path: Path | str
) -> None:
    """Raise ValueError if an id or the tokenizer does not fit the model's vocabulary."""
    needed = max(worst + 1, tokenizer_size or 0)
    if worst < 0 or needed > vocabulary_size:
        raise ValueError(
            f"model.vocabulary_size={vocabulary_size} is too small for {path}: its ids go "
            f"{'down' if worst < 0 else 'up'} to {worst}"
            + (f", its tokenizer has {tokenizer_size}" if tokenizer_size else "")
            + f"; set model.vocabulary_size={needed} or more"
        )


def _id_range(tokens: TokenArray) -> tuple[int, int]:
    """Return the lowest and highest of the first `SCANNED_TOKENS` ids; reads check all ids."""
    lowest, highest, scanned = 2**63 - 1, -1, 0
    for file, start in ((f, s) for f in tokens.files for s in range(0, f.num_tokens, SCAN_STEP)):
        if scanned >= SCANNED_TOKENS:
            break
        ids = file.read(start, min(SCAN_STEP, file.num_tokens - start))
        lowest, highest = min(lowest, int(ids.min())), max(highest, int(ids.max()))
        scanned += len(ids)
    return lowest, highest


def _fingerprint(tokens: TokenArray) -> str:
    """Return a hash of the file sizes and of 64 evenly spaced samples of each file."""
    stretch, digest = 2**16, hashlib.sha256()
    for file in tokens.files:
        size = file.path.stat().st_size
        digest.update(str(size).encode())
        with file.path.open("rb") as content:
            for i in range(64):
                content.seek(i * max(0, size - stretch) // 63)
                digest.update(content.read(stretch))
    return digest.hexdigest()
