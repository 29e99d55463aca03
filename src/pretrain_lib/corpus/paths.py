"""Open one path of a run's data and check its ids against the model's vocabulary."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_lib.config.settings import DataConfig
from pretrain_lib.data.prepare.holdout import parse_validation
from pretrain_lib.data.prepare.job import TOKENIZER_FOLDER, load_prepared_tokenizer
from pretrain_lib.data.prepare.spool import Spool
from pretrain_lib.data.text.tokenizer import Tokenizer, load_tokenizer
from pretrain_lib.data.tokens.arrays import ASSUMED, TokenArray, TokenFile, open_split
from pretrain_lib.data.tokens.foreign import (
    check_dtype,
    fingerprint_array,
    is_foreign,
    names_tokens,
    open_array,
    refuse_litdata_folder,
)
from pretrain_lib.data.tokens.headerless import IdType
from pretrain_lib.data.tokens.places import Place, open_place
from pretrain_lib.data.tokens.shards import read_manifest
from pretrain_lib.data.windows.best_fit import BestFitPlan
from pretrain_lib.wording import plural

SCANNED_TOKENS, SCAN_STEP = 2**30, 2**24  # limit on the foreign ids checked at startup, and chunk
SCANNED_REMOTELY = 2**24  # the same of files behind a URL


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
    """Identifies the data and how they are cut: segments of a stream, the ends of documents."""
    identity: str
    """Identifies the data however they are cut."""
    dtype: str
    plans: tuple[BestFitPlan, ...] | None = None
    spool: Spool | None = None


def open_path(path: Place, data: DataConfig, vocabulary_size: int) -> Corpus:
    """Open a prepared folder or a foreign token array."""
    if is_foreign(path):
        return _open_array(path, data, vocabulary_size)
    refuse_litdata_folder(path)
    return _open_prepared(path, data, vocabulary_size)


def _open_prepared(folder: Place, data: DataConfig, vocabulary_size: int) -> Corpus:
    manifest = read_manifest(folder)
    tokenizer = load_prepared_tokenizer(folder, manifest)
    if data.tokenizer and load_tokenizer(data.tokenizer).sha256 != manifest["tokenizer_sha256"]:
        raise ValueError(
            f"data.tokenizer={data.tokenizer} is not the tokenizer that data.path={folder} was "
            f"prepared with ({folder / TOKENIZER_FOLDER}); omit data.tokenizer, or prepare the "
            f"text again"
        )
    train = manifest["splits"]["train"]
    if not train["tokens"]:
        raise ValueError(
            f"data.path={folder} is the spool of a stream, which is read with data.streaming=true "
            f"alone; give a prepared folder"
        )
    check_ids(train["highest_id"], manifest["vocabulary_size"], vocabulary_size, folder)
    return Corpus(
        name=f"{', '.join(manifest['sources'])} in {folder}",
        train=(open_split(folder, "train"),),
        validation=open_validation(folder, data, manifest, vocabulary_size),
        tokenizer=tokenizer,
        fingerprint=manifest["fingerprint"],
        identity=manifest["fingerprint"],
        dtype=np.dtype(manifest["dtype"]).name,
    )


def open_validation(
    folder: Place, data: DataConfig, manifest: dict, vocabulary_size: int
) -> tuple[HeldOut, ...]:
    """Open the held-out set of a prepared folder, or the one that `data.validation` names."""
    if names_tokens(data.validation):
        path = open_place(data.validation, cache_gib=data.remote_cache_gib)
        sha256 = manifest["tokenizer_sha256"]
        return (_open_validation_path(path, data, sha256, vocabulary_size),)
    wanted, rule = parse_validation(data.validation), manifest["validation"]
    if wanted[0] == "none":
        return ()
    if wanted != parse_validation(rule) and data.source is not None:
        raise ValueError(
            f"data.validation={data.validation}, but data.path={folder} was prepared with {rule}; "
            f"set data.validation={rule}, or give another folder"
        )
    if not manifest["splits"]["validation"]["tokens"]:
        documents = plural(manifest["splits"]["train"]["documents"], "document")
        none = "" if rule == "none" else f", which held out none of {documents}"
        raise ValueError(
            f"data.path={folder} has no validation text: it was prepared with {rule}{none}; set "
            f"data.validation=none to train without, or to the path of other tokens, or prepare "
            f"the text into another folder with first:TOKENS of the source"
        )
    return (HeldOut(folder.name, open_split(folder, "validation"), rule),)


def check_together(corpus: Corpus, data: DataConfig) -> None:
    """Raise ValueError if held-out text is trained on, or if `data.dtype` is of no file."""
    held_out = [text.tokens for text in corpus.validation]
    trained = {_resolve(file.path) for file in _files(corpus.train)}
    for file in _files(held_out):
        if _resolve(file.path) in trained:
            raise ValueError(
                f"data.validation: {file.path.parent if file.is_shard else file.path} is the text "
                f"that is trained on (data.path): give other tokens there or here, or "
                f"data.validation=none"
            )
    check_dtype([*corpus.train, *held_out], data.dtype)


def _files(arrays: Iterable[TokenArray]) -> list[TokenFile]:
    return [file for tokens in arrays for file in tokens.files]


def _resolve(path: Place) -> Place:
    return path.resolve() if isinstance(path, Path) else path


def _open_validation_path(
    path: Place, data: DataConfig, tokenizer_sha256: str | None, vocabulary_size: int
) -> HeldOut:
    """Open a token array, or the held-out set of a prepared folder, all of it if it has none."""
    if is_foreign(path):
        tokens = open_array(path, vocabulary_size=vocabulary_size, dtype=data.dtype)
        _check_array(tokens, data.dtype, vocabulary_size, path)
        return HeldOut(path.name, tokens, str(path))
    refuse_litdata_folder(path, setting="data.validation")
    manifest = read_manifest(path)
    if tokenizer_sha256 not in (None, manifest["tokenizer_sha256"]):
        raise ValueError(
            f"data.validation={path} was prepared with another tokenizer than data.path; prepare "
            f"it with the tokenizer folder of data.path"
        )
    check_ids(manifest["vocabulary_size"] - 1, None, vocabulary_size, path)
    split = "validation"
    if not manifest["splits"][split]["tokens"]:
        split = "train"
    return HeldOut(path.name, open_split(path, split), f"{split} of {path}")


def _open_array(path: Place, data: DataConfig, vocabulary_size: int) -> Corpus:
    train = open_array(path, vocabulary_size=vocabulary_size, dtype=data.dtype)
    if not names_tokens(data.validation) and data.validation != "none":
        parse_validation(data.validation)  # raises for what is no rule, such as a mistyped path
        raise ValueError(
            f"data.validation={data.validation} cannot hold out text of data.path={path}, which is "
            f"a token array: set data.validation=PATH of another array (.npy, .bin, .ds) or "
            f"prepared folder, or data.validation=none"
        )
    _check_array(train, data.dtype, vocabulary_size, path)
    if train.has_mask and not any(train.iterate_counted()):
        raise ValueError(
            f"data.path={path}: its loss mask (.ds.loss) leaves out every token, so there is "
            f"nothing to train on; write the mask again, or remove it to count every token"
        )
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    validation = ()
    if data.validation != "none":
        held_out = open_place(data.validation, cache_gib=data.remote_cache_gib)
        sha256 = tokenizer and tokenizer.sha256
        validation = (_open_validation_path(held_out, data, sha256, vocabulary_size),)
    fingerprint, identity = fingerprint_array(train, with_ends=_uses_ends(data))
    return Corpus(
        name=str(path),
        train=(train,),
        validation=validation,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        identity=identity,
        dtype=train.files[0].dtype.name,
    )


def check_ids(
    worst: int, tokenizer_size: int | None, vocabulary_size: int, path: Place, *, doubt: str = ""
) -> None:
    """Raise ValueError if an id or the tokenizer does not fit the model's vocabulary.

    `doubt` says why the ids may not be those that were written.
    """
    needed = max(worst + 1, tokenizer_size or 0)
    if needed > vocabulary_size:
        raise ValueError(
            f"model.vocabulary_size={vocabulary_size} is too small for {path}: its ids go up to "
            f"{worst}"
            + (f", its tokenizer has {tokenizer_size}" if tokenizer_size else "")
            + f"; {doubt}set model.vocabulary_size={needed} or more"
        )


def _check_array(
    tokens: TokenArray, dtype: IdType | None, vocabulary_size: int, path: Place
) -> None:
    """Raise ValueError if the model lacks an id of an array."""
    lowest, highest = _id_range(tokens)
    advice = f"if data.dtype={dtype} is not their type, give the one that is; otherwise "
    doubt = advice if dtype in {file.dtype.name for file in tokens.files} else ""
    if lowest < 0:
        raise ValueError(
            f"{path}: its ids go down to {lowest}, but no id is below 0; {doubt}write them again, "
            f"without marks such as -100"
        )
    if tokens.is_assumed:
        doubt = (
            f"they are {ASSUMED}: if their type is another, give it by data.dtype, if their byte "
            f"order is, write them as little-endian; otherwise "
        )
    check_ids(highest, None, vocabulary_size, path, doubt=doubt)


def _id_range(tokens: TokenArray) -> tuple[int, int]:
    """Return the lowest and highest of the first ids; reads check all of them."""
    lowest, highest, scanned = 2**63 - 1, -1, 0
    limit = SCANNED_TOKENS if isinstance(tokens.files[0].path, Path) else SCANNED_REMOTELY
    for file, start in ((f, s) for f in tokens.files for s in range(0, f.num_tokens, SCAN_STEP)):
        if scanned >= limit:
            break
        ids = file.read(start, min(SCAN_STEP, file.num_tokens - start))
        lowest, highest = min(lowest, int(ids.min())), max(highest, int(ids.max()))
        scanned += len(ids)
    return lowest, highest


def _uses_ends(data: DataConfig) -> bool:
    """Return whether the windows of a run depend on where documents end."""
    return data.document_masking or data.packing != "concat" or data.shuffle == "documents"
