"""Check the output path of a command before it starts."""

from pathlib import Path


def check_out(out: Path | None, *, is_folder: bool = False) -> None:
    """Raise ValueError if `--out` cannot be written as a file, or as a folder; it may exist."""
    if out is None:
        return
    if out.exists() and out.is_dir() != is_folder:
        found, wanted = ("a file", "a folder") if is_folder else ("a folder", "a file")
        raise ValueError(f"--out {out} is {found}: give the path of {wanted}")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir():
        raise ValueError(f"--out {out} cannot be written: {above} is a file; give another path")
