"""What several tests share: a small prepared folder, a tiny recipe, the real launcher."""

import dataclasses
import gc
import json
import os
import random
import subprocess
import sys
import types
from collections import Counter
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import pytest

# Before anything imports the hub's client: no test may reach for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# As lm-eval sets it when it is imported: commands would have it or not by what ran before.
os.environ.setdefault("HF_XET_HIGH_PERFORMANCE", "1")

from pretrain_lib import (  # noqa: E402
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    GPT2Config,
    Job,
    OptimizerConfig,
    Recipe,
    RunConfig,
    SampleConfig,
    ScheduleConfig,
    ValidationConfig,
    prepare,
)
from pretrain_lib.data.prepare.job import TOKENIZER_FOLDER  # noqa: E402
from pretrain_lib.data.text.tokenizer import load_tokenizer  # noqa: E402
from pretrain_lib.evaluate.local_tasks import write_local_tasks  # noqa: E402
from tests.forks import forked_python, start_server  # noqa: E402

ROOT = Path(__file__).parent.parent
VOCABULARY = 512
OTHER = ("transformers==4.57.*", "tokenizers>=0.22,<0.23", "huggingface-hub<1")
WORDS = ("sun", "moon", "cloud", "rain", "wind", "river", "stone", "élan", "naïve", "字", "été")


def pytest_configure(config):
    """Start the fork server that the workers of a parallel session share."""
    if config.getoption("numprocesses", None):
        start_server()


def pytest_collection_modifyitems(items):
    """Begin with the files of most slow tests: no process is left alone with them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Let every test start the Accelerator that it wants: its state is shared by the process."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session", autouse=True)
def warm_workers():
    """Fork the worker processes of all tests from one that has imported what they import.

    What has been imported is left out of garbage collection: every run ends with one.
    """
    gc.collect()
    gc.freeze()
    forkserver.set_forkserver_preload(["tests.conftest", "datasets", "hypothesis"])
    forkserver.ensure_running()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder prepared from some modules of the standard library: about 100K tokens."""
    import argparse
    import inspect
    import tarfile
    import typing

    text = tmp_path_factory.mktemp("text")
    for module in (argparse, inspect, tarfile, typing, subprocess, dataclasses):
        for number, part in enumerate(Path(module.__file__).read_text().split("\ndef ")):
            (text / f"{module.__name__}-{number:03d}.txt").write_text(part)
    folder = tmp_path_factory.mktemp("data") / "prepared"
    prepare(Job((str(text),), train_tokenizer=VOCABULARY, validation="hash:0.1"), folder)
    return folder


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """The variables under which a process imports transformers 4.57, and torch from here."""
    target = tmp_path_factory.mktemp("transformers457")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    pip += ["--target", target]
    installed = run_command(*pip, *OTHER)
    assert installed.returncode == 0, installed.stderr
    variables = {"PYTHONPATH": python_path(target)}
    code = "import transformers; print(transformers.__version__)"
    version = run_command(sys.executable, "-c", code, environment=variables)
    assert version.stdout.startswith("4.57."), version.stderr
    return variables


@pytest.fixture
def recipe(prepared, tmp_path):
    """A run of 8 steps of a tiny GPT-2 that takes a second or two."""
    return small_recipe(prepared, tmp_path)


def small_recipe(prepared, folder):
    """Return the recipe of the fixture `recipe`, with its run in a folder."""
    return Recipe(
        model=GPT2Config(
            vocabulary_size=VOCABULARY, context_length=32, num_layers=2, num_heads=2, width=32
        ),
        data=DataConfig(path=str(prepared)),
        batch=BatchConfig(tokens=256, micro_batch=2, sequence_length=32),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(tokens=8 * 256, warmup_tokens=2 * 256),
        samples=SampleConfig(prompts=["def "], per_prompt=1, tokens=8, every=4),
        run=RunConfig(dir=str(folder / "run")),
        checkpoint=CheckpointConfig(every=3),
        validation=ValidationConfig(every=4, tokens=512),
    )


def change(recipe, **sections):
    """Return a recipe with other values: `change(recipe, run={"seed": 1})`."""
    changed = {
        name: dataclasses.replace(getattr(recipe, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(recipe, **changed)


def tiny_flags(prepared, folder):
    """Return the flags that shrink the GPT-2 recipe to seconds."""
    return [
        *("--data.path", str(prepared), "--run.dir", str(folder)),
        *("--model.vocabulary_size", str(VOCABULARY), "--model.context_length", "32"),
        *("--model.num_layers", "2", "--model.num_heads", "2", "--model.width", "32"),
        *("--batch.tokens", "256", "--batch.micro_batch", "2", "--batch.sequence_length", "32"),
        *("--schedule.tokens", "2048", "--schedule.warmup_tokens", "512"),
        *("--validation.every", "4", "--validation.tokens", "512", "--samples.prompts", "[]"),
        *("--scores.tasks", "[]"),
    ]


@pytest.fixture(params=["pipe", "disk"])
def unread(request):
    """A descriptor to print to in vain: a pipe whose reader has gone, a log on a full disk."""
    if request.param == "disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, descriptor = os.pipe()
        os.close(reading)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def disk(tmp_path):
    """A file system of 40 MB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(disk):
    """Fill a disk to the last byte; return the file that does."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (2**20, 2**12):
            while True:
                try:
                    file.write(b"\0" * size)
                except OSError:
                    break
    return path


def write_text_and_tasks(folder, *, items):
    """Write prepared `data` of words in several scripts, and `tasks` from its held-out part."""
    draw = random.Random(0)
    texts = [
        " ".join(draw.choice(WORDS) + str(draw.randrange(1000)) for _ in range(100))
        for _ in range(60)
    ]
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = Job(sources=(str(source),), train_tokenizer=400, validation="hash:0.2")
    prepare(job, folder / "data", quiet=True)
    sizes = {"context_characters": 120, "ending_characters": 40, "document_characters": 500}
    write_local_tasks(folder / "data", folder / "tasks", items=items, **sizes)
    return load_tokenizer(folder / "data" / TOKENIZER_FOLDER)


def run_command(*arguments, environment=None, timeout=300):
    """Run a command from the repository with this interpreter's environment."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        [str(a) for a in arguments],
        cwd=ROOT,
        env=env | (environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_python(*arguments, environment=None, timeout=300):
    """Run `python ARGUMENTS` as `run_command` does, in a fork that has imported the library."""
    command = [forked_python(), *arguments]
    return run_command(*command, environment=environment, timeout=timeout)


def run_pretrain(*arguments, environment=None):
    """Run the installed command `pretrain` in a fork that has imported the library."""
    command = [Path(sys.executable).with_name("pretrain"), *arguments]
    return run_python(*command, environment=environment)


@pytest.fixture
def forked_reload():
    """Have a fork reload what is exported, where the point is not that the process is fresh."""
    with reloading_in_forks():
        yield


@contextmanager
def reloading_in_forks():
    """Do what the fixture `forked_reload` does."""
    from pretrain_lib.export import check

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "sys", types.SimpleNamespace(executable=forked_python()))
        yield


def accelerate_script():
    """Return the script that the command `accelerate` runs."""
    return str(Path(sys.executable).with_name("accelerate"))


def forked_workers():
    """Return the variables by which a launcher of several processes starts them as forks."""
    python = forked_python()  # which sets the others, perhaps only now
    server = {name: value for name, value in os.environ.items() if name.startswith("FORKS_")}
    return {"PYTHON_EXEC": python, **server}


def forked_launchers():
    """Return the variables by which `accelerate launch`, and all that it starts, are forks."""
    python = forked_python()
    folders = [Path(python).with_name("bin"), Path(sys.executable).parent, os.environ["PATH"]]
    path = os.pathsep.join(map(str, folders))
    return {"PATH": path, "FORKS_CHILDREN": python, **forked_workers()}


def python_path(*folders):
    """Return folders to import from, before those that these tests were started with."""
    return os.pathsep.join(map(str, filter(None, [*folders, os.environ.get("PYTHONPATH")])))


def launcher_environment():
    """Return what `subprocess.run` takes to start several processes from the repository.

    These are forks, as their launcher is with `forked_python()` and `accelerate_script()`.
    """
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(ROOT), **forked_workers()}
    environment = os.environ | own
    return {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}


def run_recipe_script(*flags, script="recipes/gpt2_124m.py", environment=None):
    """Run a recipe with plain python, in a fork that has imported the library."""
    return run_python(script, *flags, environment=environment)


def launch(*flags, config="cpu", script="recipes/gpt2_124m.py", environment=None):
    """Run a recipe under `accelerate launch`, in forks that have imported what they import."""
    command = ["accelerate", "launch", "--config_file", f"accelerate_configs/{config}.yaml"]
    environment = forked_launchers() | (environment or {})
    return run_command(*command, script, *flags, environment=environment)


def read_rows(folder, *, clock=False):
    """Return the rows of a run's metrics, the fields of the clock left out."""
    import json

    fields = () if clock else ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in fields} for line in lines]
