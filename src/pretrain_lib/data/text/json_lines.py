"""Parse JSON lines: documents fast, and a reason for each line that holds none.

Imported when lines are read: `orjson` is not needed to train on prepared tokens.
"""

import codecs
import json
from typing import Any

import orjson

from pretrain_lib.data.text.documents import Document, Fields, Rejected, is_text

WHITE_SPACE = " \t\n\r"  # between the parts of JSON


def is_blank(line: bytes) -> bool:
    """Return whether a line has nothing but white space, and the mark that may begin a file.

    NUL bytes are blank, too: a crash of its writer leaves them behind the last line.
    """
    return not line.removeprefix(codecs.BOM_UTF8).strip(b" \t\r\n\v\f\0")


def refuse_other_json(line: bytes, where: str) -> None:
    """Raise ValueError if the first line with text begins an array, or an indented object."""
    content = line.removeprefix(codecs.BOM_UTF8).strip()
    if content == b"{":
        raise ValueError(
            f"data.source: {where} is JSON with objects over several lines; write each object in a "
            f"line, such as by jq -c ."
        )
    if content.startswith(b"["):
        raise ValueError(
            f"data.source: {where} is a JSON array, not an object per line; write each of its "
            f"objects in a line, such as by jq -c '.[]'"
        )


def parse_line(line: bytes, fields: Fields) -> Document | None:
    """Return the document of a line, or None for a line that needs a second look."""
    if fields.spans is not None:
        return None
    try:
        text = orjson.loads(line)[fields.text]
    except (ValueError, LookupError, TypeError):
        return None
    return Document(text) if type(text) is str else None


def parse_again(line: bytes, where: str, fields: Fields) -> Document | Rejected:
    """Return the document of a line that `parse_line` found none in, or why there is none.

    Raises ValueError for a line with several objects: nobody knows how many documents they are.
    """
    line = line.removeprefix(codecs.BOM_UTF8)
    try:
        record = orjson.loads(line)
    except ValueError:
        record = _parse_lenient(line, where)
    text = record.get(fields.text, ...) if isinstance(record, dict) else ...
    if text is None:
        return Document("")  # as in a column with nulls
    if not isinstance(record, dict):
        reason = "not a JSON object in UTF-8"
    elif text is ...:
        reason = f"no field data.text_field={fields.text!r}"
    elif isinstance(text, str) and not is_text(text):
        reason = f"a lone surrogate, which is no character, in data.text_field={fields.text!r}"
    elif not is_text(text):
        reason = f"no text in data.text_field={fields.text!r}"
    elif (spans := _read_spans(record, text, fields.spans)) is ...:
        reason = f"no [start, end] of characters of the text in data.loss_spans={fields.spans!r}"
    else:
        return Document(text, spans=spans)
    return Rejected(where, reason, f"{line.rstrip()[:60]!r}")


def _read_spans(record: dict, text: str, field: str | None) -> Any:
    """Return the spans of a text, None for all of it, or `...` if they are missing or wrong."""
    spans = record.get(field, ...) if field is not None else None
    if spans is None or not isinstance(spans, list):
        return None if spans is None else ...
    found = tuple(tuple(span) if isinstance(span, list) else () for span in spans)
    for span in found:
        if len(span) != 2 or not all(type(place) is int for place in span):
            return ...
        if not 0 <= span[0] <= span[1] <= len(text):
            return ...
    return found


def _parse_lenient(line: bytes, where: str) -> Any:
    """Parse what `orjson` refuses but Python writes: NaN, infinities, lone surrogates.

    NUL bytes behind an object are padding, as a crash of its writer leaves them.
    """
    text = line.decode("utf-8", errors="surrogateescape").strip(WHITE_SPACE)
    try:
        record, end = json.JSONDecoder(parse_int=_parse_int).raw_decode(text)
    except (ValueError, RecursionError):
        return None
    rest = text[end:].strip(WHITE_SPACE + "\0")
    if isinstance(record, dict) and "{" in rest:
        raise ValueError(
            f"data.source: {where} holds several JSON objects; write each in a line of its own, "
            f"which ends in a line feed, such as by jq -c ."
        )
    return None if rest or not is_text(text) else record


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)  # int refuses thousands of digits
