"""From the start of a process to the first optimizer step, and of the commands; against nanoGPT.

Repetitions go round all of them. What each row means stands in `README.md`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from measuring import Row, build_parser, in_turn, timed, write_report

RECIPE = Path(__file__).parents[1] / "recipes" / "gpt2_124m.py"
# Ours with options: a name, and flags of the recipe. As in contenders.OURS.
OURS = {"ours": ["--system.compile", "false"], "ours compiled": ["--system.compile", "true"]}
T, TOKENS = 1024, 20_000
SMALL = f"--batch.tokens {T} --batch.micro_batch 1 --schedule.warmup_tokens {T} "
SMALL += "--data.validation none --samples.prompts [] --scores.tasks []"
NANOGPT = {"nanoGPT": False, "nanoGPT compiled": True}
COMPILED, AGAIN = " compiled", " again"  # the second with what the first has compiled
DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"
SAME = "--batch_size=1 --gradient_accumulation_steps=1 --eval_iters=0 --max_iters=0"
SAME += " --always_save_checkpoint=False"


def seconds_until(line: str, command: list[str], cache: Path, folder: Path | None = None) -> float:
    """Return the seconds from the start of a command to a line that begins so, and end it.

    What torch compiles is kept in `cache`.
    """
    # Without a buffer, so that a line is seen when it is written.
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": folder, "env": environment}
    started = time.perf_counter()
    with subprocess.Popen(command, **options) as process:
        reached = any(text.startswith(line) for text in process.stdout)
        seconds = time.perf_counter() - started
        process.kill()
    if not reached:
        sys.exit(f"error: {' '.join(command)} made no step, see above")
    return seconds


def prepare_data(folder: Path) -> None:
    """Write a few tokens, as our recipe reads them and as nanoGPT's script does."""
    import numpy as np

    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 50257, TOKENS, dtype=np.uint16)
    for name in ("train.bin", "val.bin"):
        ids.tofile(folder / name)


def start_ours(flags: list[str], folder: Path, cache: Path) -> float:
    """Return the seconds until the first step of our recipe."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    data = ["--data.path", str(folder / "tokens" / "train.bin"), "--run.dir", str(run)]
    command = [sys.executable, str(RECIPE), *SMALL.split(), *data, *flags]
    return seconds_until("step ", command, cache)


def start_nanogpt(checkout: Path, compiled: bool, folder: Path, cache: Path) -> float:
    """Return the seconds until the first step of nanoGPT's script, which evaluates nothing."""
    flags = [f"--dataset={folder / 'tokens'}", f"--out_dir={folder / 'out'}"]
    flags += [f"--device={DEVICE}", f"--compile={compiled}", *SAME.split()]
    return seconds_until("iter 0", [sys.executable, "train.py", *flags], cache, checkout)


def twice(name: str, start: Callable[[Path], float], folder: Path) -> dict[str, Callable]:
    """Return the starts of a script: with nothing compiled before, and if it compiles again."""
    cache = folder / f"cache-{name.replace(' ', '-')}"  # the compiler stumbles over spaces

    def start_afresh() -> float:
        shutil.rmtree(cache, ignore_errors=True)
        return start(cache)

    again = {f"{name}{AGAIN}": lambda: start(cache)} if name.endswith(COMPILED) else {}
    return {name: start_afresh} | again


def run_python(code: str) -> float:
    """Return the seconds of a process that runs a line of Python."""
    return timed(lambda: subprocess.run([sys.executable, "-c", code], check=True))


def run_help() -> float:
    """Return the seconds of `pretrain --help`."""
    script = Path(sysconfig.get_path("scripts"), "pretrain")
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    return timed(lambda: run([str(script), "--help"]))


COMMANDS = {
    "import torch": lambda: run_python("import torch"),
    "import transformers": lambda: run_python("import transformers"),
    "import pretrain_lib": lambda: run_python("import pretrain_lib"),
    "pretrain --help": run_help,
}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_data(folder / "tokens")
        starts = {}
        for name, flags in OURS.items():
            starts |= twice(name, partial(start_ours, flags, folder), folder)
        for name, compiled in NANOGPT.items() if options.nanogpt else ():
            start = partial(start_nanogpt, options.nanogpt, compiled, folder)
            starts |= twice(name, start, folder)
        values = in_turn(COMMANDS | starts, options.repeat)
    for name in COMMANDS:
        goal = "ratio <= 1" if "pretrain" in name else ""
        yield Row("commands", name, "s", values[name], values["import torch"], goal)
    for name in starts:
        peer = f"nanoGPT{name.removeprefix('ours')}"  # of the same kind
        goal = "ratio <= 1" if name != peer and peer in values else ""
        yield Row("first step", name, "s", values[name], values.get(peer), goal)


HEADERS = {
    "commands": "Whole processes: seconds, and times `import torch`",
    "first step": "Process start to first step: seconds, and times nanoGPT's script, as compiled",
}


def main() -> None:
    """Measure starts and write the results."""
    parser = build_parser(main.__doc__, f"startup_{DEVICE}")
    parser.add_argument("--nanogpt", metavar="PATH", type=Path, help="its checkout")
    options = parser.parse_args()
    # As nanoGPT's script chooses it.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if DEVICE == "cuda" else "no"
    write_report(measure(options), options, headers=HEADERS)


if __name__ == "__main__":
    main()
