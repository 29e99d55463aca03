"""Import the library once, then fork a process for each command that comes over a socket.

    python server.py ADDRESS

A fork that has been asked for returns from `serve` and goes on as the interpreter would have with
the command's arguments, to its own end. It starts with a single thread: the imports below must not
start any, and compute nothing. Whoever asked holds the connection: when it closes, the process is
killed, as it is when this server's stdin closes.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import selectors
import signal
import socket
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import process as multiprocessing_process
from pathlib import Path

# Read when the libraries of numpy and pyarrow are loaded: neither is to start a thread. The CUDA
# runtime, which does not survive a fork, is not to be started to count devices.
SINGLE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
# Heavy, and imported by the library only where they are needed.
ALSO = (
    "datasets",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
# By packages when they are imported: a fork would go by the server's.
ROOT = Path(__file__).parents[2]  # of the repository, where `tests` is a package
READ_AT_IMPORT = ("HF_", "PYTHON", "TORCH_", "TORCHINDUCTOR_", "TRANSFORMERS_")
READ_LATER = ("HF_TOKEN", "TORCH_ELASTIC_", "TORCH_NCCL_", "PYTHONPATH")
# By launchers alone, which hand them on to what they start.
READ_BY_LAUNCHERS = ("PYTHON_EXEC", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")


def import_all() -> None:
    """Import the library, all of it, and what it imports late."""
    os.environ |= SINGLE_THREAD
    import pretrain_lib

    for name in ALSO:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(pretrain_lib.__path__, "pretrain_lib."):
        importlib.import_module(module.name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"{threads} threads run after the imports: a fork would lose them")
    gc.collect()
    gc.freeze()  # or each fork would copy the pages of all objects as it collects garbage


def difference(environment: dict) -> list[str]:
    """Return the variables in which a command's environment is not what the imports have seen."""
    names = environment.keys() | ENVIRONMENT.keys()
    paths = [text.get("PYTHONPATH", "").split(os.pathsep) for text in (environment, ENVIRONMENT)]
    others = (set(paths[0]) ^ set(paths[1])) - {"", str(ROOT)}
    return ["PYTHONPATH"] * bool(others) + [
        name
        for name in sorted(names)
        if name.startswith(READ_AT_IMPORT) and not name.startswith(READ_LATER + READ_BY_LAUNCHERS)
        if environment.get(name) != ENVIRONMENT.get(name)
    ]


class Server:
    """Waits for commands and for the ends of what they started."""

    def __init__(self, listener: socket.socket):
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self.accept)
        self.selector.register(0, selectors.EVENT_READ, self.close)
        self.running = {}  # connections by the pidfd of their process

    def serve(self) -> tuple[dict, list[int]]:
        """Answer for ever; return the command and its streams in a fork that is to run it."""
        while True:
            for key, _ in self.selector.select():
                if (command := key.data(key.fileobj)) is not None:
                    return command

    def accept(self, listener: socket.socket) -> tuple[dict, list[int]] | None:
        """Read a command and fork; return it in the fork."""
        connection, _ = listener.accept()
        size, streams, *_ = socket.recv_fds(connection, 4, 3)
        with connection.makefile("rb") as lines:
            command = json.loads(lines.read(int.from_bytes(size)))
        if names := difference(command["environment"]):
            connection.sendall(f"{names} are read at import: use sys.executable\n".encode())
        elif (pid := os.fork()) == 0:
            self.leave(listener, connection)
            return command, streams
        else:
            self.watch(pid, connection)
        for stream in streams:
            os.close(stream)
        return None

    def leave(self, *sockets: socket.socket) -> None:
        """Close in a fork what belongs to the server."""
        self.selector.close()
        for descriptor, (connection, _) in self.running.items():
            os.close(descriptor)
            connection.close()
        for connection in sockets:
            connection.close()

    def watch(self, pid: int, connection: socket.socket) -> None:
        """Tell who asked for a process its number, and later how it ended."""
        descriptor = os.pidfd_open(pid)
        self.running[descriptor] = connection, pid
        self.selector.register(descriptor, selectors.EVENT_READ, self.report)
        self.selector.register(connection, selectors.EVENT_READ, lambda _: self.lose(descriptor))
        connection.sendall(f"pid {pid}\n".encode())

    def report(self, descriptor: int) -> None:
        """Tell how a process ended."""
        connection, pid = self.running.pop(descriptor)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.selector.unregister(descriptor)
        with suppress(KeyError):  # it was lost before
            self.selector.unregister(connection)
        os.close(descriptor)
        with suppress(BrokenPipeError):
            connection.sendall(f"{status}\n".encode())
        connection.close()

    def lose(self, descriptor: int) -> None:
        """Kill the process of a connection that has closed."""
        connection, pid = self.running[descriptor]
        self.selector.unregister(connection)
        os.kill(pid, signal.SIGKILL)

    def close(self, _: int) -> None:
        """End, and with it all that runs."""
        for _, pid in self.running.values():
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def become(command: dict, streams: list[int]) -> None:
    """Take on a command's streams, directory, environment and number of threads."""
    import numpy
    import torch

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Anew: the old objects know whether what they were opened on can be sought in.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115, PTH123
    sys.stderr = open(  # noqa: SIM115, PTH123
        2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1
    )
    os.chdir(command["cwd"])
    multiprocessing_process.ORIGINAL_DIR = command["cwd"]
    os.environ.clear()
    os.environ |= command["environment"]
    if str(ROOT) in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        sys.path.insert(1, str(ROOT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # `random` sees to itself; the number of threads was read when OpenMP was loaded.
    numpy.random.seed(random.randrange(2**32))
    threads = os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(threads) if threads else len(os.sched_getaffinity(0)))


def run(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does: options, then a script, -m with a module, -c with code."""
    sys.executable = os.environ.get("FORKS_CHILDREN", sys.executable)
    working_directory = True  # is where imports look first
    while arguments[0] in ("-u", "-W", "-P"):
        option = arguments.pop(0)
        if option == "-P":
            working_directory = False
        elif option == "-u":
            sys.stdout.reconfigure(write_through=True)
        else:
            warnings.simplefilter(arguments.pop(0))
    if arguments[0] == "-m":
        sys.argv, sys.path[:1] = arguments[1:], [str(Path.cwd())] * working_directory
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    if arguments[0] == "-c":
        sys.argv, code = ["-c", *arguments[2:]], arguments[1]
        sys.path[:1], name = [""] * working_directory, "<string>"
    else:
        name = str(Path(arguments[0]).absolute())
        sys.argv, sys.path[0], module.__file__ = arguments, str(Path(name).parent), name
        code = Path(name).read_bytes()
    exec(compile(code, name, "exec"), module.__dict__)


def end(status: list[int]) -> None:
    """End a fork when all other exit handlers have run, without taking the modules apart.

    That takes half a second, more than most commands.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status:  # else it is to die of an interrupt
        os._exit(status[0] & 0xFF)


@contextmanager
def noted_status(status: list[int]) -> Iterator[None]:
    """Note the exit code with which the interpreter will answer to what a command raises."""
    try:
        yield
        status.append(0)
    except SystemExit as error:
        given = error.code
        status.append(0 if given is None else given if isinstance(given, int) else 1)
        raise
    except Exception:
        status.append(1)
        raise


if __name__ == "__main__":
    exit_status: list[int] = []
    atexit.register(end, exit_status)  # the first registered is the last to run
    ENVIRONMENT = dict(os.environ)
    import_all()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C, pytest decides
    with socket.socket(socket.AF_UNIX) as listening:
        address = Path(sys.argv[1])
        listening.bind(f"{address}.new")
        listening.listen(64)
        Path(f"{address}.new").rename(address)  # which says that it is ready
        asked, its_streams = Server(listening).serve()
    become(asked, its_streams)
    with noted_status(exit_status):
        run(asked["arguments"])
