"""The subcommands for recipes: new, train, completion."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pretrain_lib.commands.launching import Stopped, launch, on_signals, read_settings, stop
from pretrain_lib.config.flags import Parser, add_argument
from pretrain_lib.config.units import Duration
from pretrain_lib.errors import RESUMABLE
from pretrain_lib.files.outputs import check_folder
from pretrain_lib.files.writes import write_files
from pretrain_lib.values import Rule, did_you_mean

# The recipes of this package, each with the files that lie beside it: overlays and size tables.
RECIPES = {
    "gpt2_124m": (
        "presets.py",
        "quickstart.yaml",
        "gpt2_124m_fast.yaml",
        "gpt2_5_epochs.yaml",
        "gpt2_t2048.yaml",
        "shakespeare_char.yaml",
    ),
    "llama_1_3b": ("basic.yaml",),
    "causal_lm": ("pythia_160m.yaml", "smollm2_135m.yaml", "qwen3_0_6b.yaml"),
    "qwen3_124m": (),
}
HELP = {"--help", "-h"}
ANSWERED_AT_ONCE = HELP | {"--print_config", "--plan"}  # they start no processes


def run_new(options: argparse.Namespace) -> None:
    """Copy a recipe and its overlays into a folder, to be changed there."""
    name, out = options.recipe, options.out
    # It adds to a folder of the user's own and replaces no file there.
    check_folder(out, named="FOLDER ", kind="a folder", is_ours=lambda _: True)
    files = (f"{name}.py", *RECIPES[name])
    if existing := [file for file in files if (out / file).exists()]:
        raise ValueError(f"{out / existing[0]} is there already: give another folder, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    write_files({out / file: (packaged("recipes") / file).read_bytes() for file in files})
    print(f"{out / files[0]}: the recipe, to be changed")
    if overlays := [file for file in files if file.endswith(".yaml")]:
        print(f"{out}: {', '.join(overlays)}, for --config")
    print(f"Train it with: pretrain train {out / files[0]} --data.source TEXT --run.dir RUN")


def run_train(options: argparse.Namespace) -> int:
    """Run a recipe under `accelerate launch`, and return the exit code of the recipe itself."""
    chosen, flags = split_flags(options, add_train_flags)
    recipe = find_recipe(options.recipe)
    flags = find_overlays(flags, recipe.parent)
    if questions := ANSWERED_AT_ONCE & {flag.partition("=")[0] for flag in flags}:
        flags = _as_flags_of_recipe(chosen, questions) + flags
        return subprocess.run([sys.executable, recipe, *flags]).returncode
    try:
        with on_signals(stop):
            words = ["--quiet", *launch_flags(chosen), str(recipe), *flags]
            if chosen.budget is not None:
                from pretrain_lib.commands.budget import within_budget  # imports torch: slow

                words += within_budget(words, read_settings(recipe, flags), chosen.budget)
            print(f"accelerate launch {shlex.join(words)}", flush=True)
            code, _ = launch(words)
            return code
    except Stopped:
        print("stopped before the run began: the same command starts it", flush=True)
        return RESUMABLE


def _as_flags_of_recipe(chosen: argparse.Namespace, asked: set[str]) -> list[str]:
    """Return the recipe's own flags for those of the launch, where no process is started.

    Raises ValueError for one that has no effect there.
    """
    if not asked.isdisjoint(HELP):
        return []
    planned = chosen.gpus is not None and "--plan" in asked
    for name in ("budget", "config_file", *(() if planned else ("gpus",))):
        if getattr(chosen, name) is not None:
            raise ValueError(f"--{name} is for training: leave it out with {min(asked)}")
    return ["--system.processes", str(chosen.gpus)] if planned else []


def run_completion(options: argparse.Namespace) -> None:
    """Print the completion script of a shell."""
    import shtab

    from pretrain_lib.commands.cli import build_parser

    print(shtab.complete(build_parser(), options.shell))


def packaged(name: str) -> Path:
    """Return a folder of data that the installed package has inside, a checkout at its top."""
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_dir() else package.parents[1] / name


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, given by its path or by the name of one of this package."""
    if name in RECIPES:
        return packaged("recipes") / f"{name}.py"
    path = Path(name).expanduser()
    if path.suffix == ".py" and path.is_file():
        return path
    raise ValueError(
        f"RECIPE {name} is neither a recipe of this package ({', '.join(RECIPES)}) nor the path of "
        f"a .py file{did_you_mean(name, RECIPES)}"
    )


def find_overlays(flags: list[str], folder: Path) -> list[str]:
    """Replace the names of overlays that lie beside the recipe, in `folder`, by their paths."""
    overlays, is_overlay = [], False
    for flag in flags:
        head, equals, value = flag.partition("=")
        if is_overlay:
            flag = _overlay(flag, folder)
        elif equals and head == "--config":
            flag = f"--config={_overlay(value, folder)}"
        is_overlay = flag == "--config"
        overlays.append(flag)
    return overlays


def _overlay(name: str, folder: Path) -> str:
    beside = folder / Path(name).with_suffix(".yaml")
    return name if Path(name).expanduser().exists() or not beside.is_file() else str(beside)


def launch_flags(chosen: argparse.Namespace) -> list[str]:
    """Return the flags of `accelerate launch` for the chosen file or GPUs, or for this machine."""
    import torch  # slow to import: not needed by the other commands

    if chosen.config_file is not None:
        return ["--config_file", str(_launch_configuration(chosen.config_file))]
    gpus, cores = torch.cuda.device_count(), torch.get_num_threads()
    wanted = gpus if chosen.gpus is None else chosen.gpus
    if wanted > gpus:
        raise ValueError(f"--gpus {wanted} is more than the {gpus} GPUs that torch sees here")
    is_mac = torch.backends.mps.is_available()
    name = "ddp_8gpu" if wanted > 1 else "single_gpu" if wanted == 1 or is_mac else "cpu"
    flags = ["--config_file", str(packaged("accelerate_configs") / f"{name}.yaml")]
    if wanted > 1:
        flags += ["--num_processes", str(wanted)]
    return [*flags, "--num_cpu_threads_per_process", str(max(1, cores // max(1, wanted)))]


def _launch_configuration(name: Path) -> Path:
    """Return a configuration of `accelerate launch`, given by path or by the name of one here."""
    if name.is_file():
        return name
    folder = packaged("accelerate_configs")
    if (packed := folder / name.with_suffix(".yaml").name).is_file():
        return packed
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    raise ValueError(
        f"--config_file {name} is neither a file nor one of {', '.join(names)}"
        f"{did_you_mean(name, names)}"
    )


def split_flags(
    options: argparse.Namespace, add_flags: Callable[[argparse.ArgumentParser], None]
) -> tuple[argparse.Namespace, list[str]]:
    """Separate the flags of a command that stand behind RECIPE from the recipe's own.

    `add_flags` adds the command's flags to a parser.
    """
    parser = Parser(prog=f"pretrain {options.command}", add_help=False)
    add_flags(parser)
    return argparse.ArgumentParser.parse_known_args(parser, options.arguments, options)


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pretrain train`."""
    text = "shorten the schedule to what this machine trains in such a time"
    budget = Rule(Duration, minimum=1, unit="seconds", help=text)
    add_argument(parser, "--budget", budget, metavar="TIME")
    add_device_flags(parser)


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say on what a recipe is started."""
    group = parser.add_mutually_exclusive_group()
    gpus = Rule(int, minimum=1, maximum=4096, help="GPUs to use; by default all that there are")
    add_argument(group, "--gpus", gpus, metavar="N")
    file = Rule(Path, help="a configuration of accelerate launch: a file, or the name of ours")
    add_argument(group, "--config_file", file, metavar="FILE")


def add_tune_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pretrain tune`."""
    budget = Rule(Duration, minimum=1, unit="seconds", help="the time that all runs may take")
    add_argument(parser, "--budget", budget, default="2h", metavar="TIME")
    width = Rule(int, minimum=1, help="width of the smaller model; by default about 256")
    add_argument(parser, "--width", width, metavar="N")
    add_argument(parser, "--out", Rule(Path, help="where the runs go: runs/tune_RECIPE"))
    add_device_flags(parser)
