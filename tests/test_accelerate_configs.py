"""The files of accelerate_configs/ mean to the installed Accelerate what they say."""

import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    patch_environment,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch.distributed.fsdp import CPUOffloadPolicy

from pretrain_lib import GPT2, GPT2Config, Llama, LlamaConfig
from pretrain_lib.config.arguments import parse_recipe
from tests.conftest import ROOT, forked_launchers, read_rows, run_command, tiny_flags
from tests.distributed.test_launched import processes_of
from tests.distributed.test_nodes import NODES, environment_of
from tests.test_recipes import gpt2_124m, llama_1_3b

FOLDER = ROOT / "accelerate_configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PROCESSES = {"cpu": 1, "cpu_2proc": 2, "single_gpu": 1, "ddp_8gpu": 8, "fsdp2_8gpu": 8}
PROCESSES |= {"ddp_multi_node": 16, "hsdp_multi_node": 16}
# What the launcher reads by other ways than as a default of its flags.
READ_APART = {"compute_environment", "distributed_type", "mixed_precision"}


def launch_arguments(file, *flags):
    """Return the launcher's arguments as it completes them from a configuration file."""
    words = ["--config_file", str(file), *flags, "recipes/gpt2_124m.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments


def launch_environment(file, *flags):
    """Return the launcher's arguments and the environment that it would start processes in."""
    arguments = launch_arguments(file, *flags)
    if arguments.multi_gpu or arguments.use_fsdp:
        return arguments, prepare_multi_gpu_env(arguments)
    return arguments, prepare_simple_launcher_cmd_env(arguments)[1]


def unread_keys(file):
    """Return the keys of a configuration file that the launcher does not know, or does not heed."""
    flags = vars(launch_command_parser().parse_args(["script.py"]))
    arguments, unread = vars(launch_arguments(file)), []
    for key, value in yaml.safe_load(file.read_text()).items():
        if isinstance(value, dict):
            prefixed = key in ("fsdp_config", "parallelism_config")
            wrong = [k for k, v in value.items() if k not in flags or arguments[k] != v]
            unread += wrong if prefixed else [key]
        elif key not in READ_APART and (key not in {"use_cpu", *flags} or arguments[key] != value):
            unread.append(key)
    return unread


def documented_commands(name):
    """Return the commands in the comment at the head of a file, as words."""
    lines = [line for line in (FOLDER / name).read_text().splitlines() if line.startswith("#")]
    text = "\n".join(line[1:] for line in lines).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if re.match(" {3}\\w", line)]


def test_every_file_says_when_to_choose_it_and_how_to_start_it():
    assert set(FILES) == set(PROCESSES)
    for name in FILES:
        assert (FOLDER / f"{name}.yaml").read_text().startswith("# "), name
        commands = documented_commands(f"{name}.yaml")
        assert len(commands) == 1, name
        (words,) = commands
        while words[0] not in ("accelerate", "accelerate_configs/with_restarts.sh"):
            words.pop(0)  # an environment variable
        words = words[2:] if words[0] == "accelerate" else words[1:]
        values = {"K": "0", "HEAD": NODES[0]}
        arguments = launch_command_parser().parse_args([values.get(w, w) for w in words])
        assert arguments.config_file == f"accelerate_configs/{name}.yaml"
        assert (ROOT / arguments.training_script).is_file()
        defaults = {"gpt2_124m": gpt2_124m, "llama_1_3b": llama_1_3b}
        recipe = defaults[Path(arguments.training_script).stem].RECIPE
        config, _ = parse_recipe(recipe, arguments=arguments.training_script_args)
        assert config.system.processes == (PROCESSES[name] if PROCESSES[name] > 1 else None)
        config.check(processes=PROCESSES[name])


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_read_and_none_is_a_recipes(name):
    file = FOLDER / f"{name}.yaml"
    assert unread_keys(file) == []
    # A batch, its accumulation, clipping, compiling and what is computed again are the recipe's.
    owned = re.compile("accumulation|clipping|checkpointing|dynamo|batch")
    assert not owned.search(yaml.safe_dump(yaml.safe_load(file.read_text())))


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("fsdp_reshard_after_forward", "fsdp_reshard_after_foward", "fsdp_reshard_after_foward"),
        ("dp_shard_size", "dp_shards_size", "parallelism_config_dp_shards_size"),
        ("num_machines: 2", "num_machines: 2\nrdzv_backend: c10d", "rdzv_backend"),
        ("num_machines: 2", "num_machines: 2\nsame_network: true", "same_network"),
    ],
)
def test_what_accelerate_takes_without_a_word_and_does_not_read_is_found(
    tmp_path, before, after, found
):
    text = (FOLDER / "hsdp_multi_node.yaml").read_text()
    assert before in text
    file = tmp_path / "changed.yaml"
    file.write_text(text.replace(before, after))
    assert unread_keys(file) == [found]


@pytest.mark.parametrize("name", FILES)
def test_what_processes_are_started_with(name):
    multi_node = name.endswith("multi_node")
    flags = ["--machine_rank", "1", "--main_process_ip", "head"] if multi_node else []
    arguments, environment = launch_environment(FOLDER / f"{name}.yaml", *flags)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment["ACCELERATE_DYNAMO_BACKEND"] == "NO"
    assert environment.get("ACCELERATE_USE_CPU", "False") == str(name == "cpu")
    assert arguments.num_processes == PROCESSES[name]
    assert arguments.multi_gpu == (name in ("cpu_2proc", "ddp_8gpu", "ddp_multi_node"))
    assert ("ACCELERATE_USE_FSDP" in environment) == (name in ("fsdp2_8gpu", "hsdp_multi_node"))
    assert ("ACCELERATE_USE_PARALLELISM_CONFIG" in environment) == (name == "hsdp_multi_node")
    if multi_node:
        assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
        assert arguments.rdzv_endpoint == "head:29400"
    elif PROCESSES[name] > 1:
        assert arguments.nproc_per_node == str(PROCESSES[name])
        assert int(arguments.master_port) > 0  # a free one


@pytest.mark.parametrize("name", ["fsdp2_8gpu", "hsdp_multi_node"])
def test_what_a_sharding_process_makes_of_it(name):
    _, environment = launch_environment(FOLDER / f"{name}.yaml", "--machine_rank", "1")
    with patch_environment(**environment):
        plugin, parallelism = FullyShardedDataParallelPlugin(), ParallelismConfig()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is False
    assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    assert plugin.activation_checkpointing is False
    shape = {"vocabulary_size": 8, "context_length": 8, "num_layers": 2, "num_heads": 2, "width": 8}
    llama = shape | {"num_key_value_heads": 2, "mlp_width": 8}
    for model in (GPT2(GPT2Config(**shape)), Llama(LlamaConfig(**llama))):
        is_sharded = fsdp2_prepare_auto_wrap_policy(plugin, model)
        names = [name for name, module in model.named_modules() if is_sharded(module)]
        assert [name.rpartition(".")[2] for name in names] == ["0", "1"]  # the blocks
    if name == "hsdp_multi_node":
        assert (parallelism.dp_replicate_size, parallelism.dp_shard_size) == (2, 8)
        assert parallelism.total_size == PROCESSES[name]


@pytest.mark.slow
def test_what_is_made_for_gpus_runs_on_a_cpu(prepared, tmp_path):
    flags = [*tiny_flags(prepared, tmp_path), "--run.max_steps", "2"]
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/ddp_8gpu.yaml"]
    command += ["--num_processes", "2", "recipes/gpt2_124m.py", *flags, "--system.processes", "2"]
    result = run_command(*command)
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in read_rows(tmp_path) if row["kind"] == "train"] == [1, 2]
    world = json.loads((tmp_path / "manifest.json").read_text())["world"]
    assert world["processes"] == 2
    assert world["configuration"]["file"] == "accelerate_configs/ddp_8gpu.yaml"


SRUN = """#!/usr/bin/env bash
# Stands in for srun: runs a command on every node, and notes its processes.
[ -n "${NOTHING_RUNS:-}" ] && exit 1
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node SLURMD_NODENAME=127.0.0.$((node + 1)) "$@" &
    echo $! >> "$SLURM_LOG.pids"
done
wait
"""
SCONTROL = """#!/usr/bin/env bash
# Stands in for scontrol.
[ "$1" = show ] && printf '127.0.0.1\\n127.0.0.2\\n' && exit
echo "$@" >> "$SLURM_LOG"
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job of two nodes of one process each, on loopback."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = environment_of(NODES[0], RUN_DIR=str(tmp_path / "run"))
    job = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    job |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_LOG": str(tmp_path / "log")}
    forks = forked_launchers()
    return environment | job | forks | {"PATH": f"{tmp_path}:{forks['PATH']}"}


def start_job(slurm, *flags):
    """Start the script that sbatch would run on the first node."""
    command = ["accelerate_configs/slurm.sh", "recipes/gpt2_124m.py", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=slurm, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_a_slurm_job_is_requeued_as_long_as_its_run_gets_on(prepared, tmp_path, slurm):
    flags = [*tiny_flags(prepared, "unused"), "--schedule.tokens", "1e6"]
    job, said = start_job(slurm, *flags), []
    for line in job.stdout:
        said.append(line)
        if re.match("step +5/", line):
            break
    launchers = [psutil.Process(int(pid)) for pid in (tmp_path / "log.pids").read_text().split()]
    workers = map(psutil.Process, processes_of(tmp_path / "run"))
    for process in [*launchers, *workers]:  # of a step Slurm signals all, on all nodes at once
        os.kill(process.pid, signal.SIGTERM)
    said = "".join([*said, *job.stdout])
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("resumable", "signal SIGTERM"), said
    assert job.wait() == 1
    assert f"resumable at step {status['step']}, was at the start" in said
    assert (tmp_path / "log").read_text() == "requeue 77\n"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["world"]["processes"] == manifest["config"]["system"]["processes"] == 2

    job = start_job(slurm | {"NOTHING_RUNS": "1"}, *flags)  # status.json is that of the job before
    said, _ = job.communicate()
    assert f"resumable at step {status['step']}, was at {status['step']}" in said
    assert job.returncode == 1
    job = start_job(slurm, *flags, "--run.max_steps", str(status["step"] + 2))
    said, _ = job.communicate()
    assert job.returncode == 0, said
    assert f"resumed at step {status['step']} of" in said
    assert (tmp_path / "log").read_text() == "requeue 77\n"


def test_scripts_can_be_read_by_bash():
    for script in FOLDER.glob("*.sh"):
        result = run_command("bash", "-n", script)
        assert result.returncode == 0, result.stderr
