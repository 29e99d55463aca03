"""Which settings of a run differ: from its recipe, and from those of other runs."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, get_type_hints

import yaml

from pretrain_lib.config.renamed import with_new_names
from pretrain_lib.config.rules import dotted
from pretrain_lib.config.settings import Recipe, plain
from pretrain_lib.models.any_model import read_shape
from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.report.blocks import Table, singular
from pretrain_lib.report.runs import Run
from pretrain_lib.run_folder.folder import RECIPE
from pretrain_lib.values import rules_of
from pretrain_lib.wording import in_line

LEFT_OUT = ("run.dir", "run.resume")  # where a run is, not what it is
LONGEST = 200  # characters of a value that are shown


def changed_settings(run: Run) -> tuple[str, Table] | None:
    """Return what a run changed, and with what it is compared; None if its settings are unknown.

    It is compared with the recipe if the run was started by one, otherwise with the defaults of
    the library.
    """
    if not run.settings:
        return None
    settings, path = with_new_names(run.settings), run.folder / RECIPE
    by_recipe = path.is_file()
    if by_recipe:
        try:
            defaults = with_new_names(yaml.safe_load(path.read_bytes()))
        except (yaml.YAMLError, RecursionError, ValueError, AttributeError) as error:
            reason = in_line(error)
            raise ValueError(f"{path} is damaged ({reason}); restore the file") from error
    else:
        defaults = _library_defaults(settings)
    rows = _rows_that_differ([_flatten(defaults), _flatten(settings)], units_of(settings))
    source = "the recipe" if by_recipe else "the defaults of the library"
    column = "Recipe" if by_recipe else "Library default"
    return source, Table(("Setting", column, "This run"), rows)


def differences(runs: Sequence[Run]) -> Table:
    """Return the settings, versions and parts of the environment that differ between runs."""
    recorded = ("data_fingerprint", "versions", "git", "world")
    things = [
        with_new_names(run.settings) | {k: run.manifest[k] for k in recorded if run.manifest.get(k)}
        for run in runs
    ]
    units = {name: unit for thing in things for name, unit in units_of(thing).items()}
    rows = _rows_that_differ([_flatten(thing) for thing in things], units)
    return Table(("", *(run.name for run in runs)), rows)


def _rows_that_differ(things: list[dict], units: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    rows = []
    for name in dict.fromkeys(name for thing in reversed(things) for name in thing):
        values = [thing.get(name, MISSING) for thing in things]
        if name not in LEFT_OUT and any(value != values[0] for value in values):
            unit = units.get(name, "")
            cells = ["" if value is MISSING else format_value(value, unit) for value in values]
            rows.append((name, *cells))
    return tuple(rows)


def _flatten(values: dict) -> dict[str, Any]:
    return {name: value for name, value in dotted(values) if not isinstance(value, dict)}


def _sections(settings: dict) -> dict[str, type]:
    """Return the class of each section of settings."""
    kinds = get_type_hints(Recipe)
    kinds["model"] = type(read_shape(settings.get("model", {})))
    return {field.name: kinds[field.name] for field in fields(Recipe)}


def _library_defaults(settings: dict) -> dict:
    # The recipe of a model of transformers names all of it: there is no default.
    kinds = {n: kind for n, kind in _sections(settings).items() if kind is not CausalLMConfig}
    return {name: plain(asdict(kind())) for name, kind in kinds.items()}


def units_of(settings: dict) -> dict[str, str]:
    """Return the unit of each setting that has one, by dotted name."""
    return {
        f"{section}.{name}": rule.unit
        for section, kind in _sections(settings).items()
        for name, rule in rules_of(kind).items()
        if rule.unit
    }


def format_value(value: Any, unit: str = "") -> str:
    """Return a setting as it is read: numbers with their unit and commas, lists as JSON."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        number = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        return f"{number} {singular(unit) if value == 1 else unit}".strip()
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
