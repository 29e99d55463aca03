"""Verify every file of a prepared folder by the hashes in its manifest."""

import hashlib
from pathlib import Path

from pretrain_lib.data.remote import Unreachable
from pretrain_lib.data.tokens.manifests import (
    FILES,
    MANIFEST,
    TOKENIZER_FOLDER,
    Unprepared,
    parse_manifest,
)
from pretrain_lib.data.tokens.places import Place
from pretrain_lib.data.tokens.shards import MASK_HASHES, SHARD_HASHES, read_manifest


def verify_folder(folder: Path | str) -> list[str]:
    """Verify every hash of a prepared folder; return one line per missing or damaged file.

    Raises ValueError for a folder without a manifest, and for that of a run.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except Unprepared:
        raise
    except ValueError as error:
        return [str(error)]
    problems = {name: _problem(folder / name, sha) for name, sha in _expected(manifest).items()}
    return [f"{folder / name}: {problem}" for name, problem in problems.items() if problem]


def has_own_hash(folder: Path) -> bool:
    """Return whether the manifest has hashes of itself and of all files beside the shards."""
    return FILES in parse_manifest(folder / MANIFEST)


def check_tokenizer(folder: Place, manifest: dict) -> None:
    """Raise ValueError if the tokenizer of a prepared folder is not that of its manifest."""
    for name, sha256 in manifest["tokenizer_files"].items():
        path = folder / TOKENIZER_FOLDER / Path(name).name
        if problem := _problem(path, sha256):
            raise ValueError(
                f"{path}: {problem}: the tokens were made by another tokenizer; restore the file, "
                f"or prepare the data again"
            )


def _expected(manifest: dict) -> dict[str, str]:
    """Return the sha256 of each file by its name, which cannot leave the folder."""
    files = {
        f"{TOKENIZER_FOLDER}/{Path(n).name}": s for n, s in manifest["tokenizer_files"].items()
    }
    files |= {Path(name).name: sha256 for name, sha256 in manifest.get(FILES, {}).items()}
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            name = Path(shard["name"]).name
            hashes = SHARD_HASHES | (MASK_HASHES if "loss_sha256" in shard else {})
            files |= {f"{name}{suffix}": shard[key] for suffix, key in hashes.items()}
    return files


def _problem(path: Place, sha256: str) -> str | None:
    """Return what is wrong with a file, None if it has the hash."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except Unreachable:
        raise
    except ValueError:  # a null byte in the name, or nothing behind a URL
        return "missing"
    return None if digest == sha256 else "its bytes differ from the manifest's hash"
