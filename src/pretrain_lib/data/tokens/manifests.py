"""The manifest of a prepared folder as a file: it carries a hash of itself, checked on reading."""

import hashlib
import re
from pathlib import Path
from typing import Any

from pretrain_lib.files.reading import read_object
from pretrain_lib.files.writes import json_bytes

FORMAT_VERSION = 2
MASKED_VERSION = 3  # of manifests with loss masks, which older readers would ignore
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
JOB = "job.json"  # what a folder is prepared from; written first
OWN_HASH = "manifest_sha256"  # the last field: the hash of the file with zeros in this place
FILES = "files"  # the hashes of further files; manifests with it have `OWN_HASH` as well
DTYPES = ("<u2", "<u4")
ZEROS = "0" * 64
LAST_FIELD = re.compile(rf'"{OWN_HASH}": "([0-9a-f]{{64}})"\n}}\n\Z'.encode())
SPLITS = ("train", "validation")
# The kinds of the fields that runs depend on, in the manifest, in a split and in a shard.
FIELDS = {
    "sources": list,
    "validation": str,
    "dtype": str,
    "tokenizer_sha256": str,
    "tokenizer_files": dict,
    "vocabulary_size": int,
    "splits": dict,
    "fingerprint": str,
}
SPLIT_FIELDS = {"tokens": int, "documents": int, "shards": list}
SHARD_FIELDS = dict.fromkeys(("name", "sha256", "ends_sha256", "json_sha256"), str)
SHARD_FIELDS |= {"tokens": int, "documents": int}
REMEDY = "restore the file, or prepare the data again, into another folder"


class Unprepared(ValueError):
    """A folder that is not a prepared one."""


def manifest_bytes(manifest: dict) -> bytes:
    """Return the content of `manifest.json`, with its own hash as the last field."""
    blank = json_bytes({**manifest, OWN_HASH: ZEROS})
    digest = hashlib.sha256(blank).hexdigest()
    return LAST_FIELD.sub(f'"{OWN_HASH}": "{digest}"\n}}\n'.encode(), blank)


def parse_manifest(path: Path) -> dict:
    """Return the content of a `manifest.json`; raises ValueError, naming it, if it is damaged.

    Raises Unprepared for the manifest of a run. Manifests of earlier versions have no hash of their
    own: of those the structure is checked.
    """
    raw, manifest = path.read_bytes(), read_object(path, remedy=REMEDY)
    if "run_id" in manifest:
        raise Unprepared(
            f"data.path={path.parent} is the folder of a run, not of prepared data; give the one "
            f"that `pretrain prepare` has written"
        )
    field = LAST_FIELD.search(raw)
    if field is not None:
        blank = raw[: field.start(1)] + ZEROS.encode() + raw[field.end(1) :]
        is_whole = hashlib.sha256(blank).hexdigest().encode() == field[1]
    else:
        is_whole = FILES not in manifest and OWN_HASH not in manifest
    if not is_whole:
        raise ValueError(f"{path} is damaged: its bytes differ from its own hash; {REMEDY}")
    if manifest.get("format_version") not in (FORMAT_VERSION, MASKED_VERSION):
        raise ValueError(
            f"{path}: format_version={manifest.get('format_version')} is not supported, this "
            f"version reads {FORMAT_VERSION} and {MASKED_VERSION}; prepare the data again, into "
            f"another folder"
        )
    if (problem := _find_problem(manifest)) is not None:
        raise ValueError(f"{path} is damaged: {problem}; {REMEDY}")
    return manifest


def _find_problem(manifest: dict) -> str | None:
    """Return what is wrong with the fields of a manifest, None if nothing."""
    if (wrong := _wrong_field(manifest, FIELDS)) is not None:
        return wrong
    texts = (*manifest["sources"], *manifest["tokenizer_files"].values())
    if not all(isinstance(text, str) for text in texts):
        return "sources and tokenizer_files must hold text"
    if manifest["dtype"] not in DTYPES:
        return f"dtype={manifest['dtype']} must be {' or '.join(DTYPES)}"
    for split in SPLITS:
        entry = manifest["splits"].get(split)
        if (wrong := _wrong_field(entry, SPLIT_FIELDS)) is not None:
            return f"splits.{split}: {wrong}"
        ids = (entry.get("lowest_id"), entry.get("highest_id"))
        if not all(isinstance(number, int if entry["tokens"] else int | None) for number in ids):
            return f"splits.{split}: lowest_id and highest_id must be whole numbers"
        for shard in entry["shards"]:
            if (wrong := _wrong_field(shard, SHARD_FIELDS)) is not None:
                return f"a shard of {split}: {wrong}"
        if entry["tokens"] != sum(shard["tokens"] for shard in entry["shards"]):
            return f"splits.{split}.tokens={entry['tokens']} is not the sum of its shards"
    return None


def _wrong_field(entry: Any, fields: dict[str, type]) -> str | None:
    if not isinstance(entry, dict):
        return "it must be an object"
    for name, kind in fields.items():
        if not isinstance(entry.get(name), kind) or (kind is int and entry[name] < 0):
            return f"{name}={entry.get(name)!r} must be of type {kind.__name__}"
    return None
