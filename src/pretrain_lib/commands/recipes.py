"""The subcommands for recipes: new, train, completion."""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from pretrain_lib.commands.outputs import check_out
from pretrain_lib.config.flags import Parser, add_argument
from pretrain_lib.errors import EXIT_CODE_FILE
from pretrain_lib.values import Rule, did_you_mean

# The recipes of this package, each with the files that lie beside it: overlays and size tables.
RECIPES = {
    "gpt2_124m": (
        "presets.py",
        "quickstart.yaml",
        "gpt2_5_epochs.yaml",
        "gpt2_t2048.yaml",
        "basic.yaml",
        "shakespeare_char.yaml",
    ),
    "llama_1_3b": (),
}
ANSWERED_AT_ONCE = {"--help", "-h", "--print_config", "--plan"}  # they start no processes
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def run_new(options: argparse.Namespace) -> None:
    """Copy a recipe and its overlays into a folder, to be changed there."""
    name, out = options.recipe, options.out
    check_out(out, is_folder=True)
    files = (f"{name}.py", *RECIPES[name])
    if there := [file for file in files if (out / file).exists()]:
        raise ValueError(f"{out / there[0]} is there already: give another folder, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(packaged("recipes") / file, out / file)
    print(f"{out / files[0]}: the recipe, to be changed")
    if overlays := [file for file in files if file.endswith(".yaml")]:
        print(f"{out}: {', '.join(overlays)}, for --config")
    print(f"Train it with: pretrain train {out / files[0]} --data.source TEXT --run.dir RUN")


def run_train(options: argparse.Namespace) -> int:
    """Run a recipe under `accelerate launch`, and return the exit code of the recipe itself."""
    chosen, flags = _split(options)
    recipe = find_recipe(options.recipe)
    flags = find_overlays(flags, recipe.parent)
    if ANSWERED_AT_ONCE & {flag.partition("=")[0] for flag in flags}:
        return subprocess.run([sys.executable, recipe, *flags]).returncode
    words = ["--quiet", *launch_flags(chosen), str(recipe), *flags]
    print(f"accelerate launch {shlex.join(words)}", flush=True)
    return _launch([sys.executable, "-m", "accelerate.commands.launch", *words])


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
    found, is_overlay = [], False
    for flag in flags:
        head, equals, value = flag.partition("=")
        if is_overlay:
            flag = _overlay(flag, folder)
        elif equals and head == "--config":
            flag = f"--config={_overlay(value, folder)}"
        is_overlay = flag == "--config"
        found.append(flag)
    return found


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
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    raise ValueError(
        f"--config_file {name} is neither a file nor one of {', '.join(known)}"
        f"{did_you_mean(name, known)}"
    )


def _split(options: argparse.Namespace) -> tuple[argparse.Namespace, list[str]]:
    """Separate the flags of `pretrain train` that stand behind RECIPE from the recipe's own."""
    parser = Parser(prog="pretrain train", add_help=False)
    add_train_flags(parser)
    return argparse.ArgumentParser.parse_known_args(parser, options.arguments, options)


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say on what a recipe is started."""
    group = parser.add_mutually_exclusive_group()
    gpus = Rule(int, minimum=1, maximum=4096, help="GPUs to use; by default all that there are")
    add_argument(group, "--gpus", gpus, metavar="N")
    file = Rule(Path, help="a configuration of accelerate launch: a file, or the name of ours")
    add_argument(group, "--config_file", file, metavar="FILE")


def _launch(command: list[str]) -> int:
    """Run a launcher, handing on signals; return the exit code that the recipe wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "code")
        process = subprocess.Popen(command, env=os.environ | {EXIT_CODE_FILE: str(file)})
        for number in FORWARDED:
            signal.signal(number, lambda number, _: process.send_signal(number))
        # A terminal sends Ctrl-C to all of its processes, and the run saves before it ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = process.wait()
        return int(file.read_text()) if file.is_file() else code
