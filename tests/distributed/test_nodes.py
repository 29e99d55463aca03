"""Two nodes, emulated: two launchers on loopback, each with an address of its own."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from accelerate.utils.other import get_free_port

from tests.conftest import ROOT, forked_launchers, read_rows, tiny_flags
from tests.distributed.test_launched import processes_of

NODES = ("127.0.0.1", "127.0.0.2")


def environment_of(node, **variables):
    """Return the environment of a command on a node, known by its address."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"PATH": path, "PET_LOCAL_ADDR": node, "OMP_NUM_THREADS": "1", "MAX_RESTARTS": "2"}
    return {**os.environ, **settings, **variables}


@contextmanager
def two_nodes(folder, *flags):
    """Hold a launcher on each node, as ddp_multi_node.yaml says; what it prints goes to files."""
    folder.mkdir()
    port, launchers = get_free_port(), []
    for rank, node in enumerate(NODES):
        command = ["accelerate_configs/with_restarts.sh"]
        command += ["--config_file", "accelerate_configs/ddp_multi_node.yaml"]
        command += ["--machine_rank", rank, "--main_process_ip", NODES[0]]
        command += ["--rdzv_conf", f"is_host={int(rank == 0)}"]
        # What stands for the sixteen GPUs, and for a port that is free on a machine of one's own.
        command += ["--num_processes", 2, "--main_process_port", port, "--mixed_precision", "no"]
        command += ["recipes/gpt2_124m.py", "--system.processes", 2, *flags]
        with (folder / f"node-{rank}").open("w") as said:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=environment_of(node, PET_RDZV_ID=str(folder)) | forked_launchers(),
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        launchers.append(process)
    try:
        yield launchers
    finally:
        for launcher in (launcher for launcher in launchers if launcher.poll() is None):
            for process in [launcher, *psutil.Process(launcher.pid).children()]:
                process.kill()


def said_by(folder):
    return "".join(path.read_text() for path in sorted(folder.glob("node-*")))


def wait_for(condition, launchers, folder):
    deadline = time.monotonic() + 300
    while not condition():
        assert all(launcher.poll() is None for launcher in launchers), said_by(folder)
        assert time.monotonic() < deadline, said_by(folder)
        time.sleep(0.02)


@pytest.mark.slow
def test_two_nodes_that_each_lost_a_process_are_those_that_never_did(prepared, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--checkpoint.every", "3", "--schedule.tokens", "10240"]
    arguments = [*tiny_flags(prepared, whole / "run"), *flags]
    with two_nodes(whole, *arguments) as launchers:
        assert [launcher.wait(300) for launcher in launchers] == [0, 0], said_by(whole)
    flags += ["--run.resume", "never"]  # which speaks of the first start
    with two_nodes(killed, *tiny_flags(prepared, killed / "run"), *flags) as launchers:
        for node, step in ((1, 8), (0, 20)):
            wait_for(lambda step=step: f"step {step:2}/40" in said_by(killed), launchers, killed)
            workers = map(psutil.Process, processes_of(killed / "run"))
            (worker,) = (w for w in workers if w.environ()["RANK"] == str(node))
            worker.kill()
        assert [launcher.wait(300) for launcher in launchers] == [0, 0], said_by(killed)
    assert len(re.findall("resumed at step [1-9]", said_by(killed))) == 2
    status = json.loads((killed / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 40)
    rows = [read_rows(folder / "run") for folder in (killed, whole)]
    assert [row["step"] for row in rows[1] if row["kind"] == "train"] == list(range(1, 41))
    assert rows[0] == rows[1]
