"""Check that the processes and settings of a launch match the recipe."""

import os
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers

from pretrain_lib.config.settings import Recipe
from pretrain_lib.values import did_you_mean
from pretrain_lib.wording import plural

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.FSDP,
)
RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by every launcher
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


@dataclass(frozen=True)
class Login:
    """The ways in which a tracker can be logged in, or used without a login."""

    command: str
    key: str
    """The environment variable of the API key."""
    files: tuple[str, ...]
    """Files in which the login may be stored instead."""
    holds: str = ""
    """A string that such a file contains if it has the login."""
    mode: str = ""
    """The environment variable that makes the tracker log to this machine only."""
    local: tuple[str, ...] = ("offline",)
    """The values of `mode` that do so."""


LOGINS = {
    "wandb": Login(
        "wandb login",
        "WANDB_API_KEY",
        ("~/.netrc", "~/_netrc"),
        holds="wandb",
        mode="WANDB_MODE",
        local=("offline", "disabled", "dryrun"),
    ),
    "comet_ml": Login("comet login", "COMET_API_KEY", ("~/.comet.config",)),
    "clearml": Login("clearml-init", "CLEARML_API_ACCESS_KEY", ("~/clearml.conf",)),
    "swanlab": Login(
        "swanlab login",
        "SWANLAB_API_KEY",
        ("~/.swanlab/.netrc",),
        mode="SWANLAB_MODE",
        local=("local", "offline", "disabled"),
    ),
}


def check_launch() -> None:
    """Raise ValueError if the environment sets a world size but not the rest of a launch."""
    count = os.environ.get("WORLD_SIZE", "1")
    if not (count.isdecimal() and int(count) > 0):
        raise ValueError(f"WORLD_SIZE={count} in the environment must be a number of processes")
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if int(count) > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE={count} is set in the environment, but not {', '.join(missing)}: start "
            f"with accelerate launch, which sets them all, or unset WORLD_SIZE"
        )


def check_trackers(wanted: list[str]) -> None:
    """Raise ValueError for a tracker that is not installed, or needs a login."""
    installed = [str(name) for name in get_available_trackers()]
    for name in wanted:
        if name not in installed:
            raise ValueError(
                f"log.trackers={wanted}: {name} is not installed, or unknown to Accelerate; "
                f"installed: {', '.join(installed) or 'none'} (install pretrain_lib[trackers])"
                f"{did_you_mean(name, installed)}"
            )
        if name in LOGINS and not _is_logged_in(LOGINS[name]):
            login = LOGINS[name]
            stay = f", or {login.mode}={login.local[0]} to stay on this machine" * bool(login.mode)
            raise ValueError(
                f"log.trackers={wanted}: {name} needs a login: run `{login.command}`, or set "
                f"{login.key}{stay}"
            )


def _is_logged_in(login: Login) -> bool:
    if os.environ.get(login.key) or os.environ.get(login.mode) in login.local:
        return True
    files = (Path(file).expanduser() for file in login.files)
    return any(file.is_file() and login.holds in file.read_text(encoding="utf-8") for file in files)


def check_world(accelerator: Accelerator, *, launched: int, expected: int | None) -> None:
    """Raise ValueError if the world size is not the number of processes launched or expected."""
    running, kind = accelerator.num_processes, accelerator.distributed_type
    if kind not in SUPPORTED:
        raise ValueError(
            f"distributed_type={kind.value} is not supported: give accelerate launch one of the "
            f"files in accelerate_configs/ (one process, DDP, or FSDP2)"
        )
    if running != launched:
        raise ValueError(
            f"{launched} processes were started but Accelerate runs {running}: give accelerate "
            f"launch one of the files in accelerate_configs/"
        )
    if expected is not None and running != expected:
        raise ValueError(
            f"system.processes={expected} but {running} run: check num_processes in the "
            f"configuration of accelerate launch (for several processes on CPUs: cpu_2proc.yaml)"
        )


def check_accumulation(config: Recipe, *, processes: int) -> None:
    """Raise ValueError if the launcher's gradient accumulation differs from the recipe's."""
    batch, stated = config.batch, os.environ.get(ACCUMULATION, "1")
    derived = batch.tokens // (processes * batch.micro_batch * batch.sequence_length)
    if stated not in ("1", str(derived)):
        raise ValueError(
            f"gradient_accumulation_steps={stated} was given to accelerate launch ({ACCUMULATION}) "
            f"but batch.tokens={batch.tokens} makes "
            f"{plural(derived, 'micro-batch', 'micro-batches')} on "
            f"{plural(processes, 'process', 'processes')}: omit it, and change batch.tokens or "
            f"batch.micro_batch instead"
        )
