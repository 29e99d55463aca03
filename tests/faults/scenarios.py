"""What is struck by faults: whole commands, each in a process, writing below one folder.

`given` is a folder of inputs, made once by `make_inputs`; a scenario writes below `root`.
"""

import itertools
import json
import random
import shutil
import sys
from pathlib import Path

import torch

import pretrain_lib as pl
from pretrain_lib import GPT2, Job, open_corpus, prepare, run_recipe, start_accelerator, train
from pretrain_lib.commands.cli import main as pretrain
from pretrain_lib.data.prepare import spool as spools
from pretrain_lib.errors import report_errors
from pretrain_lib.export import check, reload
from pretrain_lib.training import run as runs

WORDS = ("sun", "moon", "cloud", "rain", "river", "stone", "élan", "字")
VOCABULARY, STEP_TOKENS = 300, 32
SHAPE = {"num_layers": 1, "num_heads": 1, "width": 8, "context_length": 8}
SHAPE_FLAGS = [part for name, size in SHAPE.items() for part in (f"--model.{name}", str(size))]


def make_inputs(given):
    """Write the text, the prepared folder and the runs from which the scenarios start."""
    make_data(given)
    assert train_tiny(given, given / "half", "--run.max_steps", "2") == 0
    assert export(given, given) == 0


def make_data(given):
    """Write the text and the prepared folder."""
    draw, rows = random.Random(0), []
    for _ in range(100):
        words = [draw.choice(WORDS) + str(draw.randrange(99)) for _ in range(80)]
        rows.append({"text": " ".join(words)})
    given.mkdir()
    (given / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job((str(given / "text.jsonl"),), train_tokenizer=VOCABULARY, validation="hash:0.2")
    prepare(job, given / "data", workers=1, quiet=True)


def begun(name, root, given):
    """Put what a scenario starts from into its root."""
    if name == "resume, save, prune":
        shutil.copytree(given / "half", root / "run")
    if name == "export":
        shutil.copytree(given / "out", root / "out")


def train_tiny(given, folder, *flags):
    """Run a tiny recipe as a program; return its exit code."""
    runs.device_peak = lambda *_: None  # it takes a second and is a field of the clock
    recipe = pl.Recipe(
        model=pl.GPT2Config(vocabulary_size=VOCABULARY, **SHAPE),
        data=pl.DataConfig(path=str(given / "data")),
        batch=pl.BatchConfig(tokens=STEP_TOKENS, micro_batch=4, sequence_length=8),
        optimizer=pl.OptimizerConfig(learning_rate=1e-2),
        schedule=pl.ScheduleConfig(tokens=4 * STEP_TOKENS, warmup_tokens=STEP_TOKENS),
        samples=pl.SampleConfig(prompts=["sun"], per_prompt=1, tokens=2, every=2),
        run=pl.RunConfig(dir=str(folder)),
        checkpoint=pl.CheckpointConfig(every=2, keep_last=1),
        validation=pl.ValidationConfig(every=2, tokens=64),
    )

    def main(config):
        model = GPT2(config.model)
        model.initialize(config.run.seed)
        return train(config, model, open_corpus(config), start_accelerator(config))

    return _exit_code(lambda: run_recipe(main, recipe), "recipe.py", *flags)


def _exit_code(program, *words):
    sys.argv = [str(word) for word in words]
    try:
        program()
    except SystemExit as end:
        return end.code
    return 0


def first_start(root, given):
    """Train four steps with two saves, from nothing."""
    return train_tiny(given, root / "run")


def resume(root, given):
    """Go on from a checkpoint, save, prune the one before."""
    return train_tiny(given, root / "run")


def prepare_text(root, given):
    """Turn text into shards."""
    flags = ("--train_tokenizer", VOCABULARY, "--validation", "first:200", "--workers", 1)
    words = ("pretrain", "prepare", given / "text.jsonl", "--out", root / "data", *flags)
    return _exit_code(pretrain, *words)


def fill_spool(root, given):
    """Write the first segments of a stream, deleting those that have been read."""
    job = Job(
        (str(given / "text.jsonl"),), str(given / "data" / "tokenizer"), validation="first:200"
    )

    def fill():
        spool = spools.open_spool(job, root / "spool", segment_tokens=512, quiet=True)
        with spools.lock_folder(spool.folder, setting="data.path"):
            for segment in itertools.islice(spools._write_segments(spool, 0, 1), 4):
                spools._delete_far_from(spool, max(0, segment - 1))
        # The units are read ahead, and the last cursor is written after what it belongs to.
        shutil.rmtree(spool.folder / spools.UNITS)
        spool.cursor_path(4).unlink(missing_ok=True)

    return report_errors(fill, user_errors=(ValueError, OSError))


def export(root, given):
    """Export a checkpoint over an earlier export; transformers reloads it in this process."""

    def reload_here(folder, expected):
        problems, difference = reload.find_problems(folder, expected)
        return {"problems": problems, "difference": difference}

    check._reload = reload_here
    words = ("pretrain", "export", given / "half", "--out", root / "out")
    return _exit_code(pretrain, *words)


def write_tasks(root, given):
    """Write tasks of held-out text."""
    words = ("pretrain", "tasks", given / "data", "--out", root / "tasks", "--items", 4)
    return _exit_code(pretrain, *words)


SCENARIOS = {
    "first start, save": first_start,
    "resume, save, prune": resume,
    "prepare": prepare_text,
    "spool": fill_spool,
    "export": export,
    "tasks": write_tasks,
}


def run(name, root, given):
    """Run a scenario with one thread, or make the inputs of all; return its exit code."""
    torch.set_num_threads(1)
    if name == "inputs":
        return make_inputs(Path(given))
    return SCENARIOS[name](Path(root), Path(given))
