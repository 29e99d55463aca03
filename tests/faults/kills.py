"""Kills runs while they save, again and again, and looks at what each kill has left on the disk.

A save shows from outside: files appear in its staging folder, it is renamed, older checkpoints go.
So a watcher can wait for a phase and kill in it, and by what lies there afterwards it is known in
which phase the kill has fallen. To be called in a process that has computed nothing, so that it
has no threads that a fork would lose.
"""

import importlib
import math
import os
import random
import shutil
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

import pretrain_lib as pl
from pretrain_lib import GPT2, open_corpus, start_accelerator, train
from pretrain_lib.checkpoint import folders as files
from pretrain_lib.checkpoint.parts import moments_file
from pretrain_lib.files.locks import lock_folder
from pretrain_lib.models.weight_files import WEIGHTS
from pretrain_lib.run_folder.folder import CHECKPOINTS
from tests.conftest import VOCABULARY, read_rows

OPTIMIZER = moments_file(0, 1)
STEPS, SAVE_EVERY, KEEP_LAST = 20, 2, 2
PHASES = (
    "staging",
    "writing tensors",
    "listing files",
    "flushing",
    "committed, not pruned",
    "pruning",
    "between saves",
    "before the first save",
)
FLUSHING, COMMITTED, PRUNING, BETWEEN, STARTING = range(3, 8)
AIMS = (*range(len(PHASES)), *range(BETWEEN))  # at what is not within a save half as often
POLL_SECONDS = 2e-4


@dataclass
class Report:
    """What came of all kills."""

    kills: int = 0
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """How long each takes in a run that is not killed, the median."""
    lost: list[str] = field(default_factory=list)
    """Checkpoints that were committed, that pruning had to keep, and that were not whole after."""
    broken: list[str] = field(default_factory=list)
    """What was wrong with folders that have the name of a checkpoint."""
    accepted_broken: list[str] = field(default_factory=list)
    """Those of them that a resume would have taken."""
    chains: int = 0
    """Runs that came to their end, after however many kills."""
    different: list[str] = field(default_factory=list)
    """What in them was not as in the run that was never killed."""

    @property
    def within_save(self) -> int:
        """Kills between the first write of a save and the end of its prune."""
        return sum(self.phases[phase] for phase in PHASES[:BETWEEN])


class Start(NamedTuple):
    """What a run is started on: its newest step (0: none), names and inodes of what a kill left."""

    newest: int
    leftovers: frozenset[tuple[str, int]]


class Sight(NamedTuple):
    """How far a run has come, as seen from outside: in the save of `step` or the one before."""

    step: int
    phase: int
    committed: frozenset[str]


class Shot(NamedTuple):
    """A kill to come: `delay` seconds into a phase of the how-many-th save of a start."""

    phase: int
    saves: int
    delay: float


def inject(folder, prepared, *, kills=25, seed=0, aims=AIMS, after_kill=lambda report: None):
    """Train on `prepared` in `folder`, killed so many times, and report what came of it.

    The runs are compared with one that was never killed; `after_kill` is given the report so far.
    """
    importlib.import_module("torch._dynamo")  # what every start would otherwise import again
    reference, whole = folder / "reference", folder / "whole"
    run_to_end(build_recipe(prepared, reference, keep_last=0))
    seconds = run_to_end(build_recipe(prepared, whole))
    report = Report(phase_seconds=seconds, different=differences(whole, reference))
    shots = draw_shots(kills, seed, aims, seconds)
    while shots:
        run = folder / f"killed-{report.chains}"
        for seen in kill_until_it_ends(build_recipe(prepared, run), shots, report):
            check_what_is_left(run / CHECKPOINTS, seen, reference / CHECKPOINTS, report)
            after_kill(report)
            if report.lost:
                return report  # a run does not begin anew where its checkpoints are gone
        report.chains += 1
        report.different += differences(run, reference)
        shutil.rmtree(run)
    return report


def draw_shots(kills, seed, aims, seconds):
    """Draw the kills of a seed: each phase of `aims` in turn, at any instant that it lasts."""
    draw = random.Random(seed)
    phases = islice(cycle(draw.sample(aims, len(aims))), kills)
    return [Shot(p, draw.randint(1, 2), draw.random() * seconds[PHASES[p]]) for p in phases]


def build_recipe(prepared, folder, *, keep_last=KEEP_LAST):
    """Return a run whose checkpoints are large enough to be hit while they are written."""
    shape = {"num_layers": 4, "num_heads": 4, "width": 256}
    return pl.Recipe(
        model=pl.GPT2Config(vocabulary_size=VOCABULARY, context_length=32, **shape),
        data=pl.DataConfig(path=str(prepared)),
        batch=pl.BatchConfig(tokens=128, micro_batch=2, sequence_length=32),
        optimizer=pl.OptimizerConfig(learning_rate=1e-3),
        schedule=pl.ScheduleConfig(tokens=STEPS * 128, warmup_tokens=2 * 128),
        run=pl.RunConfig(dir=str(folder)),
        checkpoint=pl.CheckpointConfig(every=SAVE_EVERY, keep_last=keep_last),
        validation=pl.ValidationConfig(every=4, tokens=512),
    )


def start_run(recipe):
    """Return a fork of this process that trains, from the newest checkpoint if there is one."""
    child = get_context("fork").Process(target=train_in_child, args=(recipe,))
    child.start()
    return child


def train_in_child(recipe):
    """Train in fp32 with one thread, what it says appended to `console.log` in the run folder."""
    folder = Path(recipe.run.dir)
    folder.mkdir(exist_ok=True)
    with (folder / "console.log").open("a") as console:
        for stream in (1, 2):
            os.dup2(console.fileno(), stream)
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    # It takes a second and is a field of the clock.
    sys.modules["pretrain_lib.training.measurements"].device_peak = lambda *_: None
    model = GPT2(recipe.model).initialize(recipe.run.seed)
    with lock_folder(folder, setting="run.dir"):  # as the recipes do
        train(recipe, model, open_corpus(recipe), start_accelerator(recipe))


@contextmanager
def look_at_start(checkpoints):
    """Look at a folder of checkpoints before a run is started on it."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    found = list(checkpoints.glob(".step-*"))
    held = [os.open(path, os.O_RDONLY) for path in found]  # so that no inode is given out again
    newest = max((step_of(path.name) for path in checkpoints.glob("step-*")), default=0)
    yield Start(newest, frozenset((path.name, path.stat().st_ino) for path in found))
    for descriptor in held:
        os.close(descriptor)


def step_of(name):
    """Return the step of `step-00000002`, or of a leftover of it."""
    return int(files.NAME.search(name)[1])


def locate(checkpoints, start):
    """Return how far a run has come since its start, by what lies on the disk."""
    entries = {entry.name: entry.inode() for entry in os.scandir(checkpoints)}
    committed = frozenset(name for name in entries if name.startswith("step-"))
    new = {name for name, inode in entries.items() if (name, inode) not in start.leftovers}
    for name in new - committed:
        if name.endswith(".tmp"):
            written = [
                (checkpoints / name / file).exists()
                for file in (OPTIMIZER, files.STATE, files.FILES)
            ]
            return Sight(step_of(name), sum(written), committed)
    newest = max(map(step_of, committed), default=0)
    if newest == start.newest:
        return Sight(newest, STARTING, committed)
    if new - committed:
        return Sight(newest, PRUNING, committed)
    return Sight(newest, COMMITTED if len(committed) > KEEP_LAST else BETWEEN, committed)


def watch(child, checkpoints, start):
    """Yield the time and what is seen, again and again until the child has ended."""
    while child.exitcode is None:
        yield time.monotonic(), locate(checkpoints, start)
        time.sleep(POLL_SECONDS)


def check_end(child, recipe, *others):
    """Make sure that a run has come to its end, or has ended in one of the other ways."""
    assert child.exitcode in (0, *others), Path(recipe.run.dir, "console.log").read_text()


def run_to_end(recipe):
    """Run a recipe to its end and return how long each phase takes, the median."""
    checkpoints, seconds = Path(recipe.run.dir, CHECKPOINTS), {phase: [0.0] for phase in PHASES}
    with look_at_start(checkpoints) as start:
        since, position = time.monotonic(), (0, STARTING)
        for now, sight in watch(child := start_run(recipe), checkpoints, start):
            if sight[:2] != position:
                seconds[PHASES[position[1]]].append(now - since)
                since, position = now, sight[:2]
    check_end(child, recipe)
    return {phase: statistics.median(spans[1:] or spans) for phase, spans in seconds.items()}


def kill_until_it_ends(recipe, shots, report):
    """Start a run again and again until it ends, killed as long as there are shots.

    Yields after each kill which checkpoints had been seen before it.
    """
    checkpoints = Path(recipe.run.dir, CHECKPOINTS)
    while True:
        with look_at_start(checkpoints) as start:
            child = start_run(recipe)
            seen = strike(child, checkpoints, start, shots[0] if shots else None)
            check_end(child, recipe, -signal.SIGKILL)
            if child.exitcode == 0:
                return  # before the shot, which is for the next run
            report.kills += 1
            report.phases[PHASES[locate(checkpoints, start).phase]] += 1
        del shots[0]
        yield seen


def target_of(shot, start):
    """Return the step and the phase that a shot waits for."""
    if shot.phase == STARTING:
        return start.newest, shot.phase
    step = start.newest + shot.saves * SAVE_EVERY
    if shot.phase in (COMMITTED, PRUNING):
        step = max(step, (KEEP_LAST + 1) * SAVE_EVERY)  # the first save that has what to prune
    return step, shot.phase


def strike(child, checkpoints, start, shot):
    """Kill a run where the shot says; return the checkpoints that were seen before."""
    target = target_of(shot, start) if shot else (math.inf, 0)
    seen, deadline = set(), math.inf
    for now, sight in watch(child, checkpoints, start):
        seen |= sight.committed
        if deadline == math.inf and sight[:2] >= target:
            deadline = now + shot.delay
        if now >= deadline:
            child.kill()
            child.join()
    return seen


def check_what_is_left(checkpoints, seen, expected, report):
    """Report what is lost or broken after a kill, where `seen` were committed before it.

    `expected` holds the same checkpoints of a run that was not killed.
    """
    problems = {
        path.name: files.verify_checkpoint(path) + different_tensors(path, expected / path.name)
        for path in sorted(checkpoints.glob("step-*"))
    }
    report.broken += [line for lines in problems.values() for line in lines]
    to_keep = sorted(seen | problems.keys())[-KEEP_LAST:]
    report.lost += [str(checkpoints / name) for name in to_keep if problems.get(name) != []]
    newest = files.find_newest(checkpoints)
    if newest is not None and problems[newest.name]:
        report.accepted_broken.append(str(newest))


def different_tensors(path, expected):
    """Return a line for each file of tensors that is not byte for byte the expected one."""
    return [
        f"{path / file}: not that of the run that was not killed"
        for file in (WEIGHTS, OPTIMIZER)
        if (path / file).exists() and (path / file).read_bytes() != (expected / file).read_bytes()
    ]


def differences(run, reference):
    """Return in what a run that came to its end is not the reference."""
    rows = [] if read_rows(run) == read_rows(reference) else [f"{run}: other rows of metrics"]
    last, expected = (files.checkpoint_path(path / CHECKPOINTS, STEPS) for path in (run, reference))
    return rows + files.verify_checkpoint(last) + different_tensors(last, expected)
