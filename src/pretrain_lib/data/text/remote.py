"""Find the text files behind a URL."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from pretrain_lib.data.remote import RemoteFile, answer, refuse_secrets, storage_of, version_of
from pretrain_lib.data.text.folders import HIDDEN, ending


def find_remote(
    url: str, is_readable: Callable[[Any], bool]
) -> tuple[list[RemoteFile], dict[str, int]]:
    """Return the readable files at or below a URL, sorted, and how many others there are by kind.

    Hidden files and folders are not read. Raises ValueError for a URL with credentials, a storage
    that cannot be reached, and a URL with nothing behind it.
    """
    refuse_secrets(url)
    storage, key = storage_of(url)
    infos = {key: answer(url, partial(storage.info, key))}
    if infos[key]["type"] == "directory":
        infos = answer(url, partial(storage.find, key, detail=True))
    found, skipped = [], Counter()
    for place, info in infos.items():
        inner = place.removeprefix(key).strip("/")
        file = RemoteFile(
            storage.unstrip_protocol(place), int(info.get("size") or 0), version_of(info)
        )
        if any(part.startswith(".") for part in inner.split("/")):
            skipped[HIDDEN] += 1
        elif is_readable(file):
            found.append(file)
        else:
            skipped[ending(PurePosixPath(file.name))] += 1
    return sorted(found), dict(sorted(skipped.items()))
