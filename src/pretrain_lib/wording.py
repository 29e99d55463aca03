"""Words of messages: counts with their nouns, paths, and what others say in one line."""

import os
import re
from pathlib import Path

QUERY = re.compile(r"(://[^\s'\"?]+\?)[^\s'\"]+")  # of a URL
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def plural(count: int, noun: str, several: str | None = None) -> str:
    """Return a count with its noun: "1 document", "2,000 documents".

    `several` is the plural of `noun`, by default with an "s".
    """
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


def in_line(value: object) -> str:
    """Return a text or an error, such as one of another library, in one line."""
    return " ".join(str(value).split())


def without_queries(text: str) -> str:
    """Return a text without the queries of URLs: a server may redirect to one that holds a secret.

    Of `https://host/a?Signature=abc` is left `https://host/a?...`.
    """
    return QUERY.sub(r"\1...", text)


def show_path(path: Path | str) -> str:
    """Return a path or name for a message: bytes that are no UTF-8 and controls are escaped."""
    text = os.fsencode(str(path)).decode("utf-8", errors="backslashreplace")
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
