"""Open the data of a run: prepared folders, foreign token arrays, or a source to prepare."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from pretrain_lib.config.derived_defaults import listed
from pretrain_lib.config.settings import DataConfig, Recipe
from pretrain_lib.corpus.autoprepare import (
    await_file,
    open_stream,
    prepare_source,
)
from pretrain_lib.corpus.paths import (
    Corpus,
    HeldOut,
    check_ids,
    check_together,
    open_path,
    open_validation,
)
from pretrain_lib.corpus.stretches import choose_stretches
from pretrain_lib.data.block_cache import cache_folder
from pretrain_lib.data.prepare.job import JOB, TOKENIZER_FOLDER
from pretrain_lib.data.remote import is_url
from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.data.tokens.foreign import is_foreign, names_tokens
from pretrain_lib.data.tokens.places import Place, open_place
from pretrain_lib.data.tokens.shards import read_manifest
from pretrain_lib.data.tokens.verify import check_tokenizer
from pretrain_lib.data.windows.batches import PackedDataset
from pretrain_lib.data.windows.best_fit import BestFitPlan, open_plan, plan_folder, plan_name
from pretrain_lib.data.windows.streaming import StreamingDataset
from pretrain_lib.files.reading import read_object
from pretrain_lib.models.any_model import check_pair
from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.ranks import is_local_main_rank, is_main_rank

SEGMENT_STEPS = 4  # minimum optimizer steps per stream segment, within which windows are shuffled
SPOOL_FOLDER = "spool"  # default spool of a stream, within the run folder


def open_corpus(config: Recipe) -> Corpus:
    """Open the data that `config.data` names, preparing its source first if necessary.

    Must be called before the process group is initialized: rank 0 prepares the data while the other
    ranks wait for it. Raises ValueError for data that is missing, does not fit the model, or is too
    short for the batch or the validation, and for a tokenizer that does not go with the model.
    """
    data = config.data
    is_named = data.source is not None and data.tokenizer is not None
    if is_named and isinstance(config.model, CausalLMConfig) and is_main_rank():
        check_pair(config.model, load_tokenizer(data.tokenizer))  # before the text is prepared
    corpus = _open_stream(config) if data.streaming else _open_paths(config)
    check_pair(config.model, corpus.tokenizer)
    length = config.batch.sequence_length
    if corpus.spool is None:
        build_dataset(config, corpus)
    choose_stretches(corpus.validation, length, max_tokens=config.validation.tokens)
    return corpus


def build_dataset(
    config: Recipe, corpus: Corpus, *, first_window: int = 0, cursor: dict | None = None
) -> PackedDataset | StreamingDataset:
    """Return the windows of a run; a stream starts at `first_window`, found by `cursor` if any."""
    data = config.data
    shared = {
        "sequence_length": config.batch.sequence_length,
        "seed": config.run.seed,
        "document_masking": data.document_masking,
    }
    if corpus.spool is None:
        return PackedDataset(
            corpus.train,
            weights=data.weights,
            plans=corpus.plans,
            shuffle=data.shuffle,
            **shared,
        )
    return StreamingDataset(
        corpus.spool,
        first_window=first_window,
        cursor=cursor,
        produces=is_local_main_rank(),
        workers=data.workers,
        **shared,
    )


def _open_paths(config: Recipe) -> Corpus:
    data, vocabulary_size = config.data, config.model.vocabulary_size
    paths = listed(data.path)
    if data.source is None and not paths:
        raise ValueError("data.source or data.path must be given: there is nothing to train on")
    if data.source is not None and len(paths) > 1:
        raise ValueError(
            f"data.path={paths} must be a single folder into which data.source={data.source} is "
            f"prepared; to read a mixture of folders, set data.source=null"
        )
    if data.source is not None and not (paths and is_foreign(paths[0])):
        if paths and is_url(paths[0]):
            raise ValueError(
                f"data.path={paths[0]}: text is prepared on a local disk only; give a local folder "
                f"for data.source={data.source}, or set data.source=null to read what is there"
            )
        path = Path(paths[0]).expanduser() if paths else None
        paths = [str(prepare_source(data, path))]
    places = [open_place(path, cache_gib=data.remote_cache_gib) for path in paths]
    parts = [open_path(place, data, vocabulary_size) for place in places]
    corpus = _join(parts, data)
    check_together(corpus, data)
    if data.packing == "best_fit":
        plans = (_open_plan(p, part, config) for p, part in zip(places, parts, strict=True))
        return replace(corpus, plans=tuple(plans))
    return corpus


def _join(parts: list[Corpus], data: DataConfig) -> Corpus:
    """Combine several corpora into one mixture."""
    if len(parts) == 1:
        return parts[0]
    tokenizers = {part.tokenizer.sha256: part for part in parts if part.tokenizer is not None}
    if len(tokenizers) > 1:
        names = " and ".join(part.name for part in tokenizers.values())
        raise ValueError(
            f"data.path: {names} were prepared with different tokenizers; prepare all with the same"
        )
    return Corpus(
        name=" + ".join(part.name for part in parts),
        train=tuple(tokens for part in parts for tokens in part.train),
        validation=_join_validation(parts, data),
        tokenizer=next((part.tokenizer for part in tokenizers.values()), None),
        fingerprint=_hash([part.fingerprint for part in parts]),
        identity=_hash([part.identity for part in parts]),
        dtype=", ".join(sorted({part.dtype for part in parts})),
    )


def _hash(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _join_validation(parts: list[Corpus], data: DataConfig) -> tuple[HeldOut, ...]:
    """Return the held-out sets of all parts, weighted by the mixture weights."""
    if names_tokens(data.validation):
        return parts[0].validation  # the same for all parts
    weights = data.weights or [sum(map(len, part.train)) for part in parts]
    joined, names = [], set()
    for part, weight in zip(parts, weights, strict=True):
        for held_out in part.validation:
            name, number = held_out.name, 2
            while name in names:
                name, number = f"{held_out.name}-{number}", number + 1
            names.add(name)
            joined.append(replace(held_out, name=name, weight=weight))
    return tuple(joined)


def _open_plan(path: Place, part: Corpus, config: Recipe) -> BestFitPlan:
    """Open the best-fit packing plan of a path; one process makes it if there is none.

    That is rank 0, or one process per machine where plans are in the machine's own cache.
    """
    (tokens,), length = part.train, config.batch.sequence_length
    if not tokens.has_documents:
        raise ValueError(
            f"data.packing=best_fit needs document ends, which {path} does not have; prepare the "
            f"text with `pretrain prepare`"
        )
    folder = plan_folder(path)
    is_cached = folder.parent == cache_folder()
    if not (is_local_main_rank() if is_cached else is_main_rank()):
        await_file(folder / plan_name(part.fingerprint, length), folder)
    return open_plan(
        tokens.iterate_ends,
        len(tokens),
        folder,
        fingerprint=part.fingerprint,
        sequence_length=length,
    )


def _open_stream(config: Recipe) -> Corpus:
    """Open a source that is tokenized during training."""
    data, path = config.data, config.data.path
    defaults = (data.packing, data.shuffle) == ("concat", "windows")
    if data.source is None or not defaults or data.weights or isinstance(path, list):
        raise ValueError(
            "data.streaming=true needs a data.source (or a list, read one after the other), at "
            "most one data.path, data.packing=concat, data.shuffle=windows and no data.weights"
        )
    if data.spool_tokens < SEGMENT_STEPS * config.batch.tokens:
        raise ValueError(
            f"data.spool_tokens={data.spool_tokens} must be at least {SEGMENT_STEPS} x "
            f"batch.tokens={config.batch.tokens}: windows are shuffled within a segment of that "
            f"many tokens"
        )
    folder = Path(path).expanduser() if path else Path(config.run.dir) / SPOOL_FOLDER
    spool = open_stream(data, folder, config.batch.sequence_length)
    manifest, vocabulary_size = read_manifest(folder), config.model.vocabulary_size
    check_tokenizer(folder, manifest)
    check_ids(manifest["vocabulary_size"] - 1, None, vocabulary_size, folder)
    names = ", ".join(manifest["sources"])
    job = read_object(folder / JOB)
    del job["segment_tokens"]
    corpus = Corpus(
        name=f"{names}, streamed and shuffled within {spool.segment_tokens:,} tokens at a time",
        train=(),
        validation=open_validation(folder, data, manifest, vocabulary_size),
        tokenizer=load_tokenizer(folder / TOKENIZER_FOLDER),
        fingerprint=manifest["fingerprint"],
        identity=_hash([job, manifest["tokenizer_sha256"]]),
        dtype=np.dtype(manifest["dtype"]).name,
        spool=spool,
    )
    check_together(corpus, data)
    return corpus
