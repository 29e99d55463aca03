"""Counts with their nouns, for messages."""


def plural(count: int, noun: str, several: str | None = None) -> str:
    """Return a count with its noun: "1 document", "2,000 documents".

    `several` is the plural of `noun`, by default with an "s".
    """
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"
