"""Quote text that others wrote in Markdown, so that none of it is read as Markdown or HTML."""

import json
import re

from pretrain_lib.wording import in_line


def fenced(text: str) -> str:
    """Return a code block of the text, with a fence longer than any within it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def code(text: str) -> str:
    """Return the text, quoted as in JSON, as code within a line."""
    quoted = json.dumps(text, ensure_ascii=False)
    longest = max(map(len, re.findall(r"`+", quoted)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence}{quoted}{fence}"


def escaped(text: str) -> str:
    """Return the text in one line, with the punctuation of Markdown and HTML escaped."""
    punctuation = r"([\\`*{}\[\]<>#|~&$]|(?<!\w)_|_(?!\w))"
    return re.sub(punctuation, r"\\\1", in_line(text))
