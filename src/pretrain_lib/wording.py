"""Words of messages: counts with their nouns, and what others say in one line."""


def plural(count: int, noun: str, several: str | None = None) -> str:
    """Return a count with its noun: "1 document", "2,000 documents".

    `several` is the plural of `noun`, by default with an "s".
    """
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


def in_line(value: object) -> str:
    """Return a text or an error, such as one of another library, in one line."""
    return " ".join(str(value).split())
