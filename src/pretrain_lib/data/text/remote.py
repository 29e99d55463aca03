"""Find the text files behind a URL."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from pretrain_lib.data.remote import (
    RemoteFile,
    answer,
    describe_file,
    refuse_secrets,
    storage_of,
    version_of,
)
from pretrain_lib.data.text.folders import HIDDEN, ending


def find_remote(
    url: str, is_readable: Callable[[Any], bool]
) -> tuple[list[RemoteFile], dict[str, int]]:
    """Return the readable files at or below a URL, sorted, and how many others there are by kind.

    Their order is that of a local folder. Hidden files and folders are not read. Raises ValueError
    for a URL with credentials, a storage that cannot be reached, a URL with nothing behind it, and
    a file without a size or version.
    """
    refuse_secrets(url)
    storage, key = storage_of(url)
    storage.invalidate_cache()  # what was listed before may have changed
    infos = {key: answer(url, partial(storage.info, key))}
    if infos[key]["type"] == "directory":
        infos = _list_files(storage, key, url)
        # S3 has empty files whose names end so where a console made a folder.
        infos = {place: info for place, info in infos.items() if not place.endswith("/")}
    files, hidden, skipped = {}, set(), Counter()
    for place, info in infos.items():
        parts = tuple(place.removeprefix(key).strip("/").split("/"))
        file = RemoteFile(storage.unstrip_protocol(place), 0, "")
        if dots := [number for number, part in enumerate(parts) if part.startswith(".")]:
            hidden.add(parts[: dots[0] + 1])
        elif is_readable(file):
            if info.get("size") is None or not version_of(info):  # the listing does not say it
                info = answer(file.url, partial(storage.info, place))
            files[parts] = describe_file(file.url, info)
        else:
            skipped[ending(PurePosixPath(file.name))] += 1
    if hidden:
        skipped[HIDDEN] = len(hidden)
    return [files[parts] for parts in sorted(files)], dict(sorted(skipped.items()))


def _list_files(storage: Any, key: str, url: str) -> dict[str, dict]:
    """Return what a storage says of all files below a folder, by their paths.

    The `find` of a storage itself is one listing. That of fsspec leaves out a folder whose listing
    fails, so the folders are listed here one by one.
    """
    if _has_own_find(storage):
        return answer(url, partial(storage.find, key, detail=True))
    files, folders = {}, [key]
    for folder in folders:
        place = url if folder == key else storage.unstrip_protocol(folder)
        for info in answer(place, partial(storage.ls, folder, detail=True)):
            name = info["name"].rstrip("/")
            if info["type"] != "directory":
                files[info["name"]] = info
            elif name.rpartition("/")[2].startswith("."):
                files[name] = info  # to be counted
            elif name != folder.rstrip("/"):
                folders.append(name)
    return files


def _has_own_find(storage: Any) -> bool:
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    kind = type(storage)
    inherited = AbstractFileSystem.find, AsyncFileSystem._find
    return (kind.find, getattr(kind, "_find", inherited[1])) != inherited
