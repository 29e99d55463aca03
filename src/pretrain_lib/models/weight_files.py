"""The weight files of a Hugging Face model folder: one file, or shards with an index."""

import filecmp
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pretrain_lib.files.reading import parse_json
from pretrain_lib.files.writes import STAGING, flush, flush_to_disk, make_folder
from pretrain_lib.tensors.files import DTYPES, write_tensors
from pretrain_lib.wording import in_line

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARDS = "model-[0-9]*-of-[0-9]*.safetensors"
WEIGHT_DTYPES = [dtype for dtype in DTYPES if dtype.is_floating_point]
HEAD, EMBEDDINGS = "lm_head.weight", ("wte.weight", "embed_tokens.weight")
TABLES = (HEAD, *EMBEDDINGS)  # what has a row for each token id, padded beyond the vocabulary


def split_by_size(sizes: dict[str, int], max_bytes: int | None) -> list[list[str]]:
    """Split tensor names into shards in order, filling each up to `max_bytes`."""
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and max_bytes is not None and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def weight_file(index: int, count: int) -> str:
    """Return the name of weight file `index` (from 0) of `count`."""
    if count == 1:
        return WEIGHTS
    return WEIGHTS.replace(".", f"-{index + 1:05d}-of-{count:05d}.")


def write_weights(
    path: Path, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype = torch.float32
) -> str:
    """Write tensors with the names and shapes of transformers; return the file's xxh3_128."""
    # transformers rejects a file whose metadata does not name the framework.
    return write_tensors(path, tensors, dtype=dtype, metadata={"format": "pt"})


def write_index(folder: Path, files: dict[str, str], *, total_bytes: int) -> None:
    """Write the index of sharded weights: the file that contains each tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    write_sorted_json(folder / INDEX, index)


def write_sorted_json(path: Path, value: dict) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def replacing_model(folder: Path) -> Iterator[Path]:
    """Yield a folder to write a model into; its files replace those of `folder` at the end.

    An error leaves `folder` as it was. So does a kill while the files are written, apart from a
    hidden folder that the next call removes.
    """
    make_folder(folder)
    new = folder / f".{STAGING}"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        flush_to_disk(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _move_model(new, folder)
    new.rmdir()
    flush(folder)


def _move_model(new: Path, folder: Path) -> None:
    """Move the files of a model into a folder, in place of the weights there, in either layout.

    No mixture of two models can be loaded in between: config.json is missing then. It stays where
    one file of weights is all that differs, which is replaced in one step.
    """
    config, old = "config.json", {path.name for path in _weights_in(folder)}
    names = sorted((path.name for path in new.iterdir()), key=lambda name: name == config)
    differ = {name for name in names if not _are_equal(new / name, folder / name)}
    if (old | differ) - {WEIGHTS}:
        (folder / config).unlink(missing_ok=True)
        # What is left of the other layout would be loaded: a single file goes before an index.
        for name in old:
            (folder / name).unlink()
    for name in names:
        (new / name).replace(folder / name)


def _weights_in(folder: Path) -> list[Path]:
    return [*folder.glob(WEIGHTS), *folder.glob(INDEX), *folder.glob(SHARDS)]


def _are_equal(one: Path, other: Path) -> bool:
    """Return whether two files other than weights have the same contents."""
    if one.name == WEIGHTS or not other.is_file():
        return False
    return filecmp.cmp(one, other, shallow=False)


def check_weights(folder: Path) -> None:
    """Raise ValueError if a weight file of a folder is missing, damaged or truncated."""
    for path in _weight_files(folder):
        with _open_tensors(path):
            pass


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and values of every tensor of a folder's weights."""
    for path in _weight_files(folder):
        with _open_tensors(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder's weights; one file goes before an index, as in transformers."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    try:
        files = parse_json(index.read_bytes())["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is broken, no index of weights: copy it again") from error
    if outside := next((file for file in files if file != Path(file).name), None):
        raise ValueError(f"{index} names {outside}: weights must lie beside it, in no other folder")
    return [folder / file for file in sorted(set(files))]


def _open_tensors(path: Path) -> safe_open:
    if not path.is_file():
        raise ValueError(f"{path} is missing: a model is read from safetensors only")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is broken or cut short ({in_line(error)}): copy it again"
        ) from error


def check_tied_head(folder: Path) -> None:
    """Raise ValueError if a folder holds an output projection that differs from the embedding.

    transformers from version 5 on would load it, whatever `config.json` says about tied weights.
    """
    stored = {}
    for path in _weight_files(folder):
        with _open_tensors(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(TABLES):
                    stored[HEAD if name.endswith(HEAD) else "embeddings"] = path, name
    if len(stored) < 2:
        return
    values = []
    for path, name in stored.values():
        with _open_tensors(path) as tensors:
            values.append(tensors.get_tensor(name))
    if not torch.equal(*values):
        (_, embeddings), path = stored["embeddings"], stored[HEAD][0]
        raise ValueError(
            f"{path}: {HEAD} differs from {embeddings}, though tie_word_embeddings is true in "
            f"config.json; set it to false to keep both, or remove {HEAD}"
        )
