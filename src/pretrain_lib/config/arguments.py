"""A recipe's settings from YAML overlays and flags."""

import dataclasses
import sys
from argparse import ArgumentParser as PlainParser
from typing import Any, NoReturn

from pretrain_lib.config.settings import DataConfig, Recipe
from pretrain_lib.config.units import Duration, TokenCount
from pretrain_lib.models.flops import PEAK_TFLOPS, Hardware


def parse_recipe(
    defaults: Recipe, *, presets: dict[str, dict] | None = None, arguments: list[str] | None = None
) -> tuple[Recipe, Hardware | None]:
    """Read overlays and flags over a recipe's settings: `(settings, what --plan is for)`.

    Later wins: the recipe, `--preset`, each `--config FILE`, flags. A preset maps dotted names to
    values. What cannot be read ends the program with one line and exit code 2.
    """
    arguments = _overlays_first(sys.argv[1:] if arguments is None else arguments)
    presets = presets or {}
    # Found first, because a preset moves the defaults that everything else overrides.
    finder = PlainParser(allow_abbrev=False, add_help=False)
    finder.add_argument("--preset", nargs="?")
    preset = presets.get(finder.parse_known_args(arguments)[0].preset, {})
    settings = _parse(defaults, presets, preset, arguments)
    sections = {f.name: settings[f.name] for f in dataclasses.fields(Recipe)}
    # Again without the recipe's own data, to see what the user gave.
    nothing = dataclasses.replace(defaults.data, source=None, tokenizer=None, train_tokenizer=None)
    blank = dataclasses.replace(defaults, data=nothing)
    given: DataConfig = _parse(blank, presets, preset, arguments)["data"]
    if given.path and given.source is None and not given.streaming:
        # A folder named by the user is taken as it is, not held against the recipe's own source.
        sections["data"] = given
    elif given.train_tokenizer and not given.tokenizer:
        sections["data"] = dataclasses.replace(sections["data"], tokenizer=None)
    hardware = _planned_hardware(settings) if settings["plan"] else None
    return Recipe(**sections), hardware


def _planned_hardware(settings: dict[str, Any]) -> Hardware:
    mfu, node = settings["plan_mfu"], settings["plan_node"]
    if not 0 < mfu <= 1:
        raise ValueError(f"plan_mfu={mfu:g} must be above 0 and at most 1, such as 0.4")
    if node < 1:
        raise ValueError(f"plan_node={node} must be at least 1")
    return Hardware(device=settings["plan"], mfu=mfu, node=node)


def _parse(
    defaults: Recipe, presets: dict[str, dict], preset: dict, arguments: list[str]
) -> dict[str, Any]:
    parser = _build_parser(defaults, presets)
    parser.set_defaults(preset)
    return vars(parser.instantiate(parser.parse_args(arguments)))


def _overlays_first(arguments: list[str]) -> list[str]:
    """Move `--config FILE` to the front: a flag wins over a file wherever it stands."""
    overlays, flags = [], []
    for position, argument in enumerate(arguments):
        follows = position > 0 and arguments[position - 1] == "--config"
        is_overlay = follows or argument == "--config" or argument.startswith("--config=")
        (overlays if is_overlay else flags).append(argument)
    return overlays + flags


def _build_parser(defaults: Recipe, presets: dict[str, dict]):  # noqa: ANN202 (imported lazily)
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import register_type

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            lines = [line.strip() for line in str(message).splitlines() if line.strip()]
            print(f"error: {' '.join(lines)} (--help lists all flags)", file=sys.stderr)
            sys.exit(2)

    for kind in (TokenCount, Duration):
        register_type(
            kind, serializer=kind.__base__, deserializer=kind.parse, fail_already_registered=False
        )
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML overlay; may be repeated.")
    _add_plan(parser)
    parser.add_argument(
        "--preset", choices=sorted(presets), help="A size, with its batch and rate."
    )
    for section in dataclasses.fields(Recipe):
        value = getattr(defaults, section.name)
        parser.add_argument(f"--{section.name}", type=type(value), default=value)
    return parser


def _add_plan(parser: PlainParser) -> None:
    planned = Hardware()
    parser.add_argument(
        "--plan",
        nargs="?",
        const=planned.device,
        choices=sorted(PEAK_TFLOPS),
        metavar="DEVICE",
        help=f"Print what the run costs on such devices ({planned.device}), and exit.",
    )
    parser.add_argument(
        "--plan_mfu", type=float, default=planned.mfu, help="MFU by which --plan tells the time."
    )
    parser.add_argument(
        "--plan_node", type=int, default=planned.node, help="Devices in a machine, for --plan."
    )
