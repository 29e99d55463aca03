"""Detect which configuration file `accelerate launch` used, so that a run can report it."""

from pathlib import Path

import psutil
import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser

from pretrain_lib.distributed.launched import find_launcher


def launch_configuration() -> dict:
    """Return the configuration file of the launcher, whether it is the default one, its settings.

    Without `--config_file` and `--cpu`, the launcher uses the user's default file if there is one.
    `file` is None if there was no launcher or no file.
    """
    none = {"file": None, "default": False, "settings": {}}
    launcher = find_launcher()
    try:
        words = None if launcher is None else _launch_words(launcher.cmdline())
    except psutil.Error:  # the launcher has ended
        words = None
    if words is None:
        return none
    arguments, _ = launch_command_parser().parse_known_args(words)
    if arguments.config_file is not None:
        file, default = arguments.config_file, False
    elif Path(default_config_file).is_file() and not arguments.cpu:
        file, default = default_config_file, True
    else:
        return none
    return {"file": file, "default": default, "settings": _read_settings(file, launcher)}


def _launch_words(command: list[str]) -> list[str] | None:
    """Return the arguments of `accelerate launch` in a command line, None for another command."""
    names = [Path(word).name for word in command]
    for i, name in enumerate(names):
        if name == "launch" and i and "accelerate" in names[i - 1]:
            return command[i + 1 :]
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[i + 1 :]
    return None


def _read_settings(file: str, launcher: psutil.Process) -> dict:
    try:
        return yaml.safe_load(Path(launcher.cwd(), file).read_text()) or {}  # also parses JSON
    # The file may have changed since the launcher read it, or the launcher may have ended.
    except (OSError, psutil.Error, yaml.YAMLError):
        return {}


def default_line(configuration: dict) -> str | None:
    """Return a remark if the launcher used the user's default file, else None."""
    if not configuration["default"]:
        return None
    settings = ", ".join(f"{name} {value}" for name, value in configuration["settings"].items())
    return (
        f"launched without --config_file: your default {configuration['file']} was used "
        f"({settings})"
    )
