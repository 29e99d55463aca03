"""Find out which text a run was trained on, from its settings and the manifests of its data.

If `data.path` is a prepared folder, its manifest is authoritative: the recipe's `data.source` may
name another text.
"""

from dataclasses import dataclass

from pretrain_lib.config.derived_defaults import listed
from pretrain_lib.data.remote import Unreachable
from pretrain_lib.data.tokens.manifests import MANIFEST
from pretrain_lib.data.tokens.places import Place, open_place
from pretrain_lib.files.reading import interpreting, read_object


@dataclass(frozen=True)
class Origin:
    """The origin of the tokens of one path."""

    sources: tuple[str, ...]
    """As given to `prepare`: Hub names, files, folders; empty if unknown."""
    validation: str | None
    """The rule by which text was held out; None if unknown."""
    path: str | None
    """The last component of the path, if there is one."""


def find_origins(data: dict) -> list[Origin]:
    """Return the origin of each path in a run's `data` settings (a dict, as in its manifest)."""
    paths = listed(data.get("path"))
    if not paths:
        return [Origin(tuple(listed(data.get("source"))), data.get("validation"), None)]
    return [_origin_of(open_place(path)) for path in paths]


def _origin_of(path: Place) -> Origin:
    manifest = path / MANIFEST
    try:
        if not manifest.is_file():
            return Origin((), None, path.name)
        with interpreting(manifest):
            record = read_object(manifest)
            return Origin(tuple(record["sources"]), record["validation"], path.name)
    except Unreachable:  # a report of a run does not need its data
        return Origin((), None, path.name)
