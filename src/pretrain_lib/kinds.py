"""Check the types of Python values, and convert numbers of NumPy to those of Python."""

import types
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

UNREADABLE = object()  # stands for what is of none of the types asked for


def kinds_of(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def plain(kind: Any, value: Any) -> Any:
    """Return a value of a type with the numbers of Python, or UNREADABLE if it is of another."""
    values = (_plain_one(one, value) for one in kinds_of(kind))
    return next((one for one in values if one is not UNREADABLE), UNREADABLE)


def _plain_one(kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else UNREADABLE
    if get_origin(kind) in (list, tuple):
        is_pair = get_origin(kind) is tuple
        if not isinstance(value, list | tuple) or is_pair and len(value) != len(get_args(kind)):
            return UNREADABLE
        items = [_plain_one(get_args(kind)[0], one) for one in value]
        if any(one is UNREADABLE for one in items):
            return UNREADABLE
        return tuple(items) if isinstance(value, tuple) else items
    if issubclass(kind, int | float) and kind is not bool:
        return _plain_number(kind, value)
    return value if isinstance(value, kind) else UNREADABLE


def _plain_number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, Real):
        return UNREADABLE
    if type(value) is kind:
        return value
    if isinstance(value, Integral):
        return int(value)
    if issubclass(kind, float):
        return float(value)
    # A count with a notation of its own, such as 10e9, may be a float in Python.
    return kind(value) if hasattr(kind, "parse") and float(value).is_integer() else UNREADABLE


def numbers_in(value: Any) -> list[float]:
    """Return the numbers of a value: its own, or those of a list."""
    items = value if isinstance(value, list | tuple) else [value]
    return [i for i in items if isinstance(i, int | float) and not isinstance(i, bool)]
