"""Command-line flags, parsed and checked by `Rule`, with error messages of one line."""

import json
import re
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from pretrain_lib.values import Rule, did_you_mean, kinds_of, show

HINT = "(--help lists all flags)"
FLAG = re.compile("--([A-Za-z]|$)")  # `---` is none, but a line between documents


class Parser(ArgumentParser):
    """An ArgumentParser that raises ValueError where argparse would print its usage and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        """Parse the arguments; raises ValueError for unknown ones, suggesting the closest flag."""
        arguments = sys.argv[1:] if args is None else args
        options, unknown = super().parse_known_args(self._join_values(arguments), namespace)
        if unknown:
            raise ValueError(self.refuse(unknown[0].partition("=")[0]))
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with argparse's message."""
        message = re.sub(r"^argument ([^:]+):", r"\1", message)
        choices = [*self._commands(), *self.flags()]
        near = "".join(
            did_you_mean(word, choices) for word in re.findall(r"choice: '(.*?)'", message)
        )
        raise ValueError(f"{message}{near} {HINT}")

    def refuse(self, written: str) -> str:
        """Return the error message for an unknown argument."""
        if not written.startswith("-"):
            return f"{show(written)} belongs to no flag {HINT}"
        return f"there is no flag {show(written)}{self.near(written)} {HINT}"

    def near(self, written: str) -> str:
        """Return which flag an unknown one may mean, as the end of a message."""
        return did_you_mean(written, self.flags())

    def flags(self) -> list[str]:
        """Return the names of all flags."""
        return [flag for action in self._actions for flag in action.option_strings]

    def _commands(self) -> list[str]:
        return [name for action in self._actions for name in action.choices or ()]

    def _join_values(self, arguments: Sequence[str]) -> list[str]:
        """Join `--flag value` into `--flag=value`, so that values may begin with dashes."""
        valued = {f for a in self._actions if a.nargs is None for f in a.option_strings}
        joined: list[str] = []
        for argument in arguments:
            if joined and joined[-1] in valued and not FLAG.match(argument):
                joined[-1] += f"={argument}"
            else:
                joined.append(argument)
        return joined


def add_argument(parser: Any, name: str, rule: Rule, **options: Any) -> None:
    """Add a flag or positional argument to a parser or group; its values are parsed by `rule`."""
    text = help_text(rule, options.get("default"))
    parser.add_argument(name, type=_reader(rule), help=text.replace("%", "%%"), **options)


def add_setting(parser: Any, name: str, rule: Rule, default: Any) -> None:
    """Add the flag of a recipe's setting; its value is stored as text and parsed later."""
    text = help_text(rule, default, show_default=True).replace("%", "%%")
    parser.add_argument(f"--{name}", default=SUPPRESS, metavar=_placeholder(rule), help=text)


def help_text(rule: Rule, default: Any, *, show_default: bool = False) -> str:
    """Return the help text: the rule's sentence, valid values, unit, and default if any."""
    facts = [rule.describe(), *filter(None, [rule.unit])]
    if show_default or default is not None:
        written = default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)
        facts.append(f"default: {written}")
    return f"{rule.help} ({'; '.join(facts)})"


def _reader(rule: Rule) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return rule.read(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from error

    return read


def _placeholder(rule: Rule) -> str:
    (kind, *_) = kinds_of(rule.kind)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    names = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
    return names.get(kind, "LIST" if get_origin(kind) in (list, tuple) else "VALUE")
