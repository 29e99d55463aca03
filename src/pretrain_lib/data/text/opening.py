"""Open a source of text by its name: python-stdlib, files, a URL, or a Hub dataset."""

from pathlib import Path

from pretrain_lib.data.remote import is_url
from pretrain_lib.data.text.dataset_rows import EMBEDDED_CORPUS, HUB_NAME, HubSource
from pretrain_lib.data.text.folders import find_files, standard_library_files
from pretrain_lib.data.text.footers import check_footers
from pretrain_lib.data.text.formats import KNOWN, is_readable
from pretrain_lib.data.text.remote import find_remote
from pretrain_lib.data.text.sources import FileSource, Source
from pretrain_lib.data.tokens.unprepared import FOREIGN_SUFFIXES
from pretrain_lib.wording import show_path

ARRAYS = f"pass token arrays ({', '.join(FOREIGN_SUFFIXES)}) as --data.path"


def open_source(
    name: str,
    *,
    text_field: str = "text",
    document_separator: str | None = None,
    loss_spans: str | None = None,
) -> Source:
    """Open the source `name`: python-stdlib, a file, a folder, a URL, or a Hub dataset.

    `document_separator` is a line that separates the documents of `.txt` files. Raises ValueError
    for a missing path, an unsupported file type, or a source without text.
    """
    path, skipped, shown = Path(name).expanduser(), {}, show_path(name)
    if name == EMBEDDED_CORPUS:
        files = standard_library_files()
    elif is_url(name) or path.is_dir():
        is_remote = is_url(name)
        find = find_remote if is_remote else find_files
        paths, skipped = find(name if is_remote else path, is_readable)
        if not (files := tuple(paths)):
            raise _nothing_to_read(shown, skipped)
    elif path.is_file():
        if not is_readable(path):
            raise ValueError(
                f"data.source={shown}: the file must end in one of {KNOWN} (a .txt file is one "
                f"document; the others have one per line or row, in the field {text_field!r}); "
                f"{ARRAYS}"
            )
        files = (path,)
    elif path.exists():
        raise ValueError(
            f"data.source={shown} is a pipe or device, which cannot be read again after a restart; "
            f"write its content to a file first"
        )
    elif HUB_NAME.fullmatch(name) and not name.startswith(".") and not is_readable(path):
        return HubSource(name, text_field)
    else:
        raise ValueError(
            f"data.source={shown}: there is no such file or folder, and it is neither "
            f"{EMBEDDED_CORPUS} nor a Hub dataset OWNER/NAME[:CONFIG][@REVISION]"
        )
    if not sum(file.stat().st_size for file in files):
        raise ValueError(f"data.source={shown} is empty: it needs at least one document with text")
    check_footers([file for file in files if file.name.lower().endswith(".parquet")])
    counts = tuple(skipped.items())
    source = FileSource(name, files, text_field, document_separator, counts, loss_spans)
    assert source.states, "taken now, before anything is read"
    return source


def _nothing_to_read(shown: str, skipped: dict[str, int]) -> ValueError:
    """Return the error for a folder without text; `skipped` counts its files by kind."""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in skipped.items()) or "no files"
    hint = f"; {ARRAYS}" if any(kind in skipped for kind in FOREIGN_SUFFIXES) else ""
    return ValueError(
        f"data.source={shown}: the folder holds none of {KNOWN} (it holds {counts}){hint}"
    )
