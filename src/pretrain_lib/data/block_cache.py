"""Keep blocks of remote files on the local disk, in a folder of bounded size.

A block is followed by its hash, which a process checks at its first read of the block.
"""

import itertools
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

GIB = 2**30
# Blocks are deleted, those read longest ago first, once they fill more than the first share of the
# limit, until they fill the second. Processes that share the folder look after each 1/64 of it.
FULL, KEPT, LOOK = 7 / 8, 3 / 4, 1 / 64
HASH_BYTES = 16
_numbers = itertools.count()


def cache_folder() -> Path:
    """Return the cache folder of this library."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pretrain_lib"


@dataclass
class BlockCache:
    """Blocks of files in a folder, by a key of the file and the number of the block."""

    folder: Path
    limit: int
    """Bytes of disk space."""
    _written: float = field(default=float("inf"), repr=False)  # since the folder was looked through
    _checked: set[tuple[str, int]] = field(default_factory=set, repr=False)  # since opened
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "limit": self.limit, "_written": float("inf")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state | {"_checked": set(), "_lock": threading.Lock()}

    def read(self, key: str, number: int, start: int, count: int) -> bytes | None:
        """Return `count` bytes from `start` on of a block, None if it is not here or damaged."""
        try:
            file = os.open(self._path(key, number), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if (key, number) not in self._checked:
                raw = os.pread(file, os.fstat(file).st_size, 0)
                if _hash(raw[:-HASH_BYTES]) != raw[-HASH_BYTES:]:
                    return None
                self._checked.add((key, number))
            os.utime(file)  # it was read now
            return os.pread(file, count, start)
        finally:
            os.close(file)

    def write(self, key: str, number: int, block: bytes) -> None:
        """Keep a block; raises ValueError if the folder cannot be written."""
        path = self._path(key, number)
        # Another process or thread may write the same block.
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(_numbers)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(block + _hash(block))
            temporary.replace(path)
            self._checked.discard((key, number))
        except FileNotFoundError:  # deleted by another, which makes room: it is not kept
            pass
        except OSError as error:
            raise ValueError(
                f"blocks of remote files cannot be kept in {self.folder} ({error.strerror}); make "
                f"room there, or set XDG_CACHE_HOME to a folder on another disk"
            ) from error
        with self._lock:
            self._written += len(block) + HASH_BYTES
            if self._written >= LOOK * self.limit:
                self._written = 0
                self._delete_oldest()

    def _path(self, key: str, number: int) -> Path:
        return self.folder / key / f"{number:08d}"

    def _delete_oldest(self) -> None:
        entries = []
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # deleted by another process
                continue
            entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        if total <= FULL * self.limit:
            return
        for _, size, path in sorted(entries):
            path.unlink(missing_ok=True)
            total -= size
            if total <= KEPT * self.limit:
                return


def _hash(block: bytes) -> bytes:
    return xxhash.xxh3_128_digest(block)
