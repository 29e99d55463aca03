"""Which configuration file `accelerate launch` took, so that none comes in unseen."""

from pathlib import Path

import psutil
import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser

from pretrain_lib.distributed.launched import find_launcher


def launch_configuration() -> dict:
    """Return the file that the launcher read, whether as the user's default, and what it says.

    Without `--config_file` the launcher takes the default file of its user, if there is one,
    unless it is given `--cpu`. The file is None if there was no launcher, or no file.
    """
    none = {"file": None, "default": False, "settings": {}}
    launcher = find_launcher()
    try:
        words = None if launcher is None else _launch_words(launcher.cmdline())
    except psutil.Error:  # it has ended
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
    """Return what follows `accelerate launch` in a command line, None if it is another."""
    names = [Path(word).name for word in command]
    for i, name in enumerate(names):
        if name == "launch" and i and "accelerate" in names[i - 1]:
            return command[i + 1 :]
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[i + 1 :]
    return None


def _read_settings(file: str, launcher: psutil.Process) -> dict:
    try:
        return yaml.safe_load(Path(launcher.cwd(), file).read_text()) or {}  # JSON, too
    # Changed since the launcher read it, which restarts survive; or the launcher has ended.
    except (OSError, psutil.Error, yaml.YAMLError):
        return {}


def default_line(configuration: dict) -> str | None:
    """Return what to say about a file that nobody named, None if there is none."""
    if not configuration["default"]:
        return None
    settings = ", ".join(f"{name} {value}" for name, value in configuration["settings"].items())
    return (
        f"launched without --config_file: {configuration['file']} was taken, your default "
        f"({settings})"
    )
