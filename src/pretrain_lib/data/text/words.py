"""Words of a text in one normal form: runs of letters and digits of any script."""

import re
import unicodedata

WORD, GAP = re.compile(r"[^\W_]+"), re.compile(r"[\W_]")


def normalize(text: str) -> str:
    """Return a text in lower case and in Unicode's normal form NFC, which most texts have."""
    if not (text.isascii() or unicodedata.is_normalized("NFC", text)):
        text = unicodedata.normalize("NFC", text)
    return text.lower()
