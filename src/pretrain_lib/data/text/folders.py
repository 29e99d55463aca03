"""Find the text files of a folder, and count what is not read."""

import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePath

from pretrain_lib.data.text.compression import FORMATS

HIDDEN, LINKS = "hidden", "broken links"


def find_files(
    root: Path, is_readable: Callable[[Path], bool]
) -> tuple[list[Path], dict[str, int]]:
    """Return the readable files below a folder, sorted, and how many others there are by kind.

    A folder is entered once, by its own path if it lies in `root`, else by the first link to it.
    Hidden files and folders are not read; the others that are not are counted by their ending.
    """
    files: list[Path] = []
    skipped: Counter[str] = Counter()
    seen, folders, links = {_identity(root)}, [root], []
    while folders or links:
        if not folders:  # links come last: a folder that is here keeps its own path
            links.sort()
            if (identity := _identity(links[0])) not in seen:
                seen.add(identity)
                folders.append(links[0])
            del links[0]
            continue
        for path in folders.pop().iterdir():
            if path.name.startswith("."):
                skipped[HIDDEN] += 1
            elif not path.is_dir():
                if not path.exists():
                    skipped[LINKS] += 1
                elif path.is_file() and is_readable(path):
                    files.append(path)
                else:
                    skipped[ending(path)] += 1
            elif path.is_symlink():
                links.append(path)
            elif (identity := _identity(path)) not in seen:
                seen.add(identity)
                folders.append(path)
    return sorted(files), dict(sorted(skipped.items()))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def ending(path: PurePath) -> str:
    """Return the ending in lower case, of a compressed file with the one before."""
    *_, first, last = ["", "", *path.suffixes]
    ending = first + last if last.lower() in FORMATS else last
    return ending.lower() or "no ending"


def standard_library_files() -> tuple[Path, ...]:
    """Return the source files of this interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not left_out & set(path.relative_to(root).parts[:-1]) and path.stat().st_size
    )
    return tuple(file for file in files if _is_utf8(file))


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
