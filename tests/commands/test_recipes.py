"""`pretrain new` and `pretrain train`: recipes of the package, started as they should be."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import psutil
import pytest
import torch

from pretrain_lib.commands import launching
from pretrain_lib.commands.cli import main
from pretrain_lib.commands.recipes import RECIPES, find_overlays, launch_flags, packaged
from tests.conftest import (
    ROOT,
    forked_launchers,
    read_rows,
    run_pretrain,
    run_python,
    tiny_flags,
)
from tests.forks import forked_python

# A launcher that a signal ends before its recipe, as Ctrl-C ends that of one process.
LAUNCHER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]])
try:
    sys.exit(process.wait(timeout=5) and 1)
except KeyboardInterrupt:
    sys.exit(1)
"""
LAST_SECOND = """
import os, pathlib, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill(int(sys.argv[1]), int(sys.argv[2]))
signal.sigwait([signal.SIGTERM])  # as which it is handed on
pathlib.Path(os.environ["PRETRAIN_EXIT_CODE_FILE"]).write_text("0")
print("told, and done")
"""
SLOW_RECIPE = """
import os, pathlib, signal, sys, time
told = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: told.append(signal.Signals(number).name))
pathlib.Path(sys.argv[1]).write_text("yes")
while not told:
    time.sleep(0.01)
time.sleep(0.5)
pathlib.Path(sys.argv[1]).write_text(" ".join(told))
pathlib.Path(os.environ["PRETRAIN_EXIT_CODE_FILE"]).write_text("75")
sys.exit(75)
"""
PRETRAIN = Path(sys.executable).with_name("pretrain")


def run(*arguments):
    """Run the command in this process; return its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code or 0


def test_alone_it_prints_its_help(capsys):
    assert run() == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {command}" in shown for command in ("new", "train", "prepare", "eval"))


def test_it_tells_its_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == "pretrain_lib 0.1.0\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_commands_and_flags(shell, capsys):
    assert run("completion", shell) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("prepare", "train_tokenizer", "inspect"))


def test_the_table_of_recipes_is_what_lies_there():
    files = {path.name for path in (ROOT / "recipes").iterdir() if path.suffix in (".py", ".yaml")}
    listed = {f"{name}.py" for name in RECIPES} | {f for files in RECIPES.values() for f in files}
    assert listed == files
    assert packaged("recipes") == ROOT / "recipes"


def test_a_new_recipe_is_a_copy_that_is_never_written_over(tmp_path, capsys):
    folder = tmp_path / "mine" / "deep"
    assert run("new", "gpt2_124m", folder) == 0
    assert "pretrain train" in capsys.readouterr().out
    for file in ("gpt2_124m.py", *RECIPES["gpt2_124m"]):
        assert (folder / file).read_bytes() == (ROOT / "recipes" / file).read_bytes()
    assert run("new", "gpt2_124m", folder) == 2
    assert "gpt2_124m.py is there already" in capsys.readouterr().err
    assert run("new", "llama_1_3b", folder) == 0
    assert run("new", "gpt2_124", folder) == 2
    assert "did you mean gpt2_124m?" in capsys.readouterr().err


def test_a_recipe_copied_anywhere_runs(tmp_path):
    run("new", "gpt2_124m", tmp_path)
    flags = ["--config", tmp_path / "quickstart.yaml", "--print_config"]
    shown = run_python(tmp_path / "gpt2_124m.py", *flags).stdout
    assert "vocabulary_size: 8192" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["gpt2_124"], "did you mean gpt2_124m?"),
        (["nowhere.py"], "RECIPE nowhere.py is neither"),
        ([], "error: the following arguments are required: RECIPE (--help"),
        (["gpt2_124m", "--gpus", "64"], "--gpus 64 is more than the"),
        (["gpt2_124m", "--gpus", "0"], "--gpus 0 must be a whole number of at least 1"),
        (["gpt2_124m", "--config_file", "ddp_8gp"], "did you mean ddp_8gpu?"),
        (["gpt2_124m", "--gpus", "1", "--config_file", "cpu"], "not allowed with"),
    ],
)
def test_what_cannot_be_started_is_refused(arguments, named, capsys):
    assert run("train", *arguments) == 2
    shown = capsys.readouterr().err
    assert named in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("there", "asked", "file", "processes"),
    [
        (0, None, "cpu", None),
        (1, None, "single_gpu", None),
        (8, None, "ddp_8gpu", "8"),
        (8, 2, "ddp_8gpu", "2"),
        (8, 1, "single_gpu", None),
    ],
)
def test_the_launch_fits_the_machine(there, asked, file, processes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    flags = launch_flags(Namespace(config_file=None, gpus=asked))
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert given["--config_file"] == str(ROOT / "accelerate_configs" / f"{file}.yaml")
    assert given.get("--num_processes") == processes
    assert int(given["--num_cpu_threads_per_process"]) >= 1


def test_overlays_are_found_beside_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ROOT / "recipes"
    expected = str(folder / "quickstart.yaml")
    flags = ["--config", "quickstart", "--config=quickstart.yaml", "--run.dir", "quickstart"]
    found = find_overlays(flags, folder)
    assert found == ["--config", expected, f"--config={expected}", "--run.dir", "quickstart"]
    (tmp_path / "quickstart.yaml").write_text("run: {seed: 1}")
    assert find_overlays(["--config", "quickstart.yaml"], folder)[1] == "quickstart.yaml"
    assert find_overlays(["--config", "none.yaml"], folder)[1] == "none.yaml"


@pytest.mark.slow
def test_it_trains_and_says_what_it_runs(prepared, tmp_path):
    flags = tiny_flags(prepared, tmp_path / "run")
    result = run_pretrain("train", "gpt2_124m", *flags, environment=forked_launchers())
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert first.startswith("accelerate launch --quiet --config_file ")
    assert first.endswith(shlex.join(flags))
    assert read_rows(tmp_path / "run")[-1]["step"] == 8


@pytest.mark.slow
def test_it_trains_when_nobody_can_read_what_it_prints(prepared, tmp_path, unread):
    words = ["train", "gpt2_124m", "--budget", "1h", *tiny_flags(prepared, tmp_path / "run")]
    options = {"env": {**os.environ, **forked_launchers()}, "stdout": unread, "stderr": unread}
    assert subprocess.run([forked_python(), PRETRAIN, *words], **options).returncode == 0
    assert read_rows(tmp_path / "run")[-1]["step"] == 8


@pytest.mark.slow
def test_its_exit_code_is_the_recipes(prepared, tmp_path):
    command = ["train", "gpt2_124m", *tiny_flags(prepared, tmp_path / "run")]
    options = {"environment": forked_launchers()}
    refused = run_pretrain(*command, "--run.resume", "nowhere", **options)
    assert refused.returncode == 2
    assert "error: run.resume=nowhere" in refused.stderr
    stopped = run_pretrain(*command, "--run.max_time", "0.01s", **options)
    assert stopped.returncode == 75, stopped.stderr


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["cpu", "cpu_2proc"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_it_ends_after_the_run_that_a_signal_stops(configuration, number, prepared, tmp_path):
    folder, said = tmp_path / "run", tmp_path / "said"
    words = ["train", "gpt2_124m", "--config_file", configuration]
    words += [*tiny_flags(prepared, folder), "--schedule.tokens", "100M"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with said.open("w") as file:
        process = subprocess.Popen([PRETRAIN, *words], env=environment, stderr=file)
        while not (folder / "metrics.jsonl").is_file() or len(read_rows(folder)) < 5:
            assert process.poll() is None, said.read_text()
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait() == 75, said.read_text()
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("resumable", f"signal {number.name}")
    assert [path.name for path in (folder / "checkpoints").glob("step-*")]
    assert not [line for line in said.read_text().splitlines() if "launching.py" in line]
    assert "FileNotFoundError" not in said.read_text()

    step = status["step"]
    more = ["--run.max_steps", str(step + 1)]
    again = run_pretrain(*words, *more, environment=forked_launchers())
    assert again.returncode == 0, again.stderr
    assert f"step {step:,}" in again.stdout
    assert read_rows(folder)[-1]["step"] == step + 1


def interrupt(started, number, from_terminal):
    """Signal this process once a recipe has started; a terminal signals its launcher, too."""
    while not started.is_file():
        time.sleep(0.01)
    family = psutil.Process().children(recursive=True) if from_terminal else []
    for process in (*family, psutil.Process()):
        process.send_signal(number)


def write_launcher(folder, content, monkeypatch):
    """Put `LAUNCHER` before Accelerate's own, and return the path of a recipe with this content."""
    recipe, launcher = folder / "recipe.py", folder / "accelerate" / "commands" / "launch.py"
    launcher.parent.mkdir(parents=True)
    for package in (launcher.parent, launcher.parent.parent):
        (package / "__init__.py").write_text("")
    launcher.write_text(LAUNCHER)
    recipe.write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return recipe


@pytest.mark.parametrize(
    ("number", "from_terminal"),
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)],
)
def test_what_a_launcher_left_behind_is_awaited(number, from_terminal, tmp_path, monkeypatch):
    """The launcher here ends at once; its recipe takes its time, and writes its code at the end."""
    recipe, started = write_launcher(tmp_path, SLOW_RECIPE, monkeypatch), tmp_path / "started"
    arguments = (started, number, from_terminal)
    threading.Thread(target=interrupt, args=arguments, daemon=True).start()
    assert launching.launch([str(recipe), str(started)]) == (75, True)
    # Two of SIGINT would stop a run at once.
    told = started.read_text().split()
    assert told.count("SIGINT") == int(from_terminal)
    assert told.count("SIGTERM") == 1 or from_terminal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_run_that_is_done_is_not_lost(number, tmp_path, monkeypatch):
    """A search that was told to stop in the last second of a run does not start the next."""
    recipe = write_launcher(tmp_path, LAST_SECOND, monkeypatch)
    words = [str(recipe), str(os.getpid()), str(int(number))]
    with pytest.raises(launching.Stopped):
        launching.launch_into(tmp_path / "console", words, tmp_path / "run")
    assert (tmp_path / "console").read_text() == "told, and done\n"


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["cpu", "cpu_2proc"])
def test_a_run_is_saved_when_the_command_that_started_it_is_killed(
    configuration, prepared, tmp_path
):
    folder = tmp_path / "run"
    words = ["train", "gpt2_124m", "--config_file", configuration]
    words += [*tiny_flags(prepared, folder), "--schedule.tokens", "100M"]
    process = subprocess.Popen([PRETRAIN, *words], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (folder / "metrics.jsonl").is_file() or len(read_rows(folder)) < 5:
        assert process.poll() is None
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(family, timeout=300)[1]
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("resumable", "signal SIGTERM")


def test_a_run_that_is_told_to_stop_before_it_begins_can_be_started_again(prepared, tmp_path):
    words = ["train", "gpt2_124m", *tiny_flags(prepared, tmp_path / "run")]
    code = f"""
import os, signal, sys
from pretrain_lib.commands import cli, recipes
def import_torch(chosen):  # where the command spends its first second
    os.kill(os.getpid(), signal.{{}})
    raise AssertionError
recipes.launch_flags = import_torch
cli.main({words!r})
"""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        result = run_python("-c", code.format(name))
        assert result.returncode == 75, result.stderr
        assert "the same command starts it" in result.stdout
    assert not (tmp_path / "run").exists()


def test_what_nohup_has_ignored_is_left_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launching.on_signals(launching.stop):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # which a process inherits
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(launching.Stopped), launching.on_signals(launching.stop):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_flags_of_the_launch_are_not_ignored_where_nothing_is_launched(tmp_path):
    def said(*flags, code=0):
        result = run_pretrain("train", "gpt2_124m", *flags)
        assert result.returncode == code, result.stderr
        return result.stdout or result.stderr

    planned = said("--gpus", "6", "--batch.micro_batch", "2", "--batch.tokens", "12288", "--plan")
    devices = [line.split()[0] for line in planned.splitlines() if line.strip()[:1].isdigit()]
    assert set(devices) == {"6"}
    for flags in (["--gpus", "8", "--print_config"], ["--config_file", "nonsense", "--plan"]):
        assert f"{flags[0]} is for training: leave it out with {flags[2]}" in said(*flags, code=2)
    assert "--data.path" in said("--gpus", "8", "--help")
