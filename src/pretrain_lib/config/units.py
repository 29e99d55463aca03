"""Types of settings with their own notation, such as token counts, durations and sizes."""

import re
from decimal import Decimal
from typing import Any


class TokenCount(int):
    """A number of tokens; notations: 375M, 10e9, 2.5B, 524_288."""

    noun = "a number of tokens such as 524288, 375M or 10e9"
    largest = 10**15

    @classmethod
    def parse(cls, value: Any) -> "TokenCount":
        """Parse a count from YAML or the command line; raises ValueError if it is invalid."""
        number = r"(\d{1,30}(?:\.\d{1,30})?(?:e\+?\d{1,2})?)([KMBT]?)"
        match = re.fullmatch(number, str(value).replace("_", ""), re.ASCII)
        exponent = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}[match[2]] if match else 0
        if not match or (count := Decimal(match[1]).scaleb(exponent)) != int(count):
            raise ValueError(f"{value!r} is not {cls.noun}")
        return cls(count)


class Duration(float):
    """A duration in seconds; notations: 90, 45s, 30m, 2h, 1.5d."""

    noun = "a time such as 90, 45s, 30m, 2h or 1.5d"

    @classmethod
    def parse(cls, value: Any) -> "Duration":
        """Parse a duration from YAML or the command line; raises ValueError if it is invalid."""
        match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)([smhd]?)", str(value), re.ASCII)
        if not match:
            raise ValueError(f"{value!r} is not {cls.noun}")
        return cls(float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]])


def show_duration(seconds: float) -> str:
    """Return a duration in the notation that `Duration` parses, such as 90s, 21m or 2h."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:g}s"


class ByteCount(int):
    """A size in bytes, in the notation of transformers, such as 500MB, 2GB or 1.5GiB."""

    noun = "a size such as 500MB, 2GB or 1.5GiB"
    largest = 10**15

    @classmethod
    def parse(cls, value: Any) -> "ByteCount":
        """Parse a size from the command line; raises ValueError if it is invalid."""
        match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)([KMGT])(i?)B", str(value), re.ASCII)
        if not match:
            raise ValueError(f"{value!r} is not {cls.noun}")
        unit = (1024 if match[3] else 1000) ** ("KMGT".index(match[2]) + 1)
        return cls(Decimal(match[1]) * unit)


class Text(str):
    """Text that may be empty, such as a prompt."""

    noun = "text"

    @classmethod
    def parse(cls, value: Any) -> "Text":
        """Return the text, read as UTF-8 in every locale; raises ValueError if it is not."""
        try:  # in another locale, Python hands on bytes beyond ASCII as surrogates
            return cls(str(value).encode(errors="surrogateescape").decode())
        except UnicodeError:
            raise ValueError(f"{value!r} is not UTF-8") from None


class Names(list):
    """Names separated by commas; spaces around them do not count."""

    noun = "names separated by commas"

    @classmethod
    def parse(cls, value: Any) -> "Names":
        """Parse names from the command line; raises ValueError if one is empty."""
        names = [name.strip() for name in str(value).split(",")]
        if not all(names):
            raise ValueError(f"{value!r} is not {cls.noun}")
        return cls(names)


class DeviceName(str):
    """The name of a torch device."""

    noun = "a device such as cpu, cuda, cuda:1 or mps"

    @classmethod
    def parse(cls, value: Any) -> "DeviceName":
        """Parse a device name; whether the machine has the device is not checked."""
        if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", str(value), re.ASCII):
            raise ValueError(f"{value!r} is not {cls.noun}")
        return cls(value)
