"""Strikes scenarios at one file operation each, and looks at what is left: the fault bench.

A scenario is run once to count its operations. Then it is run again for a place, the N-th of them,
with a kind of fault: killed there, failed with an error, or cut short; or killed with everything
lost that was not flushed to the disk (a power cut). What is committed must be there and whole. Then
the scenario is run again without a fault, and must come to the same end as if nothing had happened.
"""

import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from pretrain_lib.checkpoint import folders
from pretrain_lib.data.tokens.verify import verify_folder
from tests.faults import scenarios

SOURCE = Path(__file__).with_name("shim.c")
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EACCES", "EROFS")
# Everything that takes room fails from the place on: a disk that stays full.
KINDS = ("kill", *ERRORS, "disk full", "short", "power cut", "power cut, names kept")
COUNT, KILL, FAIL, SHORTEN = range(4)
ENDS = {0: {"done"}, 75: {"resumable"}, 1: {"failed"}, 2: {"failed", "refused"}}
CLOCK = ("seconds", "row_seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
PASSING = ("starts", "run_id", "time", "git", "message")  # of a start, or with times in them


class State(ctypes.Structure):
    """What the shim reads and writes; as in shim.c."""

    _fields_ = (
        ("root", ctypes.c_char * 4096),
        ("shadow", ctypes.c_char * 4096),
        ("log", ctypes.c_char * 4096),
        ("count", ctypes.c_long),
        ("target", ctypes.c_long),
        ("mode", ctypes.c_int),
        ("error", ctypes.c_int),
        ("from_there_on", ctypes.c_int),
        ("struck", ctypes.c_int),
    )


@dataclass
class Report:
    """What came of the places of a scenario that were tried with one kind of fault."""

    tried: int = 0
    survived: int = 0
    """Those whose next start came to the same end as if nothing had happened."""
    lost: list[str] = field(default_factory=list)
    """What was committed and is not there."""
    broken: list[str] = field(default_factory=list)
    """What looks committed and is not whole."""
    left: list[str] = field(default_factory=list)
    """Files that stay behind for ever."""
    different: list[str] = field(default_factory=list)
    """Ends that are not as if nothing had happened."""
    unclear: list[str] = field(default_factory=list)
    """Tracebacks, errors without a line, and a status that is not true."""


def build_shim(folder):
    """Compile the shim and return its path; raises RuntimeError if there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("there is no C compiler (cc, gcc), which the fault bench needs")
    shim = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", shim, SOURCE]
    subprocess.run(command, check=True, capture_output=True)
    return shim


class Bench:
    """A server of scenarios, their inputs, and what each comes to without a fault."""

    def __init__(self, folder):
        self.folder, self.given, self.number = folder.resolve(), folder.resolve() / "given", 0
        self.folder.mkdir(exist_ok=True)
        self.console, self.state = self.folder / "console.txt", self.folder / "state"
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            env=os.environ | {"LD_PRELOAD": str(build_shim(self.folder)), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.server.stdout.readline() == "ready\n"
        assert self.run("inputs", self.folder) == 0, self.console.read_text()
        self.expected, self.calls, self.writes = {}, {}, {}

    def close(self):
        """End the server."""
        self.server.stdin.close()
        self.server.wait()

    def run(self, scenario, root, state=None, environment=None):
        """Run a scenario in a fork of the server; return how it ended."""
        task = {"scenario": scenario, "root": str(root), "given": str(self.given)}
        task["environment"] = environment or {}
        task |= {"console": str(self.console), "state": state and str(state)}
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def learn(self, scenario):
        """Run a scenario without a fault: note its operations and what it comes to."""
        root = self.new_root(scenario)
        self.arm(root, COUNT)
        assert self.run(scenario, root, self.state) == 0, self.console.read_text()
        lines = self.log.read_text().splitlines()
        self.calls[scenario] = [line.split("\t")[1:] for line in lines]
        self.writes[scenario] = sum(call == "write" for call, _ in self.calls[scenario])
        self.expected[scenario] = contents(root)
        return self.calls[scenario]

    def places(self, scenario, kind):
        """Return the places of a scenario, from 1 on."""
        count = self.writes[scenario] if kind == "short" else len(self.calls[scenario])
        return range(1, count + 1)

    def new_root(self, scenario):
        """Return a folder of its own for a run, with what the scenario starts from."""
        self.number += 1
        root = self.folder / f"run-{self.number}" / "root"
        root.mkdir(parents=True)
        scenarios.begun(scenario, root, self.given)
        return root

    def arm(self, root, mode, *, target=0, error=0, from_there_on=0, shadow=b""):
        """Write the state file of the shim."""
        self.log = root.parent / "log"
        self.state.write_bytes(
            State(
                bytes(root), shadow, bytes(self.log), 0, target, mode, error, from_there_on, 0
            )
        )  # fmt: skip

    def strike(self, scenario, kind, place, report):
        """Run a scenario with a fault, then without; add what came of it to the report."""
        root = self.new_root(scenario)
        options, power = {"target": place}, kind.startswith("power cut")
        if power:
            options["shadow"] = bytes(remember_flushed(root))
        mode = KILL if power or kind == "kill" else SHORTEN if kind == "short" else FAIL
        if mode == FAIL:
            options["error"] = getattr(errno, kind, errno.ENOSPC)
            options["from_there_on"] = int(kind == "disk full")
        self.arm(root, mode, **options)
        code, said = self.run(scenario, root, self.state), self.console.read_text()
        struck = self.log.read_text().splitlines()[0].split("\t")[1:] if self.log.exists() else None
        if struck is None:
            return  # the operations of this run were fewer
        name = f"{scenario}, {kind} at {place} ({struck[0]} {Path(struck[1]).relative_to(root)})"
        report.tried += 1
        before = problems_of(report)
        if power:
            drop_unflushed(root, names_kept=kind.endswith("names kept"))
        if mode == KILL:
            if code != -signal.SIGKILL:
                report.unclear.append(f"{name}: ended with {code}")
        else:
            report.unclear += [f"{name}: {problem}" for problem in unclear(root, code, said)]
        lost, broken = committed(root, said, self.given)
        report.lost += [f"{name}: {problem}" for problem in lost]
        report.broken += [f"{name}: {problem}" for problem in broken]
        if code != 0 and self.run(scenario, root) != 0:
            said = self.console.read_text().strip().splitlines()
            report.different.append(f"{name}: the next start fails: {said[-1] if said else ''}")
        self.compare(scenario, root, name, report)
        report.survived += problems_of(report) == before
        shutil.rmtree(root.parent, ignore_errors=True)

    def compare(self, scenario, root, name, report):
        """Compare what a scenario has come to with what it comes to without a fault."""
        found, expected = contents(root), self.expected[scenario]
        if found.keys() - expected.keys():  # is it for ever?
            self.run(scenario, root)
            found = contents(root)
        if left := sorted(found.keys() - expected.keys()):
            report.left.append(f"{name}: {', '.join(left[:5])}")
        others = [n for n in expected if n in found and found[n] != expected[n]]
        missing = [f"{n} is missing" for n in expected if n not in found]
        if others or missing:
            report.different.append(f"{name}: {', '.join([*others, *missing][:5])}")


def problems_of(report):
    """Return the number of all problems."""
    return sum(
        map(len, (report.lost, report.broken, report.left, report.different, report.unclear))
    )


def contents(root):
    """Return a digest of each file below a folder, without what is of the clock or of a start."""
    return {
        path.relative_to(root).as_posix(): _digest(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def _digest(path):
    if path.is_dir():
        return "an empty folder"
    if path.name == "files.json":  # hashes of files with times in them
        return str(folders.verify_checkpoint(path.parents[1]))
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        try:
            values = [_without_clock(json.loads(line)) for line in lines]
            return json.dumps([value for value in values if not _tells_of_a_fault(value)])
        except ValueError:
            return "broken JSON"
    root = next(parent for parent in path.parents if parent.name == "root")
    return hashlib.sha256(path.read_bytes().replace(os.fsencode(root), b"")).hexdigest()


def _tells_of_a_fault(row):
    return isinstance(row, dict) and row.get("event") == "not_saved"


INSIDE = f"{os.sep}root{os.sep}"  # what comes before differs from try to try


def _without_clock(value):
    if isinstance(value, list):
        return [_without_clock(each) for each in value]
    if not isinstance(value, dict):
        return str(value).partition(INSIDE)[2] if INSIDE in str(value) else value
    return {k: _without_clock(v) for k, v in value.items() if k not in (*CLOCK, *PASSING, "dir")}


def unclear(root, code, said):
    """Return what is not clear about a run that a call has failed in: its end, line and status."""
    if code not in ENDS:
        yield f"ended with {code}"
    if "Traceback" in said:
        yield f"a traceback: {said.strip().splitlines()[-1]}"
    if code != 0 and not any("error: " in line for line in said.splitlines()) and code != 75:
        yield "no line says why"
    status = root / "run" / "status.json"
    if (root / "run").is_dir() and status.is_file():
        state = json.loads(status.read_text())["state"]
        if state not in ENDS.get(code, ()) and code != 2:
            yield f"ended with {code}, but the status is {state}"


def committed(root, said, given):
    """Return what was committed and is lost, and what looks committed and is not whole."""
    lost, broken = [], []
    checkpoints = root / "run" / "checkpoints"
    newest = folders.find_newest(checkpoints) if checkpoints.is_dir() else None
    steps = [int(line.split("step-")[1][:8]) for line in said.splitlines() if "saved " in line]
    if steps and (newest is None or int(newest.name[-8:]) < max(steps)):
        lost.append(f"step {max(steps)} was saved, and the newest whole one is {newest}")
    if checkpoints.is_dir():
        for path in sorted(checkpoints.glob("step-*")):
            broken += folders.verify_checkpoint(path)
    if (root / "data" / "manifest.json").is_file():
        broken += verify_folder(root / "data")
    if (root / "out").is_dir() and not {"config.json", "model.safetensors", "README.md"} <= {
        path.name for path in (root / "out").iterdir()
    }:
        broken.append("the export is not whole")
    return lost, broken


def remember_flushed(root):
    """Take all that is below a folder for flushed; return the shadow folder of it."""
    shadow = root.parent / "shadow"
    shadow.mkdir()
    for path in [root, *root.rglob("*")]:
        number = path.stat().st_ino
        if path.is_dir():
            lines = [f"{int(p.is_dir())} {p.stat().st_ino} {p.name}\n" for p in path.iterdir()]
            (shadow / f"{number}.dir").write_text("".join(lines))
        else:
            shutil.copyfile(path, shadow / str(number))
            os.link(path, shadow / f"{number}.held")
    return shadow


def drop_unflushed(root, *, names_kept):
    """Leave below a folder what a power cut leaves: what was flushed, and nothing else.

    With `names_kept`, files and folders are where they were, but what was not flushed of their
    content is lost, as on file systems that write names early.
    """
    shadow, target = root.parent / "shadow", root.parent / "after"
    (_rebuild_names_kept if names_kept else _rebuild)(root, shadow, target)
    shutil.rmtree(root)
    target.rename(root)


def _rebuild(root, shadow, target, number=None):
    target.mkdir()
    listing = shadow / f"{number or root.stat().st_ino}.dir"
    for line in listing.read_text().splitlines() if listing.is_file() else ():
        is_folder, inode, name = line.split(" ", 2)
        if int(is_folder):
            _rebuild(root, shadow, target / name, inode)
        else:
            _restore(shadow / inode, target / name)


def _rebuild_names_kept(root, shadow, target):
    target.mkdir()
    for path in root.iterdir():
        if path.is_dir():
            _rebuild_names_kept(path, shadow, target / path.name)
        else:
            _restore(shadow / str(path.stat().st_ino), target / path.name)


def _restore(flushed, path):
    if flushed.is_file():
        shutil.copyfile(flushed, path)
    else:
        path.touch()


def draw(bench, count, seed):
    """Draw so many places, of scenarios and kinds of faults in turn."""
    generator, drawn = random.Random(seed), []
    pairs = [(scenario, kind) for scenario in bench.calls for kind in KINDS]
    generator.shuffle(pairs)
    while len(drawn) < count:
        scenario, kind = pairs[len(drawn) % len(pairs)]
        drawn.append((scenario, kind, generator.choice(bench.places(scenario, kind))))
    return drawn
