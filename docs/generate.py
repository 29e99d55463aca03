"""Writes the pages of `docs/reference/` from the code: settings, commands, public names.

Pages that live elsewhere in the repository (the READMEs of recipes and benchmarks, CHANGELOG,
CONTRIBUTING) are copied there, with their links adapted. `make docs` runs this before MkDocs.

python docs/generate.py
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from pretrain_lib import CausalLMConfig, GPT2Config, LlamaConfig, Recipe
from pretrain_lib.commands.cli import build_parser
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.models.rope import RopeScaling
from pretrain_lib.values import rules_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from presets import GPT2_PRESETS  # noqa: E402

TARGET = ROOT / "docs" / "reference"
REPOSITORY = "https://github.com/pretrain-lib/pretrain_lib"
COPIED = {
    "recipes.md": "recipes/README.md",
    "benchmark_scripts.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
GROUPS = {  # of the Python API, by package
    "data": "Text and tokens",
    "corpus": "The data of a run",
    "models": "Models",
    "optim": "Optimizer and schedules",
    "training": "Training",
    "distributed": "Training",
    "checkpoint": "Checkpoints and exports",
    "export": "Checkpoints and exports",
    "evaluate": "Evaluation",
    "config": "Settings of a run",
}


def settings_page() -> str:
    """Return the reference of all settings, from their dataclasses."""
    hints = get_type_hints(Recipe)
    parts = [
        "# Settings",
        "Every setting of a run. A setting is given as a flag, `--batch.micro_batch 32`, or in a "
        "YAML overlay, `batch: {micro_batch: 32}`. Later ones win: the recipe, `--preset`, each "
        "`--config`, flags. A recipe replaces many of the defaults below; `--print_config` prints "
        "the values that it runs with. `null` means that the setting is not used.",
        "Numbers of tokens are written 524288, 375M or 10e9; durations 90, 45s, 30m, 2h or 1.5d; "
        "lists `'[a, b]'`, quoted for the shell.",
    ]
    for section in dataclasses.fields(Recipe):
        if section.name == "model":
            parts += _model_sections()
            continue
        parts += _section(section.name, section.name, hints[section.name])
    return "\n\n".join(parts) + "\n"


def _model_sections() -> list[str]:
    scaling = "The fields of `model.rope_scaling`, written as a mapping: `{kind: llama3, ...}`."
    return [
        *_section("model of a GPT-2", "model", GPT2Config),
        *_section("model of a LLaMA", "model", LlamaConfig),
        *_section("model of transformers (the recipe causal_lm)", "model", CausalLMConfig),
        "### model.rope_scaling",
        scaling,
        _settings_table("model.rope_scaling", RopeScaling),
    ]


def _section(title: str, name: str, section: type) -> list[str]:
    sentence = (section.__doc__ or "").splitlines()[0]
    return [f"## {title}", sentence, _settings_table(name, section)]


def _settings_table(name: str, section: type) -> str:
    rules = rules_of(section)
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(section):
        rule = rules[field.name]
        unit = f"; {rule.unit}" if rule.unit else ""
        cells = (
            f"`{name}.{field.name}`",
            _default(field),
            _text(rule.describe() + unit),
            _text(rule.help),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{_text(text)}`"


def commands_page() -> str:
    """Return the reference of the command line, from its parsers."""
    parser = build_parser()
    parts = [
        "# Command line",
        "`pretrain COMMAND --help` prints what stands here. All commands exit with 0 when done and "
        "2 after bad input, which is reported in one line; a run that was stopped and can be "
        "resumed exits with 75.",
        _flags_table(parser),
        "| command | |\n|---|---|\n"
        + "\n".join(f"| [`{name}`](#{name}) | {_text(text)} |" for name, _, text in _commands()),
    ]
    for name, command, text in _commands():
        usage = command.format_usage().replace("usage: ", "", 1).replace("\n       ", "\n").strip()
        parts += [f"## {name}", _text(text), f"```text\n{usage}\n```", _flags_table(command)]
    return "\n\n".join(part for part in [*parts, *_recipe_flags()] if part) + "\n"


def _commands() -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    (commands,) = (a for a in build_parser()._actions if hasattr(a, "_choices_actions"))
    texts = {action.dest: action.help or "" for action in commands._choices_actions}
    for name, parser in commands.choices.items():
        yield name, parser, texts.get(name) or parser.description or ""


def _flags_table(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if action.help in (None, argparse.SUPPRESS) or "--help" in action.option_strings:
            continue
        if hasattr(action, "_choices_actions"):
            continue
        names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        takes = "" if action.nargs == 0 or not action.option_strings else f" {_metavar(action)}"
        required = "; required" if action.required and action.option_strings else ""
        repeated = "; one or several" if action.nargs == "+" else ""
        text = (action.help % {"prog": parser.prog, "default": action.default}) + repeated
        rows.append(f"| `{names}{takes}` | {_text(text)}{required} |")
    return "\n".join(["| argument | meaning |", "|---|---|", *rows]) if rows else ""


def _metavar(action: argparse.Action) -> str:
    if action.metavar:
        return str(action.metavar)
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _recipe_flags() -> list[str]:
    """Return the section on the flags of a recipe that are no settings."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parse_recipe(Recipe(model=GPT2Config()), presets=GPT2_PRESETS, arguments=["--help"])
    options = printed.getvalue().split("\nmodel:", 1)[0].split("options:\n", 1)[-1]
    return [
        "## Flags of a recipe",
        "`pretrain train RECIPE` and `accelerate launch ... recipes/RECIPE.py` take these, and "
        "every [setting](settings.md) as `--section.field VALUE`.",
        f"```text\n{options.rstrip()}\n```",
    ]


def api_page() -> str:
    """Return the reference of the public names, to be filled in by mkdocstrings."""
    stub = (ROOT / "src" / "pretrain_lib" / "__init__.pyi").read_text()
    names = re.findall(r"^from \.([\w.]+) import (\w+) as \w+$", stub, re.MULTILINE)
    titles: dict[str, list[str]] = {title: [] for title in GROUPS.values()}
    for module, name in names:
        title = GROUPS.get(module.partition(".")[0], "Other")
        block = f"::: pretrain_lib.{module}.{name}"
        if module.startswith("config.") or name in ("GPT2Config", "LlamaConfig"):
            block += "\n    options:\n      members: false\n      show_signature: false"
        titles.setdefault(title, []).append(block)
    parts = [
        "# Python API",
        "All public names: `import pretrain_lib as pl`, then `pl.NAME`. Everything else may change "
        "from one version to the next. [As a library](../library.md) has scripts that use them. "
        "The fields of the settings classes are listed in [Settings](settings.md).",
    ]
    for title, blocks in titles.items():
        parts += [f"## {title}", *blocks] if blocks else []
    return "\n\n".join(parts) + "\n"


def copied_page(source: str) -> str:
    """Return a page of the repository with its links adapted to `docs/reference/`."""
    return LINK.sub(lambda match: _adapted(match, source), (ROOT / source).read_text())


def _adapted(match: re.Match, source: str) -> str:
    text, address = match.groups()
    path, hash_sign, anchor = address.partition("#")
    if "://" in address or not path:
        return match[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    pages = {there: here for here, there in COPIED.items()}
    if path in pages:
        address = pages[path]
    elif path.startswith("docs/") and path.endswith(".md"):
        address = f"../{path.removeprefix('docs/')}"
    else:
        address = f"{REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
    return f"[{text}]({address}{hash_sign}{anchor})"


def _text(value: Any) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def pages() -> dict[str, str]:
    """Return every generated page, by its file name."""
    os.environ["COLUMNS"] = "96"  # the width of what argparse prints
    made = {
        "settings.md": settings_page(),
        "commands.md": commands_page(),
        "api.md": api_page(),
    }
    return made | {name: copied_page(source) for name, source in COPIED.items()}


def main() -> None:
    """Write the generated pages."""
    TARGET.mkdir(exist_ok=True)
    for name, text in pages().items():
        (TARGET / name).write_text(text)
        print(TARGET / name)


if __name__ == "__main__":
    main()
