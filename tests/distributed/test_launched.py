"""Signals, lost processes and restarts under the real `accelerate launch`."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pretrain_lib.distributed.launched import launch_time
from pretrain_lib.files.locks import lock_folder
from pretrain_lib.run_folder.folder import was_begun_here, write_status
from pretrain_lib.training.failures import write_last_status
from tests.conftest import ROOT, forked_launchers, read_rows, run_command
from tests.test_recipes import tiny_flags

TWO = ["--config_file", "accelerate_configs/cpu_2proc.yaml", "--mixed_precision", "no"]
# What restarts need, as `accelerate_configs/with_restarts.sh` sets it.
ELASTIC = ["accelerate_configs/with_restarts.sh", *TWO]


def start(*command, shutdown_seconds=60, variables=None, **options):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "MAX_RESTARTS": "2"}
    environment |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(shutdown_seconds)}
    environment |= variables or {}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        # What a shell starts in the background ignores it, and so would all that comes from there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def processes_of(folder):
    """Return the python processes that train in a folder, launchers left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue  # it has ended
        if str(folder) in words and not any(Path(word).name == "accelerate" for word in words):
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.mark.slow
def test_the_clock_of_a_run_starts_with_its_launcher_and_not_with_a_shell(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    own = psutil.Process().create_time()
    assert launch_time() == own  # the parent of the tests is no launcher
    code = (
        "import os, psutil, sys; from pretrain_lib.distributed.launched import launch_time;"
        "print(launch_time() == psutil.Process().parent().create_time())"
    )
    for name, expected in (("accelerate", "True"), ("shell", "False"), ("accelerate.py", "False")):
        starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
        result = run_command(sys.executable, "-c", starter, name)
        assert result.stdout.strip() == expected, result.stderr


def test_a_restart_is_known_on_a_node_that_did_not_count_it(tmp_path, monkeypatch):
    variables = {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("one", "another", "none"):  # torch's name of a launch that was given no name
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        (tmp_path / name).mkdir()
        write_status(tmp_path / name, "running")
    for folder, name, known in (("one", "one", True), ("another", "one", False)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        assert was_begun_here(tmp_path / folder) == known
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not was_begun_here(tmp_path / "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert was_begun_here(tmp_path / "none")


def test_a_launch_that_has_ended_is_not_the_next_one_of_the_same_id(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "77")

    def goes_on_after(state, error=None, **options):
        write_status(tmp_path, "running")
        if error is None:
            write_status(tmp_path, state, **options)
        else:
            write_last_status(tmp_path, state, error)
        return was_begun_here(tmp_path)

    ends = [("done", None), ("refused", ValueError("bad")), ("failed", FloatingPointError("loss"))]
    assert not any(goes_on_after(*end) for end in ends)
    assert not goes_on_after("resumable", is_over=True)  # its time is used up
    # A launcher sends a signal to all when it has lost one, and starts them again.
    assert goes_on_after("resumable") and goes_on_after("failed", RuntimeError("peer lost"))
    assert goes_on_after("resumable", OSError(errno.ENOSPC, "no space"))
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # a job that is requeued has the same id
    assert goes_on_after("resumable", is_over=True)


def steps_of(folder):
    return [row["step"] for row in read_rows(folder) if row["kind"] == "train"]


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith("step") and int(line.split("/")[0].split()[1]) >= step:
            return


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_of_one_process_saves_the_run(prepared, tmp_path, number):
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--schedule.tokens", "1e9"]
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml"]
    process = start(*command, "recipes/gpt2_124m.py", *flags, stderr=subprocess.DEVNULL)
    wait_for_step(process, 5)
    process.send_signal(number)
    process.stdout.read()  # until the run itself has ended
    assert process.wait(300) != 0  # of the launcher, which knows nothing of it
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("resumable", "signal SIGTERM")
    assert (tmp_path / "run" / "checkpoints" / f"step-{status['step']:08d}").is_dir()


@pytest.mark.slow
def test_a_signal_to_the_launcher_of_two_processes_saves_the_run(prepared, tmp_path):
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--schedule.tokens", "1e9"]
    command = ["accelerate", "launch", *TWO, "recipes/gpt2_124m.py", *flags]
    process = start(*command, stderr=subprocess.DEVNULL, variables=forked_launchers())
    wait_for_step(process, 5)
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    process.wait(300)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("resumable", "signal SIGTERM")
    assert processes_of(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number"),
    [
        (["accelerate", "launch", *TWO], signal.SIGUSR1),
        (["torchrun", "--standalone", "--nproc_per_node", "2"], signal.SIGKILL),
    ],
)
def test_a_launcher_that_ends_without_a_word_to_two_processes_saves_the_run(
    command, number, prepared, tmp_path
):
    folder, errors = tmp_path / "run", tmp_path / "errors"
    flags = [*tiny_flags(prepared, folder), "--schedule.tokens", "1e9", "--run.max_time", "5m"]
    options = {"variables": {"ACCELERATE_USE_CPU": "true"}}
    with errors.open("w") as file:
        process = start(*command, "recipes/gpt2_124m.py", *flags, stderr=file, **options)
        wait_for_step(process, 5)
        process.send_signal(number)
        process.stdout.read()  # until the run itself has ended
    assert process.wait() == -number
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("resumable", "signal SIGTERM"), (
        errors.read_text()
    )
    assert (folder / "checkpoints" / f"step-{status['step']:08d}").is_dir()
    assert processes_of(folder) == []


@pytest.mark.slow
def test_a_group_that_lost_a_process_starts_again_and_is_the_run_that_never_did(prepared, tmp_path):
    flags = ["--checkpoint.every", "3", "--schedule.tokens", "8192"]
    command = ["accelerate", "launch", *TWO, "recipes/gpt2_124m.py"]
    whole_flags = [*tiny_flags(prepared, tmp_path / "whole"), *flags]
    whole = start(*command, *whole_flags, variables=forked_launchers())
    whole.stdout.read()
    assert whole.wait(300) == 0
    folder = tmp_path / "killed"
    command = [*ELASTIC, "recipes/gpt2_124m.py", *tiny_flags(prepared, folder), *flags]
    command += ["--run.resume", "never"]  # which speaks of the first start
    with (tmp_path / "errors").open("w") as errors:
        process = start(*command, stderr=errors)
        wait_for_step(process, 8)
        os.kill(processes_of(folder)[-1], signal.SIGKILL)
        rest = process.stdout.read()
    assert process.wait(300) == 0, (tmp_path / "errors").read_text()
    assert re.search("resumed at step [1-9]", rest)
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert steps_of(folder) == list(range(1, 33))
    told = (tmp_path / "errors").read_text()
    assert "process 0 lost another one, or waited for it longer than" in told
    losses = [[row["loss"] for row in read_rows(f)] for f in (folder, tmp_path / "whole")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_what_only_the_main_process_refuses_ends_all_of_an_elastic_launch(prepared, tmp_path):
    flags = tiny_flags(prepared, tmp_path / "run")
    with lock_folder(tmp_path / "run", setting="run.dir"):
        process = start(
            *ELASTIC,
            "recipes/gpt2_124m.py",
            *flags,
            variables=forked_launchers(),
            stderr=subprocess.PIPE,
        )
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.count("error: run.dir=") == 1
    assert processes_of(tmp_path / "run") == []


# Each process in a folder of its own, as on machines without a shared disk.
APART = """
import os, runpy, sys
from pretrain_lib.run_folder import folder
folder.SHARED_SECONDS = 1
sys.path.insert(0, os.path.abspath("recipes"))
recipe = os.path.abspath("recipes/gpt2_124m.py")
os.chdir(os.path.join(sys.argv.pop(1), os.environ["RANK"]))
runpy.run_path(recipe, run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_is_refused_before_training(prepared, tmp_path):
    script = tmp_path / "apart.py"
    script.write_text(APART)
    for rank in "01":
        (tmp_path / rank).mkdir()
    # What is left there of an earlier run is not that of this one.
    (tmp_path / "1" / "run").mkdir()
    (tmp_path / "1" / "run" / "manifest.json").write_text('{"run_id": "of another"}')
    flags = tiny_flags(prepared, "run")
    options = {"variables": forked_launchers(), "stderr": subprocess.PIPE}
    process = start(*ELASTIC, str(script), str(tmp_path), *flags, **options)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "error: run.dir=run is not visible to every process" in errors
    assert "step" not in shown
    status = json.loads((tmp_path / "0" / "run" / "status.json").read_text())
    assert status["state"] == "refused"


@pytest.mark.slow
def test_a_run_that_diverged_is_not_started_again(prepared, tmp_path):
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--checkpoint.every", "1"]
    flags += ["--optimizer.learning_rate", "1e30", "--stability.max_skipped", "2"]
    options = {"variables": forked_launchers(), "stderr": subprocess.PIPE}
    process = start(*ELASTIC, "recipes/gpt2_124m.py", *flags, **options)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "resumed" not in shown
    assert errors.count("error: 2 updates in a row were left out") == 2  # once on each process
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], "2 updates in a row" in status["reason"]) == ("failed", True)


@pytest.mark.slow
def test_what_all_processes_refuse_ends_an_elastic_launch_at_once(prepared, tmp_path):
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--batch.tokens", "96"]
    options = {"variables": forked_launchers(), "stderr": subprocess.PIPE}
    process = start(*ELASTIC, "recipes/gpt2_124m.py", *flags, **options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.count("error: batch.tokens=96 must be a multiple of 2 processes") == 1
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "refused"


@pytest.mark.slow
def test_what_only_another_process_refuses_is_said_and_ends_an_elastic_launch(prepared, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, runpy, sys\n"
        "sys.argv += ['--batch.tokens', '96'] * (os.environ['RANK'] == '1')\n"
        "sys.path.insert(0, 'recipes')\n"
        "runpy.run_path('recipes/gpt2_124m.py', run_name='__main__')\n"
    )
    flags = tiny_flags(prepared, tmp_path / "run")
    options = {"variables": forked_launchers(), "stderr": subprocess.PIPE}
    process = start(*ELASTIC, script, *flags, **options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert errors.count("error: batch.tokens=96 must be a multiple of 2 processes") == 3
    assert processes_of(tmp_path / "run") == []


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_not_waited_for_for_ever(prepared, tmp_path):
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--schedule.tokens", "1e9"]
    flags += ["--system.collective_timeout", "20s"]
    command = ["accelerate", "launch", *TWO, "recipes/gpt2_124m.py", *flags]
    with (tmp_path / "errors").open("w") as errors:
        process = start(*command, stderr=errors, shutdown_seconds=1)
        wait_for_step(process, 3)
        os.kill(processes_of(tmp_path / "run")[-1], signal.SIGSTOP)
        process.stdout.read()
        assert process.wait(300) != 0
    told = (tmp_path / "errors").read_text()
    assert "process 0 lost another one, or waited for it longer than system.collective_ti" in told
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert processes_of(tmp_path / "run") == []


LEAVING = """
import gc, os, runpy, sys
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
end_training = Accelerator.end_training

def leave(accelerator):
    alive = [o for o in gc.get_objects() if type(o) is DistributedDataParallel]
    os.write(1, f"{len(alive)} alive\\n".encode())
    end_training(accelerator)

Accelerator.end_training = leave
sys.path.insert(0, "recipes")
runpy.run_path("recipes/gpt2_124m.py", run_name="__main__")
"""


@pytest.mark.slow
def test_ddp_does_not_outlive_its_group_and_hang(prepared, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LEAVING)
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--run.max_steps", "1"]
    command = ["accelerate", "launch", *TWO, script, *flags]
    process = start(*command, variables=forked_launchers())
    assert process.stdout.read().count("0 alive\n") == 2
    assert process.wait(300) == 0
