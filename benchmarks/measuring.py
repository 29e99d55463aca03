"""What the benchmarks share: rows, fresh processes, progress, and the report.

Only the standard library: what is imported in a child is part of what is measured.
"""

import argparse
import importlib.metadata
import inspect
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("pretrain_lib", "torch", "accelerate", "transformers", "safetensors", "xxhash")


@dataclass
class Row:
    """One line of the table."""

    section: str
    name: str
    unit: str
    values: list[float]
    peer: list[float] | None = None
    """What the values are divided by, repetition by repetition."""
    goal: str = ""
    """A condition on the `value` or the `ratio`, such as "ratio >= 0.9"."""
    note: str = ""

    @property
    def median(self) -> float:
        """The median of the values."""
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        """The median ratio to the peer."""
        if self.peer is None:
            return None
        return statistics.median(a / b for a, b in zip(self.values, self.peer, strict=True))

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, if there is one."""
        if not self.goal:
            return None
        kind, sign, bound = self.goal.split()
        figure = self.ratio if kind == "ratio" else self.median
        return figure >= float(bound) if sign == ">=" else figure < float(bound)

    def __str__(self) -> str:
        digits = 0 if self.median >= 1000 else 4 if self.median < 1 else 1
        figure = f"{self.median:,.{digits}f} {self.unit}"
        ratio = "" if self.ratio is None else f"{self.ratio:.3g} x"
        verdict = f"{self.goal}: {'met' if self.met else 'MISSED'}" if self.goal else ""
        return f"  {self.name:<42}{figure:>16}{ratio:>9}   {verdict:<24}{self.note}".rstrip()


# Processes


class ChildFailed(SystemExit):
    """A child process failed, and said on stderr why; ends the benchmark unless it is caught."""


def run_child(function: Callable, *arguments: object, copies: int = 1) -> list[Any]:
    """Call a function of a benchmark in fresh processes, let go together; return their results.

    The function calls `ready` when it is. Several copies are told apart by two more arguments: the
    number of each, and how many there are.
    """
    children = []
    for copy in range(copies):
        given = json.dumps([*arguments, copy, copies] if copies > 1 else arguments)
        file = inspect.getsourcefile(function)
        command = [sys.executable, file, "--child", function.__name__, given]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen(command, **pipes))
    are_ready = [child.stdout.readline() for child in children]
    for child in children if all(are_ready) else ():
        child.stdin.write("go\n")
        child.stdin.flush()
    results = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise ChildFailed(f"error: {function.__name__} failed, see above")
    return [json.loads(result) for result in results]


def ready() -> None:
    """Wait, in a child, to be let go."""
    print("ready", file=sys.__stdout__, flush=True)
    sys.stdin.readline()


def begin(main: Callable[[], None]) -> None:
    """Run a benchmark, or in a child of `run_child` the function that it is there for."""
    if sys.argv[1:2] != ["--child"]:
        return main()
    function = getattr(sys.modules["__main__"], sys.argv[2])
    with redirect_stdout(sys.stderr):  # what peers print is no result
        result = function(*json.loads(sys.argv[3]))
    print(json.dumps(result))
    return None


def timed(action: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def resident_mb() -> float:
    """Return the resident memory of this process (VmRSS)."""
    return _status_mb("VmRSS")


def peak_resident_mb() -> float:
    """Return the highest resident memory of this process (VmHWM)."""
    return _status_mb("VmHWM")


def forget_peak() -> None:
    """Let the highest resident memory begin anew at the present one (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(line for line in lines if line.startswith(f"{field}:")).split()[1]
    return int(kibibytes) * 1024 / 1e6


# Progress


def say(text: str) -> None:
    """Show what is being done: on a terminal in one line, in a log in a line each."""
    line = f"\r\033[K{text}\r" if sys.stderr.isatty() else f"{text}\n"
    print(line, end="", file=sys.stderr, flush=True)


def with_eta(names: list[str]) -> Iterator[str]:
    """Yield the names, and show which it is and how long the rest will take."""
    started = time.monotonic()
    for done, name in enumerate(names):
        left = (time.monotonic() - started) / max(done, 1) * (len(names) - done)
        say(f"{done + 1}/{len(names)} {name}{f', {left:.0f} s left' if done else ''}")
        yield name


def in_turn(measures: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list]:
    """Call each measure `repeat` times, in turn; return what they return."""
    values: dict[str, list] = {name: [] for name in measures}
    for name in with_eta([*measures] * repeat):
        values[name].append(measures[name]())
    return values


# The report


def build_parser(summary: str, name: str, *, repeat: int = 5) -> argparse.ArgumentParser:
    """Return a parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--repeat", type=int, default=repeat)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return parser


def describe_run(packages: Iterable[str] = PACKAGES) -> dict[str, dict]:
    """Return the machine, the versions, and the commit of the checkout."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    git = ["git", "-C", str(Path(__file__).parent), "--no-optional-locks"]
    git += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
            "gpu": _gpu_name(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "load_before": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "run": {"commit": commit or None, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
    }


def _gpu_name() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _version(package: str) -> str | None:
    """Return a version; None for what is not installed, as ours on a machine with a mere copy."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_report(
    rows: Iterable[Row],
    options: argparse.Namespace,
    *,
    headers: dict[str, str],
    packages: Iterable[str] = PACKAGES,
    raw: list | None = None,
) -> list[Row]:
    """Print rows as they come, each section under its header; write all to `options.out`.

    Returns those that miss their goal. `raw` is filled while the rows are measured: what else the
    file is to keep.
    """
    started, done = time.monotonic(), []
    report = describe_run(packages)
    given = {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items()}
    report["arguments"] = {k: v for k, v in given.items() if k != "out"}
    for key, values in report.items():
        print(f"{key:<12}{', '.join(f'{name} {value}' for name, value in values.items())}")
    for row in rows:
        if row.section not in {r.section for r in done}:
            print(f"\n{headers.get(row.section, row.section)}")
        done.append(row)
        print(row, flush=True)
    report["run"] |= {"seconds": round(time.monotonic() - started)}
    report["machine"] |= {"load_after": os.getloadavg()[0]}
    derived = ("median", "ratio", "met")
    report["rows"] = [asdict(row) | {name: getattr(row, name) for name in derived} for row in done]
    if raw is not None:
        report["raw"] = raw
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, default=str) + "\n")
    missed = [row for row in done if row.met is False]
    names = "; ".join(f"{row.section}: {row.name}" for row in missed)
    print(f"\n{report['run']['seconds']} s, {options.out}; missed: {names or 'nothing'}")
    return missed
