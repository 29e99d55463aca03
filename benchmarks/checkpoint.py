"""Checkpoints against their peers: what a save adds to training, and how soon a run goes on.

Every figure stands beside a peer's that was measured in turn with it. The medians are printed, all
values go to a JSON, and `README.md` says what each row means.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from measuring import Row, build_parser, say, timed, with_eta, write_report

import pretrain_lib as pl
from pretrain_lib.checkpoint.writer import CheckpointWriter
from pretrain_lib.distributed.engine import choose_precision
from pretrain_lib.optim.groups import build_adamw
from pretrain_lib.training.step import accumulate_gradients, apply_update

WIDTH, HEAD_WIDTH = 768, 64  # of GPT-2 124M
BATCH, T = 2, 512
STEPS = 2  # in a group: one that a save may run beside, one for what it leaves behind
LEARNING_RATE, CLIP = 1e-4, 1.0
RECIPE = Path(__file__).parents[1] / "recipes" / "gpt2_124m.py"
SMALL = "--batch.tokens 1024 --batch.micro_batch 1 --schedule.warmup_tokens 1024 "
SMALL += "--data.validation none --samples.prompts [] --scores.tasks []"
ALONE, PEERS = "no save", ("torch.save", "accelerator.save_state")


@dataclass
class Training:
    """A model in training, as Accelerate prepared it."""

    accelerator: Accelerator
    model: pl.GPT2
    optimizer: torch.optim.Optimizer


@dataclass
class Group:
    """What some steps took that a save came before."""

    seconds: float = 0.0
    blocked: float = 0.0  # of which the loop stood still for the save
    committed: float = 0.0  # from the beginning of our save until it was whole on the disk


class Added(Row):
    """A row of differences: too noisy for a ratio each, so it has the ratio of the medians."""

    @property
    def ratio(self) -> float | None:
        """The ratio of the medians, unless the peer's is nothing but noise."""
        return self.median / median(self.peer) if median(self.peer) > 0 else None


def begin_training(width: int) -> Training:
    """Return a GPT-2 of a width, whose optimizer has moments."""
    say("warming up")
    accelerator = Accelerator(mixed_precision=choose_precision("bf16", cpu=False)[0])
    config = pl.GPT2Config(width=width, num_heads=width // HEAD_WIDTH)
    model = pl.GPT2(config).initialize(0).to(accelerator.device)
    optimizer = build_adamw(model, learning_rate=LEARNING_RATE)
    training = Training(accelerator, *accelerator.prepare(model, optimizer))
    for _ in range(2):  # the first steps are slow: buffers, and the moments
        run_step(training)
    return training


def run_step(training: Training, before_update: Callable[[], object] = lambda: None) -> None:
    """Make an optimizer step on random tokens."""
    parts = training.accelerator, training.model
    ids = torch.randint(parts[1].config.vocabulary_size, (BATCH, T + 1), device=parts[0].device)
    batches = [{"input_ids": ids[:, :-1], "targets": ids[:, 1:]}]
    accumulated = accumulate_gradients(*parts, batches, seed=0, step=0)
    before_update()
    options = {"learning_rate": LEARNING_RATE, "max_grad_norm": CLIP}
    apply_update(*parts, training.optimizer, accumulated, **options)


def save_beside(training: Training, folder: Path) -> Callable:
    """Begin to write our checkpoint; return what has to be called before the next update."""
    writer = CheckpointWriter(folder, training.model, tokenizer=None, manifest={})
    writer.start(pl.TrainingState(), training.model, training.optimizer)
    return writer.wait


def save_ours(training: Training, folder: Path) -> None:
    """Write our checkpoint and wait for it."""
    parts = pl.TrainingState(), training.model, training.optimizer
    pl.save_checkpoint(folder, *parts, tokenizer=None, manifest={})


def load_ours(training: Training, folder: Path) -> None:
    """Find our newest checkpoint, which reads it whole against its hashes, and load it."""
    pl.load_checkpoint(pl.find_newest(folder), training.model, training.optimizer)


def save_torch(training: Training, folder: Path, *, flush: bool = False) -> None:
    """Write one file as most scripts do, and flush it to the disk if asked to."""
    parts, path = {"model": training.model, "optimizer": training.optimizer}, folder / "all.pt"
    folder.mkdir()
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)
    if flush:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def load_torch(training: Training, folder: Path) -> None:
    """Load one file."""
    states = torch.load(folder / "all.pt", map_location="cpu", weights_only=True)
    training.model.load_state_dict(states["model"])
    training.optimizer.load_state_dict(states["optimizer"])


def save_accelerate(training: Training, folder: Path) -> None:
    """Write a folder as the scripts of Accelerate do."""
    training.accelerator.save_state(str(folder))


SAVES: dict[str, Callable[[Training, Path], Callable | None]] = {
    "torch.save": save_torch,
    "accelerator.save_state": save_accelerate,
    "ours": save_beside,
    "ours, waited for": save_ours,
    "torch.save and fsync": partial(save_torch, flush=True),
}
LOADS = {
    "torch.load": (save_torch, load_torch),
    "accelerator.load_state": (save_accelerate, lambda t, f: t.accelerator.load_state(str(f))),
    "ours": (save_ours, load_ours),
}


def run_group(training: Training, save: Callable | None, folder: Path) -> Group:
    """Save, make the steps of a group, and return what they took."""
    group, started = Group(), time.perf_counter()
    finish = save and save(training, folder)
    group.blocked = time.perf_counter() - started

    def wait() -> None:
        reached = time.perf_counter()
        saved = finish and finish()
        if saved:
            assert saved.error is None, saved.error
            group.committed = saved.seconds
            group.blocked += time.perf_counter() - reached

    for _ in range(STEPS):
        run_step(training, wait)
    group.seconds = time.perf_counter() - started
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()  # each group begins with nothing left to write
    return group


def measure_save(training: Training, folder: Path, repeat: int) -> Iterator[Row]:
    """Yield the rows of what a save adds to training."""
    groups: dict[str, list[Group]] = {name: [] for name in (ALONE, *SAVES)}
    orders = [random.Random(number).sample([*SAVES], len(SAVES)) for number in range(repeat)]
    for name in with_eta([name for order in orders for name in order]):
        for each in (ALONE, name):
            groups[each].append(run_group(training, SAVES.get(each), folder / "saved"))
    alone = [group.seconds for group in groups.pop(ALONE)]
    # A machine does not stay equally fast: the steps alone are those of the same repetition.
    bases = [median(alone[n : n + len(SAVES)]) for n in range(0, len(alone), len(SAVES))]
    added, blocked = {}, {}
    for name, some in groups.items():
        added[name] = [group.seconds - base for group, base in zip(some, bases, strict=True)]
        blocked[name] = [group.blocked for group in some]
    better = min(PEERS, key=lambda name: median(added[name]))
    note = f"{min(alone):.2f} to {max(alone):.2f}"
    yield Row("save", f"{STEPS} steps, {ALONE}", "s", alone, note=note)
    for name, own in added.items():
        goal = "ratio <= 0.25" if name == "ours" and median(added[better]) > 0 else ""
        note = f"{min(own):.2f} to {max(own):.2f}"
        yield Added("save", name, "s", own, added[better], goal, note)
    better = min(PEERS, key=lambda name: median(blocked[name]))
    for name, own in blocked.items():
        yield Row("blocked", name, "s", own, blocked[better])
    whole = "torch.save and fsync"
    yield Row("committed", whole, "s", blocked[whole], blocked[whole])
    yield Row("committed", "ours", "s", [g.committed for g in groups["ours"]], blocked[whole])


def measure_load(training: Training, folder: Path, repeat: int) -> Iterator[Row]:
    """Yield the rows of loading, from the page cache."""
    seconds: dict[str, list[float]] = {name: [] for name in LOADS}
    for name, (save, _) in LOADS.items():
        save(training, folder / name)
    for name in with_eta([*LOADS] * repeat):
        load = LOADS[name][1]
        seconds[name].append(timed(lambda load=load, name=name: load(training, folder / name)))
    for name, own in seconds.items():
        shutil.rmtree(folder / name)
        yield Row("load", name, "s", own, seconds["torch.load"])


def first_step(flags: list[str], run: Path) -> float:
    """Return the seconds from the start of the recipe's process to the end of its first step."""
    started = time.perf_counter()
    command = [sys.executable, str(RECIPE), *flags, "--run.dir", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        reached = any(line.startswith("step ") for line in process.stdout)
        seconds = time.perf_counter() - started
        process.kill()  # before it saves: the next start is to find what this one found
    if not reached:
        sys.exit(f"error: {' '.join(command)} made no step, see above")
    return seconds


def measure_resume(width: int, folder: Path, repeat: int) -> Iterator[Row]:
    """Yield the rows of the recipe's start, with and without a checkpoint."""
    text = shutil.copy(argparse.__file__, str(folder / "text.txt"))  # any will do
    job = pl.Job((text,), train_tokenizer=512, validation="none")
    pl.prepare(job, folder / "prepared", quiet=True)
    sizes = f"--model.width {width} --model.num_heads {width // HEAD_WIDTH}"
    flags = [*SMALL.split(), *sizes.split(), "--data.path", str(folder / "prepared")]
    seconds: dict[str, list[float]] = {"from nothing": [], "resumed": []}
    command = [sys.executable, str(RECIPE), *flags, "--run.dir", str(folder / "resumed")]
    subprocess.run([*command, "--run.max_steps", "1"], check=True, stdout=subprocess.DEVNULL)
    for name in with_eta([*seconds] * repeat):
        seconds[name].append(first_step(flags, folder / name))
    for name, own in seconds.items():
        yield Row("resume", name, "s", own, seconds["from nothing"])


HEADERS = {
    "save": "Added by a save: seconds, and times the better peer (by the medians); goal: a quarter",
    "blocked": "Of which the loop stands still: seconds, and times the better peer",
    "committed": "Until the checkpoint is on the disk: seconds, and times torch.save with an fsync",
    "load": "Load: seconds, and times torch.load",
    "resume": "The recipe, process start to first step: seconds, and times without a checkpoint",
}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows."""
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        training = begin_training(options.width)
        yield from measure_save(training, folder, options.repeat)
        yield from measure_load(training, folder, options.repeat)
        del training  # the recipe needs the memory
        yield from measure_resume(options.width, folder, options.repeat)


def main() -> None:
    """Measure checkpoints and write the results."""
    parser = build_parser(main.__doc__, "checkpoint")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: temporary)")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the model, a multiple of 64")
    options = parser.parse_args()
    write_report(measure(options), options, headers=HEADERS)


if __name__ == "__main__":
    main()
