"""Describe prepared folders and token arrays, and how a run would read them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_lib.data.prepare.job import load_prepared_tokenizer
from pretrain_lib.data.prepare.left_out import describe_left_out
from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.data.tokens.arrays import TokenArray, open_split
from pretrain_lib.data.tokens.foreign import (
    check_dtype,
    fingerprint_array,
    is_foreign,
    open_array,
    refuse_litdata_folder,
)
from pretrain_lib.data.tokens.headerless import IdType
from pretrain_lib.data.tokens.manifests import JOB
from pretrain_lib.data.tokens.places import Place, open_place
from pretrain_lib.data.tokens.shards import read_manifest
from pretrain_lib.data.windows.batches import PackedDataset
from pretrain_lib.data.windows.best_fit import BestFitPlan, open_plan, plan_folder
from pretrain_lib.data.windows.shuffled import Shuffle
from pretrain_lib.files.reading import read_object
from pretrain_lib.wording import plural

QUANTILES = {0: "min", 0.1: "10 %", 0.5: "median", 0.9: "90 %", 1: "max"}


@dataclass(frozen=True)
class Inspected:
    """The tokens of one path, with the manifest and tokenizer if there are any."""

    path: Place
    train: TokenArray
    manifest: dict | None  # of a prepared folder
    tokenizer: Tokenizer | None


def inspect_data(
    paths: Sequence[str | Path],
    *,
    sequence_length: int,
    window: int,
    seed: int = 0,
    packing: str = "concat",
    shuffle: Shuffle = "windows",
    dtype: IdType | None = None,
    weights: Sequence[float] | None = None,
    planned_tokens: int | None = None,
) -> Iterator[str]:
    """Yield the lines of `pretrain inspect`.

    They describe the content of each path, how much packing cuts and pads, the epochs of a run that
    reads `planned_tokens` tokens, and the decoded window number `window`; with a stream's spool
    among the paths the content alone. `dtype` is the type of ids in arrays without a header.
    """
    opened = [_open(open_place(path), dtype) for path in paths]
    check_dtype([one.train for one in opened], dtype)
    if any(map(_is_spool, opened)):
        for one in opened:
            yield from _describe(one)
        return
    plans = None
    for one in opened:
        yield from _describe(one)
        if packing == "concat" or len(one.train) > sequence_length:
            yield from _describe_concat(one, sequence_length, seed)
    if packing == "best_fit":
        plans = [_plan(one, sequence_length) for one in opened]
        for plan in plans:
            report = plan.report
            yield (
                f"best_fit    {plural(report.windows, 'window')} of {sequence_length:,}: "
                f"{report.padded_share:.2%} padded, {report.cut_share:.1%} of the documents are "
                f"longer than a window and cut"
            )
    dataset = PackedDataset(
        [one.train for one in opened],
        sequence_length=sequence_length,
        seed=seed,
        weights=weights,
        document_masking=all(one.train.has_documents for one in opened),
        plans=plans,
        shuffle=shuffle,
    )
    if planned_tokens is not None:
        yield from _describe_run(opened, dataset, planned_tokens // sequence_length)
    yield from _show_window(opened, dataset, window)


def _open(path: Place, dtype: IdType | None) -> Inspected:
    if is_foreign(path):
        return Inspected(path, open_array(path, vocabulary_size=None, dtype=dtype), None, None)
    refuse_litdata_folder(path)
    manifest = read_manifest(path)
    tokenizer = load_prepared_tokenizer(path, manifest)
    return Inspected(path, open_split(path, "train"), manifest, tokenizer)


def _plan(one: Inspected, sequence_length: int) -> BestFitPlan:
    if not one.train.has_documents:
        raise ValueError(
            f"--packing best_fit needs document ends, which {one.path} does not have; prepare the "
            f"text with `pretrain prepare`"
        )
    fingerprint = one.manifest["fingerprint"] if one.manifest else None
    return open_plan(
        one.train.iterate_ends,
        len(one.train),
        plan_folder(one.path),
        fingerprint=fingerprint or fingerprint_array(one.train, with_ends=True)[0],
        sequence_length=sequence_length,
    )


def _describe(one: Inspected) -> Iterator[str]:
    """Yield the content of a path: sources, tokens, splits, rejected documents."""
    yield f"path        {one.path}"
    if one.manifest is None:
        dtypes = ", ".join(sorted({file.dtype.name for file in one.train.files}))
        files = plural(len(one.train.files), "file")
        yield f"train       {plural(len(one.train), 'token')} in {files}, {dtypes}"
        yield from _describe_documents(one.train)
        yield from _describe_mask(one.train)
        return
    manifest = one.manifest
    yield f"sources     {', '.join(manifest['sources'])}"
    yield (
        f"tokens      {np.dtype(manifest['dtype']).name}, vocabulary "
        f"{manifest['vocabulary_size']:,}, encoded by {manifest['encoder']}"
    )
    for split, totals in manifest["splits"].items():
        if totals["tokens"]:
            yield (
                f"{split:<12}{plural(totals['tokens'], 'token')}, "
                f"{plural(totals['text_bytes'], 'byte')} of text, "
                f"{plural(totals['documents'], 'document')}"
            )
            tokens = open_split(one.path, split)
            yield from _describe_documents(tokens)
            yield from _describe_mask(tokens)
    yield from describe_left_out(manifest["left_out"])
    if _is_spool(one):
        segments = len(list(one.path.glob("segment-*.json")))
        tokens = read_object(one.path / JOB)["segment_tokens"]
        yield (
            f"spool       {plural(segments, 'segment')} of {tokens:,} tokens of a stream, which a "
            f"run writes ahead of its steps"
        )


def _is_spool(one: Inspected) -> bool:
    return one.manifest is not None and not one.manifest["splits"]["train"]["tokens"]


def _describe_mask(tokens: TokenArray) -> Iterator[str]:
    if tokens.has_mask:
        counted = sum(tokens.iterate_counted())
        share = counted / len(tokens)
        yield f"            {plural(counted, 'token')} ({share:.2%}) count, by the loss mask"


def _describe_documents(tokens: TokenArray) -> Iterator[str]:
    if not tokens.has_documents:
        yield "            where documents end is not known"
        return
    ends = np.concatenate([np.zeros(1, dtype=np.int64), *tokens.iterate_ends()])
    if len(ends) > 1:
        values = np.quantile(np.diff(ends), list(QUANTILES))
        text = ", ".join(
            f"{name} {value:,.0f}" for name, value in zip(QUANTILES.values(), values, strict=True)
        )
        yield f"            tokens per document: {text}"


def _describe_concat(one: Inspected, sequence_length: int, seed: int) -> Iterator[str]:
    """Yield the number of windows per epoch, and the share of documents that their edges cut."""
    order = PackedDataset(one.train, sequence_length=sequence_length, seed=seed).order
    windows = order.windows_per_epoch(0)
    unread = 1 - windows * sequence_length / len(one.train)
    yield (
        f"concat      {plural(windows, 'window')} of {sequence_length:,} an epoch: nothing is "
        f"padded, {unread:.2%} of the tokens are left over (others every epoch)"
    )
    if one.train.has_documents:
        share = _cut_share(one.train, order.offset(0, 0), sequence_length)
        yield f"            {share:.1%} of the documents are cut by the edge of a window"


def _cut_share(tokens: TokenArray, first: int, sequence_length: int) -> float:
    """Return the share of documents that span two windows, if windows start at token `first`."""
    cut = documents = start = 0
    for ends in tokens.iterate_ends():
        starts = np.concatenate([[start], ends[:-1]])[: len(ends)]
        whole = (starts - first) // sequence_length == (ends - 1 - first) // sequence_length
        whole |= starts == ends
        cut, documents = cut + int(np.sum(~whole)), documents + len(ends)
        start = int(ends[-1]) if len(ends) else start
    return cut / max(documents, 1)


def _describe_run(
    opened: Sequence[Inspected], dataset: PackedDataset, windows: int
) -> Iterator[str]:
    yield f"run         {plural(windows, 'window')} = {windows * dataset.sequence_length:,} tokens"
    epochs = dataset.order.planned_epochs(windows)
    for number, (one, passes) in enumerate(zip(opened, epochs, strict=True)):
        share = passes * dataset.order.windows_per_epoch(number) / max(windows, 1)
        yield f"            {share:.1%} of them from {one.path}: {passes:.2f} epochs"


def _show_window(opened: Sequence[Inspected], dataset: PackedDataset, number: int) -> Iterator[str]:
    """Yield one window of the run, decoded if there is a tokenizer, split at document ends."""
    source = int(dataset.order.locate(np.array([number]))[0][0])
    window, length = dataset[number], dataset.sequence_length
    yield f"\nwindow {number} of seed {dataset.order.seed}, {length} tokens, {opened[source].path}:"
    ends = window["document_ends"].tolist() if dataset.document_masking else []
    start = 0
    for end in sorted({*ends, length}):
        ids = window["input_ids"][start:end].tolist()
        padded = dataset.plans is not None and start and end == length and not any(ids)
        yield f"--- tokens {start} to {end}{': padding' if padded else ''}"
        tokenizer = opened[source].tokenizer
        if not padded:
            yield tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
        start = end
