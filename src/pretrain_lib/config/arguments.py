"""A recipe's settings from YAML overlays and flags."""

import dataclasses
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml

from pretrain_lib.config.overlays import read_overlay
from pretrain_lib.config.renamed import now_called
from pretrain_lib.config.settings import Recipe, plain
from pretrain_lib.models.flops import PEAK_TFLOPS, Hardware
from pretrain_lib.values import Rule, did_you_mean, kinds_of, rules_of

HARDWARE = Hardware()
PLAN_RULES = {
    "plan_mfu": Rule(float, above=0, maximum=1, help="MFU by which --plan tells the time"),
    "plan_node": Rule(int, minimum=1, help="devices in a machine, for --plan"),
}


def parse_recipe(
    defaults: Recipe, *, presets: dict[str, dict] | None = None, arguments: list[str] | None = None
) -> tuple[Recipe, Hardware | None]:
    """Read overlays and flags over a recipe's settings: `(settings, what --plan is for)`.

    Later wins: the recipe, `--preset`, each `--config FILE`, flags. A preset maps dotted names to
    values. Raises ValueError, in one line, for what cannot be read or is out of range.
    """
    rules = _recipe_rules(defaults)
    parser = _build_parser(defaults, presets or {}, rules)
    arguments = sys.argv[1:] if arguments is None else arguments
    options, unknown = parser.parse_known_args(_join_values(arguments, parser))
    if unknown:
        raise ValueError(_refuse_flag(unknown[0].partition("=")[0], parser))
    given = _given(options, presets or {}, rules)
    config = _replace(defaults, given)
    config = dataclasses.replace(config, data=_choose_data(defaults, config, given))
    config.check_values()
    if options.print_config:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), end="")
        sys.exit(0)
    return config, _planned_hardware(options)


def _recipe_rules(defaults: Recipe) -> dict[str, Rule]:
    """Return the rule of each setting by dotted name."""
    return {
        f"{section.name}.{name}": rule
        for section in dataclasses.fields(defaults)
        for name, rule in rules_of(type(getattr(defaults, section.name))).items()
    }


def _given(options: Namespace, presets: dict[str, dict], rules: dict[str, Rule]) -> dict[str, Any]:
    """Return the values of preset, overlays and flags by dotted name."""
    given = dict(presets[options.preset]) if options.preset else {}
    for file in options.config:
        for name, written in read_overlay(file).items():
            if name not in rules:
                hint = now_called(name) or f"is no setting{did_you_mean(name, rules)}"
                raise ValueError(f"{file}: {name} {hint}")
            given[name] = _read(rules[name], written, f"{file}: {name}")
    for name, rule in rules.items():
        if hasattr(options, name):
            given[name] = _read(rule, getattr(options, name), f"--{name}")
    return given


def _read(rule: Rule, written: Any, name: str) -> Any:
    try:
        return rule.read(written)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _replace(config: Recipe, given: dict[str, Any]) -> Recipe:
    sections: dict[str, dict] = {}
    for name, value in given.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    changed = {
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in sections.items()
    }
    return dataclasses.replace(config, **changed)


def _choose_data(defaults: Recipe, config: Recipe, given: dict[str, Any]) -> Any:
    """Return the data settings; a folder that the user named is not held against the recipe's own.

    It is taken as it is: without the source and the tokenizer that only the recipe gives.
    """
    origin = {
        name: given.get(f"data.{name}") for name in ("source", "tokenizer", "train_tokenizer")
    }
    if config.data.path and origin["source"] is None and not config.data.streaming:
        return dataclasses.replace(config.data, **origin)
    if origin["train_tokenizer"] and not origin["tokenizer"]:
        return dataclasses.replace(config.data, tokenizer=None)
    return config.data


def _planned_hardware(options: Namespace) -> Hardware | None:
    if options.plan is None:
        return None
    mfu, node = (
        _read(rule, getattr(options, name), f"--{name}") for name, rule in PLAN_RULES.items()
    )
    return Hardware(device=options.plan, mfu=mfu, node=node)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')} (--help lists all flags)")


def _build_parser(
    defaults: Recipe, presets: dict[str, dict], rules: dict[str, Rule]
) -> ArgumentParser:
    usage = "%(prog)s [--preset NAME] [--config FILE ...] [--SECTION.FIELD VALUE ...]"
    parser = _Parser(usage=usage, allow_abbrev=False)
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="FILE", help="a YAML overlay; repeatable")
    add("--preset", choices=sorted(presets), metavar="NAME", help="a size, with its batch and rate")
    add("--print_config", action="store_true", help="print all settings as YAML, and exit")
    text = f"print what the run costs on such devices ({HARDWARE.device}), and exit"
    devices = {"choices": sorted(PEAK_TFLOPS), "metavar": "DEVICE"}
    add("--plan", nargs="?", const=HARDWARE.device, help=text, **devices)
    for name, rule in PLAN_RULES.items():
        default = str(getattr(HARDWARE, name.removeprefix("plan_")))
        add(f"--{name}", default=default, metavar="N", help=f"{rule.help} (default: {default})")
    for section in dataclasses.fields(defaults):
        settings = getattr(defaults, section.name)
        group = parser.add_argument_group(section.name, _first_line(type(settings)))
        for field in dataclasses.fields(settings):
            rule = rules[f"{section.name}.{field.name}"]
            group.add_argument(
                f"--{section.name}.{field.name}",
                default=SUPPRESS,
                metavar=_placeholder(rule),
                help=help_text(rule, getattr(settings, field.name)).replace("%", "%%"),
            )
    return parser


def help_text(rule: Rule, default: Any) -> str:
    """Return a setting's sentence, with what it may be, its unit and its default."""
    unit = f" {rule.unit}," if rule.unit else ""
    written = yaml.safe_dump(plain(default), default_flow_style=True, width=1000)
    return f"{rule.help} ({rule.describe()};{unit} default: {written.splitlines()[0]})"


def _first_line(section: type) -> str:
    return (section.__doc__ or "").splitlines()[0]


def _placeholder(rule: Rule) -> str:
    (kind, *_) = kinds_of(rule.kind)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    names = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
    return names.get(kind, "LIST" if get_origin(kind) in (list, tuple) else "VALUE")


def _join_values(arguments: list[str], parser: ArgumentParser) -> list[str]:
    """Write `--flag value` as `--flag=value`, so that a value may begin with a dash."""
    valued = set(_flags(parser, valued=True))
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in valued and not argument.startswith("--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _flags(parser: ArgumentParser, *, valued: bool = False) -> list[str]:
    return [
        flag
        for action in parser._actions
        for flag in action.option_strings
        if not valued or action.nargs is None
    ]


def _refuse_flag(written: str, parser: ArgumentParser) -> str:
    """Return the error for an argument that is no flag."""
    if not written.startswith("--"):
        return f"{written} belongs to no flag (--help lists all flags)"
    hint = now_called(written.removeprefix("--"))
    if hint is not None:
        return f"{written} {hint.replace('called ', 'called --')}"
    near = did_you_mean(written, _flags(parser))
    return f"there is no flag {written}{near} (--help lists all flags)"
