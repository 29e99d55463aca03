"""Detect which configuration file `accelerate launch` used, so that a run can report it."""

from argparse import Namespace
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
    launcher, arguments = _launch()
    if arguments is not None and arguments.config_file is not None:
        file, default = arguments.config_file, False
    elif arguments is not None and Path(default_config_file).is_file() and not arguments.cpu:
        file, default = default_config_file, True
    else:
        return {"file": None, "default": False, "settings": {}}
    return {"file": file, "default": default, "settings": _read_settings(file, launcher)}


def names_precision() -> bool:
    """Return whether somebody asked for the precision that the launcher handed on.

    Without a flag or a file that says otherwise, `accelerate launch` asks for fp32.
    """
    _, arguments = _launch()
    if arguments is None or arguments.mixed_precision is not None:
        return True  # the environment was set by hand, or by the flag
    return "mixed_precision" in launch_configuration()["settings"]


def launch_remarks(*, processes: int) -> list[str]:
    """Return remarks on a launch that may not be what was meant."""
    _, arguments = _launch()
    configuration = launch_configuration()
    remarks = [default_line(configuration)]
    by_file = configuration["settings"].get("num_processes")
    wanted = getattr(arguments, "num_processes", None) or by_file or 1
    if arguments is not None and arguments.cpu and wanted > processes == 1:
        remarks.append(
            f"`accelerate launch --cpu` starts one process, not the {wanted} asked for: for two on "
            f"the CPU use --config_file accelerate_configs/cpu_2proc.yaml without --cpu"
        )
    return [remark for remark in remarks if remark is not None]


def _launch() -> tuple[psutil.Process | None, Namespace | None]:
    """Return the launcher and its arguments; both are None if there is none."""
    launcher = find_launcher()
    try:
        words = None if launcher is None else _launch_words(launcher.cmdline())
    except psutil.Error:  # the launcher has ended
        words = None
    if words is None:
        return None, None
    return launcher, launch_command_parser().parse_known_args(words)[0]


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
        text = Path(launcher.cwd(), file).read_text(encoding="utf-8")
        return yaml.safe_load(text) or {}  # also parses JSON
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
