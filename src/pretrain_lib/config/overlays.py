"""Read YAML overlays of a recipe strictly: UTF-8 only, no duplicate keys."""

from pathlib import Path
from typing import Any

import yaml

from pretrain_lib.values import show
from pretrain_lib.wording import in_line

NULLS = ("~", "Null", "NULL")  # what YAML writes null as, besides null
PREFIX = "tag:yaml.org,2002:"
TAGS = tuple(PREFIX + kind for kind in ("str", "int", "float", "bool", "null", "seq", "map"))


class StrictLoader(yaml.BaseLoader):
    """Loads scalars as text, to be parsed by each setting's `Rule`.

    Rejects duplicate keys, and tags that would make something else of a value.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; raises ConstructorError for a tag of another kind."""
        if node.tag not in TAGS:
            tag = show(node.tag.replace(PREFIX, "!!"))
            raise yaml.constructor.ConstructorError(
                None, None, f"the tag {tag} is not allowed: values are plain", node.start_mark
            )
        return super().construct_object(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        """Return the text of a scalar, in which an unquoted ~ is null."""
        is_null = node.style is None and node.value in NULLS
        return "null" if is_null else super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return a mapping; raises ConstructorError for a duplicate key, or one that is no name."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, problem = self.construct_object(key_node, deep=True), None
            if not isinstance(key, str):
                problem = f"the key {show(key)} is not a name"
            elif key in lines:
                problem = f"{show(key)} stands twice, also in line {lines[key]}"
            if problem is not None:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, problem, mark)
            lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


def read_overlay(name: str) -> dict[str, Any]:
    """Read the settings of a YAML file, as text by dotted name; empty sections are ignored.

    Raises ValueError, with the file's name in a message of one line, if the file is not valid.
    """
    content = _load(name)
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold sections of settings, such as run: {{seed: 1}}")
    settings = {}
    for section, values in content.items():
        if values in ("", "null"):
            continue
        if not isinstance(values, dict):
            section, value = show(section), show(values)
            outer, dot, inner = section.partition(".")
            if dot:
                raise ValueError(
                    f"{name}: {section} is a setting in a section: write {outer}: {{{inner}: "
                    f"{value}}}"
                )
            raise ValueError(
                f"{name}: {section} must hold settings, such as run: {{seed: 1}}, not {value}"
            )
        settings |= {f"{section}.{field}": value for field, value in values.items()}
    return settings


def _load(name: str) -> Any:
    path = Path(name).expanduser()
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), StrictLoader)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{name} is not UTF-8 (byte 0x{byte:02x} at position {error.start}): save it as UTF-8"
        ) from error
    except OSError as error:
        raise ValueError(f"--config {show(name)} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{name}{where}: {in_line(error.problem)}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name} is no YAML: {in_line(error)}") from error
