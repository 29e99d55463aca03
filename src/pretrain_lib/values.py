"""Rules for values that users write: valid types and ranges, parsing, error messages.

Each setting of a recipe is a dataclass field created by `setting`, each flag of the `pretrain`
command has a `Rule` of its own. Help, documentation and checks are derived from these.
"""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from pretrain_lib.kinds import UNREADABLE, kinds_of, numbers_in, plain

LARGEST = 2**31 - 1  # maximum of whole numbers whose rule has none
NOUNS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a local path",
    list[str]: "a list such as [a, b]",
    list[float]: "a list of numbers such as [0.7, 0.3]",
    tuple[float, float]: "two numbers such as [0.9, 0.95]",
    tuple[int, int]: "two whole numbers such as [10, 13]",
}


@dataclass(frozen=True)
class Rule:
    """The type, range, unit and help text of a value."""

    kind: Any = str
    """The type: int, float, bool, str, Path, a Literal, a list, a pair, a dataclass, a class with
    `parse` (see `config.units`), or a union of these. None in a union is written as null."""
    minimum: float | None = None
    above: float | None = None
    """Exclusive lower limit."""
    maximum: float | None = None
    below: float | None = None
    """Exclusive upper limit."""
    also: float | None = None
    """A single number outside the range that is valid too."""
    unit: str = ""
    help: str = ""
    """One sentence."""

    def read(self, written: Any) -> Any:
        """Parse `written`, which is text, or YAML lists and mappings of text.

        Raises ValueError with a message to which callers prepend the name of the setting.
        """
        value = _read(self.kind, written)
        if value is UNREADABLE:
            raise ValueError(f"{show(written)} must be {self.describe()}{self._suggest(written)}")
        self.check(value, shown=show(written))
        return value

    def check(self, value: Any, *, shown: str | None = None) -> Any:
        """Return a value, numbers of numpy and others as Python's own.

        Raises ValueError, as `read` does, for a value of the wrong type or out of range.
        """
        plain_value = plain(self.kind, value)
        if plain_value is not UNREADABLE and all(map(self._in_range, numbers_in(plain_value))):
            return plain_value
        # The default maximum is named only if exceeded, not in every help text.
        too_large = any(number > self._largest() for number in numbers_in(plain_value))
        rule = dataclasses.replace(self, maximum=self._largest()) if too_large else self
        shown = self._show(value) if shown is None else shown
        raise ValueError(f"{shown} must be {rule.describe()}{self._suggest(value)}")

    def _show(self, value: Any) -> str:
        """Format a value that is not valid, with its type if its text would be."""
        try:
            self.read(show(value))
        except ValueError:
            return show(value)
        return f"{show(value)} ({type(value).__name__})"

    def describe(self) -> str:
        """Describe the valid values, such as "a whole number of at least 1, or null"."""
        *nouns, last = [_noun(kind) for kind in kinds_of(self.kind) if kind is not type(None)]
        text = f"{', '.join(nouns)} or {last}" if nouns else last
        limits = [
            f"{word} {limit:,}"
            for word, limit in (
                ("at least", self.minimum),
                ("above", self.above),
                ("at most", self.maximum),
                ("below", self.below),
            )
            if limit is not None
        ]
        if limits:
            plain, _, example = text.partition(" such as ")
            text = f"{plain}{' of' * limits[0].startswith('at')} {' and '.join(limits)}"
            text += f", such as {example}" if example else ""
        also = "" if self.also is None else f"{self.also:g}, or "
        return f"{also}{text}{', or null' * (type(None) in kinds_of(self.kind))}"

    def _in_range(self, number: float) -> bool:
        if isinstance(number, float) and not math.isfinite(number):
            return False
        return number == self.also or (
            (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and number <= self._largest()
            and (self.below is None or number < self.below)
        )

    def _largest(self) -> float:
        if self.maximum is not None:
            return self.maximum
        whole = [k for k in kinds_of(self.kind) if isinstance(k, type) and issubclass(k, int)]
        return max((getattr(kind, "largest", LARGEST) for kind in whole), default=math.inf)

    def _suggest(self, written: Any) -> str:
        if Path in kinds_of(self.kind) and "://" in str(written):
            return "; copy files from or to a URL yourself"
        choices = [c for kind in kinds_of(self.kind) for c in get_args(kind)]
        return did_you_mean(written, [c for c in choices if isinstance(c, str)])


def setting(default: Any, help: str, **rule: Any) -> Any:
    """Create a dataclass field with a default, a help sentence, and further fields of `Rule`.

    The type of the rule is taken from the field's annotation.
    """
    metadata = {"rule": Rule(help=help, **rule)}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def rules_of(section: type) -> dict[str, Rule]:
    """Return the rule of each field of a settings dataclass, by name."""
    hints = get_type_hints(section)
    return {
        field.name: dataclasses.replace(field.metadata["rule"], kind=hints[field.name])
        for field in dataclasses.fields(section)
    }


def check_fields(settings: Any, *, name: str) -> None:
    """Raise ValueError for an invalid field; `name` is that of the section, such as "run"."""
    take_plain(settings)
    for field_name, rule in rules_of(type(settings)).items():
        check_rule(rule, getattr(settings, field_name), f"{name}.{field_name}")


def take_plain(settings: Any) -> None:
    """Replace the numbers of numpy and others in settings by Python's own, which are recorded."""
    for name, rule in rules_of(type(settings)).items():
        if (value := plain(rule.kind, getattr(settings, name))) is not UNREADABLE:
            object.__setattr__(settings, name, value)


def take_paths(settings: Any, *names: str) -> None:
    """Replace paths of pathlib in settings, and in lists of them, by text, which is recorded."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, list | tuple):
            value = [os.fspath(one) if isinstance(one, Path) else one for one in value]
        value = os.fspath(value) if isinstance(value, Path) else value
        object.__setattr__(settings, name, value)


def check_value(value: Any, name: str, kind: Any, **limits: float) -> Any:
    """Return an argument `name` as `Rule.check` does, or raise ValueError with its name."""
    return check_rule(Rule(kind, **limits), value, name)


def check_rule(rule: Rule, value: Any, name: str) -> Any:
    """Return a value as `Rule.check` does, or raise ValueError with its name."""
    try:
        return rule.check(value)
    except ValueError as error:
        raise ValueError(f"{name}={error}") from None


def did_you_mean(written: Any, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the closest match, or an empty string.

    Of settings such as optimizer.betas the last parts must be close: sections alone say little.
    """
    written, known = str(written), list(known)
    if any("." in name for name in known):
        (last,) = difflib.get_close_matches(_last(written), map(_last, known), n=1) or [None]
        same = [name for name in known if _last(name) == last]
        near = difflib.get_close_matches(written, same, n=1, cutoff=0)
    else:
        near = difflib.get_close_matches(written, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _last(name: str) -> str:
    """Return the last part of a dotted name, without the dashes of a flag."""
    return name.removeprefix("--").rpartition(".")[2]


def show(written: Any) -> str:
    """Format a value for a message of one line: shortened, and quoted if necessary."""
    text = written if isinstance(written, str) else str(written)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    plain = text.isprintable() and text.strip() == text and text
    return text if plain else repr(text)


def as_written(value: Any) -> str:
    """Return the value of a setting as users write it, such as null, false or ["a", "b"]."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read(kind: Any, written: Any) -> Any:
    kinds = kinds_of(kind)
    if written == "null" and type(None) in kinds:
        return None
    if isinstance(written, str) and written.lstrip()[:1] in ("[", "{"):
        written = _load_container(kinds, written)
    readings = (_read_one(one, written) for one in kinds if one is not type(None))
    return next((value for value in readings if value is not UNREADABLE), UNREADABLE)


def _load_container(kinds: tuple[Any, ...], text: str) -> Any:
    """Parse a flag's text as a YAML list or mapping, if one of the kinds is such a type."""
    if not any(is_dataclass(kind) or get_origin(kind) in (list, tuple) for kind in kinds):
        return text
    try:
        return yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError:
        return text


def _read_one(kind: Any, written: Any) -> Any:
    if is_dataclass(kind):
        return _read_dataclass(kind, written) if isinstance(written, dict) else UNREADABLE
    if get_origin(kind) in (list, tuple):
        return _read_items(kind, written)
    if isinstance(kind, type) and issubclass(kind, dict):
        return kind.parse(written) if isinstance(written, str | dict) else UNREADABLE
    if not isinstance(written, str) or "\0" in written:
        return UNREADABLE
    if get_origin(kind) is Literal:
        return written if written in get_args(kind) else UNREADABLE
    if kind is bool:
        return {"true": True, "false": False}.get(written.lower(), UNREADABLE)
    if kind in (str, Path) and not written.strip():
        return UNREADABLE
    if kind is Path:
        # Unlike Path.expanduser, this leaves an unknown ~name alone.
        return UNREADABLE if "://" in written else Path(os.path.expanduser(written))  # noqa: PTH111
    try:
        return kind.parse(written) if hasattr(kind, "parse") else kind(written)
    except ValueError:
        return UNREADABLE


def _read_items(kind: Any, written: Any) -> Any:
    kinds, is_pair = get_args(kind), get_origin(kind) is tuple
    if not isinstance(written, list) or (is_pair and len(written) != len(kinds)):
        return UNREADABLE
    items = [_read_item(kinds[0], item) for item in written]
    return UNREADABLE if any(i is UNREADABLE for i in items) else get_origin(kind)(items)


def _read_item(kind: Any, written: Any) -> Any:
    is_text = kind is str and isinstance(written, str)  # a prompt may be empty
    return written if is_text else _read_one(kind, written)


def _read_dataclass(kind: type, written: dict) -> Any:
    rules, values = rules_of(kind), {}
    for name, item in written.items():
        if name not in rules:
            raise ValueError(f"has no field {show(name)}{did_you_mean(name, rules)}")
        try:
            values[name] = rules[name].read(item)
        except ValueError as error:
            raise ValueError(f"with {name} {error}") from None
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"lacks {' and '.join(missing)}")
    return kind(**values)


def _noun(kind: Any) -> str:
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if is_dataclass(kind):
        return f"{{{', '.join(f'{f.name}: ...' for f in dataclasses.fields(kind)[:2])}}}"
    return getattr(kind, "noun", None) or NOUNS[kind]
