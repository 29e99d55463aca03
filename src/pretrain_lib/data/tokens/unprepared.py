"""What to do with a path that holds no manifest: it may be text, arrays, or another format."""

from pretrain_lib.data.tokens.manifests import JOB
from pretrain_lib.data.tokens.places import Place
from pretrain_lib.wording import show_path

FOREIGN_SUFFIXES = (".npy", ".bin", ".ds")
TEXT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
DATASETS_FILES = ("dataset_info.json", "dataset_dict.json")  # of save_to_disk


def explain_unprepared(path: Place) -> str:
    """Return what a path without a manifest is, and the remedy."""
    own = show_path(str(path))
    if path.is_file():
        return _explain_file(path, own)
    if (path / JOB).is_file():
        return "`pretrain prepare` did not finish it; run the same command again"
    if any((path / name).is_file() for name in DATASETS_FILES):
        return (
            "it is a folder of datasets' save_to_disk; write it by "
            "datasets.load_from_disk(FOLDER).to_parquet(FILE), of each split if it has several, "
            "and run `pretrain prepare` on that"
        )
    for suffix in FOREIGN_SUFFIXES:
        if any(path.glob(f"*{suffix}")):
            return (
                f"it is a folder of token arrays; give a pattern of those to train on, such as "
                f"{own}/train*{suffix}, and of others by data.validation"
            )
    return (
        "it is not a prepared folder; if it is one of text, run `pretrain prepare` on it and give "
        "the folder that this writes"
    )


def _explain_file(path: Place, own: str) -> str:
    if path.name == "manifest.json":
        return f"it is a manifest; give its folder, {show_path(str(path.parent))}"
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    if name.endswith(TEXT_SUFFIXES):
        return "it is a file of text; run `pretrain prepare` on it and give the folder it writes"
    return (
        f"it is a file, but neither one of text nor a token array ({', '.join(FOREIGN_SUFFIXES)}); "
        f"write the ids alone, numpy.save('ids.npy', IDS), and give that file"
    )
