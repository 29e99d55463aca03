"""Runs scenarios in forks of a process that has imported everything and has no threads.

Reads a JSON object per line: the scenario, its folders, and the state file of the shim to be armed;
answers with the exit code. To be started with the shim in LD_PRELOAD.
"""

import ctypes
import gc
import json
import os
import sys
import traceback
from pathlib import Path

from tests.forks.server import import_all


def serve():
    """Answer until stdin closes."""
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            work(task)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps(code), flush=True)


def work(task):
    """Run a scenario and end this process, whatever comes."""
    code = 99
    try:
        os.setsid()  # a kill takes this process and all that it has started
        with Path(task["console"]).open("w") as console:
            for stream in (1, 2):
                os.dup2(console.fileno(), stream)
        os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
        os.environ |= task["environment"]
        from tests.faults.scenarios import run

        if task["state"]:
            os.environ["FAULTS_STATE"] = task["state"]  # for processes that this one starts
            assert ctypes.CDLL(None).faults_arm(task["state"].encode()) == 0
        code = run(task["scenario"], task["root"], task["given"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    import_all()
    import torch._dynamo  # noqa: F401

    import tests.faults.scenarios  # noqa: F401

    gc.freeze()
    print("ready", flush=True)
    serve()
