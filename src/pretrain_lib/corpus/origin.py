"""What text a run has read, as far as its settings and the folder of its data still tell.

The recipe's `data.source` says nothing where `data.path` is a folder that was prepared from another
text, so the folder's own manifest is asked first.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pretrain_lib.data.tokens.shards import MANIFEST


@dataclass(frozen=True)
class Origin:
    """Where the tokens of one path come from."""

    sources: tuple[str, ...]
    """As given to `prepare`: names on the hub, files, folders; empty if not known."""
    validation: str | None
    """The rule by which text was held out; None if not known."""
    path: str | None
    """The last part of its path, if it has one."""


def find_origins(data: dict) -> list[Origin]:
    """Return the origin of each path of a run's `data` settings (a dict, as in its manifest)."""
    paths = _listed(data.get("path"))
    if not paths:
        return [Origin(tuple(_listed(data.get("source"))), data.get("validation"), None)]
    return [_origin_of(Path(path).expanduser()) for path in paths]


def _origin_of(path: Path) -> Origin:
    manifest = path / MANIFEST
    if not manifest.is_file():
        return Origin((), None, path.name)
    found = json.loads(manifest.read_text(encoding="utf-8"))
    return Origin(tuple(found["sources"]), found["validation"], path.name)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
