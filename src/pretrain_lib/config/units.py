"""Numbers as they are written in settings: tokens, times, sizes."""

import re
from decimal import Decimal
from typing import Any


class TokenCount(int):
    """A number of tokens; reads 375M, 10e9, 2.5B, 524_288."""

    @classmethod
    def parse(cls, value: Any) -> "TokenCount":
        """Read a count as it is written in YAML or on the command line."""
        number = r"(\d+(?:\.\d+)?(?:e\+?\d+)?)([KMBT]?)"
        match = re.fullmatch(number, str(value).replace("_", ""))
        exponent = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}[match[2]] if match else 0
        if not match or (count := Decimal(match[1]).scaleb(exponent)) % 1:
            raise ValueError(f"{value!r} is not a number of tokens such as 524288, 375M or 10e9")
        return cls(count)


class Duration(float):
    """A time in seconds; reads 90, 45s, 30m, 2h, 1.5d."""

    @classmethod
    def parse(cls, value: Any) -> "Duration":
        """Read a duration as it is written in YAML or on the command line."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value))
        if not match:
            raise ValueError(f"{value!r} is not a time such as 90, 45s, 30m, 2h or 1.5d")
        return cls(float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]])


def parse_bytes(value: str) -> int:
    """Read a size as transformers writes it: 500MB, 2GB, 1.5GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])(i?)B", value)
    if not match:
        raise ValueError(f"{value!r} is not a size such as 500MB, 2GB or 1.5GiB")
    unit = (1024 if match[3] else 1000) ** ("KMGT".index(match[2]) + 1)
    return int(Decimal(match[1]) * unit)
