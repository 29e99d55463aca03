"""A run killed again and again is the run that was never killed: every batch, every row."""

import importlib
import json
import os
import pickle
import random
import signal
import sys
import threading
from collections import defaultdict
from pathlib import Path

import pytest
import xxhash

from pretrain_lib import GPT2, Job, open_corpus, prepare, start_accelerator
from pretrain_lib import train as train_function
from pretrain_lib.config.units import TokenCount
from tests.conftest import change, read_rows, run_python

STEPS, KILLS = 40, 20
KILLED = (
    "from tests.training.test_run_kills import kill_again_and_again; kill_again_and_again({!r})"
)


def log_batches(recipe, log, *, fatal_step=None, delay=0.0):
    """Train to the end, or into the kill that follows the beginning of a step after `delay`."""
    module = sys.modules["pretrain_lib.training.loop"]
    # It takes a second and is a field of the clock.
    sys.modules["pretrain_lib.training.measurements"].device_peak = lambda *_: None
    accumulate_gradients, kill = module.accumulate_gradients, (os.getpid(), signal.SIGKILL)

    def logged_step(accelerator, model, micro_batches, **options):
        digest = xxhash.xxh3_64()
        for batch in micro_batches:
            for name, tensor in batch.items():
                digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        with log.open("a") as file:
            file.write(f"{options['step']} {digest.hexdigest()}\n")
        if fatal_step is not None and options["step"] >= fatal_step:
            threading.Timer(delay, os.kill, kill).start()
        return accumulate_gradients(accelerator, model, micro_batches, **options)

    module.accumulate_gradients = logged_step
    model = GPT2(recipe.model).initialize(recipe.run.seed)
    train_function(recipe, model, open_corpus(recipe), start_accelerator(recipe))
    if fatal_step is not None:  # the end came sooner
        os.kill(*kill)


def run_in_child(*arguments, **options):
    """Return how a fork of this process ended, which trains."""
    if (child := os.fork()) == 0:
        log_batches(*arguments, **options)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_again_and_again(folder):
    """Run the recipe in a folder once, then again with `KILLS` kills; print how each start ended.

    This process computes nothing, so that it has no threads that a fork would lose; it imports
    what every start would otherwise import again.
    """
    importlib.import_module("torch._dynamo")
    folder, draw = Path(folder), random.Random(0)
    whole, killed = pickle.loads((folder / "recipes").read_bytes())
    ends = [run_in_child(whole, folder / "whole.log")]
    for fatal_step in sorted(draw.sample(range(STEPS), KILLS)):
        delay = draw.choice([0.0, 0.02]) * draw.random()  # in the step, or in what follows it
        log = folder / "killed.log"
        ends.append(run_in_child(killed, log, fatal_step=fatal_step, delay=delay))
    ends.append(run_in_child(killed, folder / "killed.log"))
    print(json.dumps(ends))


def read_log(path):
    """Return what was seen of each step."""
    steps = defaultdict(set)
    for line in path.read_text().splitlines():
        step, digest = line.split()
        steps[int(step)].add(digest)
    return steps


@pytest.fixture
def mixture(prepared, tmp_path_factory):
    """A second folder of the same tokenizer."""
    text = tmp_path_factory.mktemp("other_text")
    for number in range(40):
        words = random.Random(number).choices(
            ["for", "while", "return", "self"], k=10 + 20 * number
        )
        (text / f"{number}.txt").write_text(" ".join(words))
    folder = tmp_path_factory.mktemp("other") / "prepared"
    job = Job((str(text),), tokenizer=str(prepared / "tokenizer"), validation="hash:0.2")
    prepare(job, folder, quiet=True)
    packing = {"packing": "best_fit", "document_masking": True}
    return packing | {"path": [str(prepared), str(folder)], "weights": [3.0, 1.0]}


@pytest.mark.slow
@pytest.mark.parametrize("data", ["plain", "mixture"])
def test_a_run_killed_twenty_times_is_the_run_that_was_never_killed(
    recipe, tmp_path, data, request
):
    settings = request.getfixturevalue(data) if data == "mixture" else {}
    whole = change(recipe, data=settings, schedule={"tokens": TokenCount(STEPS * 256)})
    whole = change(whole, checkpoint={"every": 2}, validation={"every": 8}, samples={"every": 16})
    killed = change(whole, run={"dir": str(tmp_path / "killed")})
    (tmp_path / "recipes").write_bytes(pickle.dumps((whole, killed)))
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    code = KILLED.format(str(tmp_path))
    result = run_python("-c", code, environment=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [0, *[-signal.SIGKILL] * KILLS, 0]
    expected, seen = read_log(tmp_path / "whole.log"), read_log(tmp_path / "killed.log")
    assert sorted(expected) == list(range(STEPS))
    assert len(set.union(*expected.values())) == STEPS
    assert seen == expected
    assert len((tmp_path / "killed.log").read_text().splitlines()) > STEPS  # some ran again
    assert read_rows(killed.run.dir) == read_rows(whole.run.dir)
    samples = [(Path(config.run.dir) / "samples.jsonl").read_text() for config in (whole, killed)]
    assert samples[0] == samples[1]
