"""Which configuration file a run says that it was launched with, under real launchers."""

import json

import pytest
import torch
import yaml

from pretrain_lib.distributed.launch_file import launch_configuration
from tests.conftest import ROOT, run_command, tiny_flags

SETTINGS = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "num_processes": 2,
    "main_process_port": 0,
    "mixed_precision": "no",
}
# Two processes share a line unless each writes all of its own at once.
TOLD = """
import json, os
from pretrain_lib.distributed.launch_file import launch_configuration
os.write(1, (json.dumps(launch_configuration()) + "\\n").encode())
"""
NONE = {"file": None, "default": False, "settings": {}}


@pytest.fixture
def home(tmp_path):
    """A home of Hugging Face with a user's default configuration of one process."""
    file = tmp_path / "home" / "accelerate" / "default_config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump(SETTINGS | {"distributed_type": "NO", "num_processes": 1}))
    return tmp_path / "home"


def told(tmp_path, home, *command):
    """Return what a script says that a command starts, one line for each process."""
    script = tmp_path / "script.py"
    script.write_text(TOLD)
    result = run_command(*command, script, "--config_file", "of_the_script", environment=home)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_without_a_launcher_there_is_no_file(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which anyone may set
    assert launch_configuration() == NONE


@pytest.mark.slow
def test_the_file_that_a_launcher_took_is_told(tmp_path, home):
    default = home / "accelerate" / "default_config.yaml"
    environment = {"HF_HOME": str(home)}
    one = {"file": str(default), "default": True, "settings": yaml.safe_load(default.read_text())}
    assert told(tmp_path, environment, "accelerate", "launch") == [one]
    assert told(tmp_path, environment, "accelerate", "launch", "--cpu") == [NONE]
    given = "accelerate_configs/cpu.yaml"
    one = {
        "file": given,
        "default": False,
        "settings": yaml.safe_load((ROOT / given).read_text()),
    }
    module = ["python", "-m", "accelerate.commands.launch", f"--config-file={given}"]
    assert told(tmp_path, environment, *module) == [one]
    # Started by torchrun inside of the launcher, and again by a script around it.
    default.write_text(yaml.safe_dump(SETTINGS))
    two = {"file": str(default), "default": True, "settings": SETTINGS}
    command = ["accelerate_configs/with_restarts.sh", "--main_process_port", "0"]
    assert told(tmp_path, environment, *command) == [two, two]


@pytest.mark.slow
def test_a_launcher_without_configuration_hands_on_what_nobody_asked_for(prepared, tmp_path):
    """It says "no" to mixed precision and runs one process, whatever --num_processes says."""
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--run.max_steps", "1"]
    command = ["accelerate", "launch", "--cpu", "--num_processes", "2", "recipes/gpt2_124m.py"]
    environment = {"HF_HOME": str(tmp_path / "nobody"), "OMP_NUM_THREADS": "1"}
    result = run_command(*command, *flags, environment=environment)
    assert result.returncode == 0, result.stderr
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert ("bf16 autocast, fp32 weights" if fast else "is not fast in bf16") in result.stdout
    said = " ".join(result.stdout.split())
    assert "`accelerate launch --cpu` starts one process, not the 2 asked for" in said


@pytest.mark.slow
def test_a_file_for_several_gpus_with_cpu_is_remarked(prepared, tmp_path):
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--run.max_steps", "1"]
    launch = ["--cpu", "--config_file", "accelerate_configs/fsdp2_8gpu.yaml"]
    command = ["accelerate", "launch", *launch, "recipes/gpt2_124m.py", *flags]
    result = run_command(*command, environment={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert "starts one process, not the 8 asked for" in " ".join(result.stdout.split())


@pytest.mark.slow
def test_a_default_file_stands_in_the_manifest_and_is_said_at_the_start(prepared, tmp_path, home):
    flags = tiny_flags(prepared, tmp_path / "run")
    environment = {"HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = ["accelerate", "launch", "recipes/gpt2_124m.py", *flags, "--run.max_steps", "2"]
    result = run_command(*command, environment=environment)
    assert result.returncode == 0, result.stderr
    file = home / "accelerate" / "default_config.yaml"
    shown = " ".join(result.stdout.split())  # the line is broken where the screen ends
    line = f"launched without --config_file: your default {file} was used (compute_environment "
    assert line in shown
    assert "num_processes 1)" in shown
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    settings = yaml.safe_load(file.read_text())
    expected = {"file": str(file), "default": True, "settings": settings}
    assert manifest["world"]["configuration"] == expected
    # Resumed with another file, it says nothing of either; the manifest has it.
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/single_gpu.yaml"]
    command += ["--mixed_precision", "no", "recipes/gpt2_124m.py", *flags]
    result = run_command(*command, environment=environment)
    assert result.returncode == 0, result.stderr
    changed = [line for line in result.stdout.splitlines() if line.startswith("changed since")]
    assert changed == ["changed since the checkpoint: run.max_steps was 2, is null"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["world"]["configuration"]["file"] == "accelerate_configs/single_gpu.yaml"
    assert "launched without" not in result.stdout
