"""Parse the settings of a recipe from YAML overlays and flags."""

import dataclasses
import sys
from argparse import Namespace
from typing import Any

import yaml

from pretrain_lib.config.derived_defaults import derive_defaults
from pretrain_lib.config.flags import Parser, add_argument, add_setting
from pretrain_lib.config.overlays import read_overlay
from pretrain_lib.config.renamed import meant, now_called
from pretrain_lib.config.settings import Recipe, plain
from pretrain_lib.config.unread import refuse_unread
from pretrain_lib.models.flops import PEAK_TFLOPS, Hardware
from pretrain_lib.values import Rule, rules_of, show

HARDWARE = Hardware()


def parse_recipe(
    defaults: Recipe, *, presets: dict[str, dict] | None = None, arguments: list[str] | None = None
) -> tuple[Recipe, Hardware | None]:
    """Apply overlays and flags to a recipe; return it, and the hardware for `--plan` or None.

    In order of increasing precedence: the recipe, `--preset`, each `--config FILE`, flags. A preset
    maps dotted names to values. Raises ValueError, with a message of one line, for values that
    cannot be parsed or are out of range.
    """
    rules = _recipe_rules(defaults)
    options = _build_parser(defaults, presets or {}, rules).parse_args(arguments)
    overlays, flags = _overlays(options, presets or {}, rules), _flags(options, rules)
    recipe = _replace(defaults, overlays | flags)
    config = derive_defaults(defaults, recipe, overlays=overlays, flags=flags)
    config.check_values()
    refuse_unread(config, flags)
    if options.print_config:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), end="")
        sys.exit(0)
    return config, _planned_hardware(options)


def _recipe_rules(defaults: Recipe) -> dict[str, Rule]:
    """Return the `Rule` of each setting by dotted name."""
    return {
        f"{section.name}.{name}": rule
        for section in dataclasses.fields(defaults)
        for name, rule in rules_of(type(getattr(defaults, section.name))).items()
    }


def _overlays(options: Namespace, presets: dict[str, dict], rules: dict[str, Rule]) -> dict:
    """Return the values that preset and overlays name, by dotted name."""
    settings = dict(presets[options.preset]) if options.preset else {}
    for file in options.config:
        for name, written in read_overlay(file).items():
            if name not in rules:
                hint = now_called(name) or f"is no setting{meant(name, rules)}"
                raise ValueError(f"{file}: {show(name)} {hint}")
            settings[name] = _read(rules[name], written, f"{file}: {name}")
    return settings


def _flags(options: Namespace, rules: dict[str, Rule]) -> dict[str, Any]:
    """Return the values that flags name, by dotted name."""
    return {
        name: _read(rule, getattr(options, name), f"--{name}")
        for name, rule in rules.items()
        if hasattr(options, name)
    }


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


def _planned_hardware(options: Namespace) -> Hardware | None:
    if options.plan is None:
        return None
    return Hardware(device=options.plan, mfu=options.plan_mfu, node=options.plan_node)


class _RecipeParser(Parser):
    def refuse(self, written: str) -> str:
        """Return the error message for an unknown flag, with the new name of a renamed setting."""
        hint = now_called(written.removeprefix("--"))
        if hint is None:
            return super().refuse(written)
        return f"{written} {hint.replace('called ', 'called --')}"

    def near(self, written: str) -> str:
        """Return which flag an unknown one may mean, or what it is called in other trainers."""
        return meant(written, self.flags())


def _build_parser(defaults: Recipe, presets: dict[str, dict], rules: dict[str, Rule]) -> Parser:
    usage = "%(prog)s [--preset NAME] [--config FILE ...] [--SECTION.FIELD VALUE ...]"
    parser = _RecipeParser(usage=usage)
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="FILE", help="a YAML overlay; repeatable")
    text = f"a size, with its batch and rate: {', '.join(sorted(presets)) or 'there is none'}"
    add("--preset", choices=sorted(presets), metavar="NAME", help=text)
    add("--print_config", action="store_true", help="print all settings as YAML, and exit")
    text = f"print what the run costs on such devices ({HARDWARE.device}), and exit"
    devices = sorted(PEAK_TFLOPS)
    add("--plan", nargs="?", const=HARDWARE.device, choices=devices, metavar="DEVICE", help=text)
    mfu = Rule(float, above=0, maximum=1, help="MFU by which --plan tells the time")
    add_argument(parser, "--plan_mfu", mfu, default=HARDWARE.mfu, metavar="X")
    node = Rule(int, minimum=1, help="devices in a machine, for --plan")
    add_argument(parser, "--plan_node", node, default=HARDWARE.node, metavar="N")
    for section in dataclasses.fields(defaults):
        settings = getattr(defaults, section.name)
        group = parser.add_argument_group(section.name, (settings.__doc__ or "").splitlines()[0])
        for field in dataclasses.fields(settings):
            name = f"{section.name}.{field.name}"
            add_setting(group, name, rules[name], plain(getattr(settings, field.name)))
    return parser
