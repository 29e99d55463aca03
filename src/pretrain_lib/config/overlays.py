"""YAML overlays of a recipe, read strictly: in UTF-8, no key twice, no unknown name."""

from pathlib import Path
from typing import Any

import yaml


class StrictLoader(yaml.BaseLoader):
    """Reads scalars as text, which each setting's rule makes a value of; refuses a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return a mapping; raises ConstructorError where a key stands twice."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{key} stands twice, also in line {lines[key]}",
                    key_node.start_mark,
                )
            lines[key] = line
        return super().construct_mapping(node, deep=deep)


def read_overlay(name: str) -> dict[str, Any]:
    """Return what a YAML file sets, by dotted name, as text; a section without keys sets nothing.

    Raises ValueError, in one line with the file's name, for what cannot be read.
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
            raise ValueError(
                f"{name}: {section} must hold settings, such as run: {{seed: 1}}, not {values}"
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
        raise ValueError(f"--config {name} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{name}{where}: {' '.join(str(error.problem).split())}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name} is no YAML: {' '.join(str(error).split())}") from error
