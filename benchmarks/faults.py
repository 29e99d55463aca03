"""Kills a training run in every phase of a save and counts what is lost; see `README.md`.

With `--every`, commands are killed, failed, cut short and cut off from power at their file
operations instead, all of them or each N-th, in random order. A run that was cut goes on from the
lines of `faults.every-N.jsonl` beside its result; delete them to begin again.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from measuring import describe_run  # noqa: E402

from pretrain_lib import Job, prepare  # noqa: E402
from pretrain_lib.run_folder.metrics import human_time  # noqa: E402
from tests.conftest import VOCABULARY  # noqa: E402
from tests.faults import bench as faults  # noqa: E402
from tests.faults.kills import Report, inject  # noqa: E402

CONTENTS = {
    "lost": "committed checkpoints lost",
    "broken": "broken checkpoints committed",
    "accepted_broken": "broken checkpoints accepted",
    "different": "differences from the run never killed",
}


def prepare_text(folder: Path) -> None:
    """Prepare the embedded corpus."""
    job = Job(("python-stdlib",), train_tokenizer=VOCABULARY, validation="hash:0.01")
    prepare(job, folder, quiet=True)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Return the report of all kills, saying from time to time how far it is."""
    # In a fork, because this process must not compute anything.
    child = get_context("fork").Process(target=prepare_text, args=(folder / "prepared",))
    child.start()
    child.join()
    started = time.monotonic()

    def say(report: Report) -> None:
        # Not by tqdm: its lock is shared with forks, and one could be killed that holds it.
        if report.kills % max(1, options.kills // 20) == 0:
            left = (time.monotonic() - started) / report.kills * (options.kills - report.kills)
            print(f"{report.kills}/{options.kills} kills  eta {human_time(left)}", file=sys.stderr)

    settings = {"kills": options.kills, "seed": options.seed}
    return inject(folder, folder / "prepared", after_kill=say, **settings)


def print_table(report: Report) -> None:
    """Print where the kills have fallen and what came of them."""
    print(f"\n  {'phase':<42}{'kills':>8}{'takes, ms':>12}")
    for phase, kills in report.phases.items():
        print(f"  {phase:<42}{kills:>8}{1000 * report.phase_seconds[phase]:>12.1f}")
    print(f"  {'within a save':<42}{report.within_save:>8}\n")
    for name, text in CONTENTS.items():
        print(f"  {text:<42}{len(getattr(report, name)):>8}")
    print(f"  {'runs compared with one never killed':<42}{report.chains:>8}")


def strike_every(folder: Path, progress: Path, options: argparse.Namespace) -> dict:
    """Return the report of each scenario and kind of fault, at each N-th operation or some of them.

    What came of each place is a line of `progress`, from which a run that was cut goes on.
    """
    benches = [open_bench(folder / str(number)) for number in range(options.processes)]
    places = [
        (name, kind, place)
        for number, kind in enumerate(faults.KINDS)
        for name in benches[0].calls
        for place in benches[0].places(name, kind)[number % options.every :: options.every]
    ]
    random.Random(0).shuffle(places)  # what has been done after a while is a sample of all
    done = read_progress(progress)
    strike_all(benches, [place for place in places if place not in done], done, progress, options)
    for bench in benches:
        bench.close()
    return {
        "places": len(places),
        "faults": {
            name: {
                kind: merge(
                    one for (n, k, _), one in sorted(done.items()) if (n, k) == (name, kind)
                )
                for kind in faults.KINDS
            }
            for name in benches[0].calls
        },
    }


def open_bench(folder: Path) -> faults.Bench:
    """Open a bench that has learned all scenarios."""
    bench = faults.Bench(folder)
    for name in faults.scenarios.SCENARIOS:
        bench.learn(name)
    return bench


def strike_all(
    benches: list[faults.Bench],
    places: list[tuple],
    done: dict[tuple, dict],
    progress: Path,
    options: argparse.Namespace,
) -> None:
    """Strike places by several benches at a time; add the reports to `done` and `progress`."""
    idle, started, total = SimpleQueue(), time.monotonic(), len(places) + len(done)
    for bench in benches:
        idle.put(bench)

    def strike(place: tuple[str, str, int]) -> tuple[tuple, dict] | None:
        if time.monotonic() - started > 60 * options.minutes:
            return None
        report, bench = faults.Report(), idle.get()
        try:
            bench.strike(*place, report)
        finally:
            idle.put(bench)
        return place, asdict(report)

    with ThreadPoolExecutor(len(benches)) as executor, progress.open("a") as file:
        for number, result in enumerate(executor.map(strike, places), start=1):
            if result is None:
                break
            done[result[0]] = result[1]
            file.write(json.dumps([*result[0], result[1]]) + "\n")
            file.flush()
            if number % 25 == 0:
                left = (time.monotonic() - started) / number * (len(places) - number)
                survived = sum(one["survived"] for one in done.values())
                said = f"{len(done):,}/{total:,} places, {survived:,} survived"
                print(f"{said}  eta {human_time(left)}", file=sys.stderr, flush=True)


def read_progress(path: Path) -> dict[tuple[str, str, int], dict]:
    """Return what came of the places of a run that was cut."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {(name, kind, place): report for name, kind, place, report in map(json.loads, lines)}


def merge(reports: Iterable[dict]) -> dict:
    """Return the sum of the reports of several places."""
    total = asdict(faults.Report())
    for report in reports:
        total = {name: value + report[name] for name, value in total.items()}
    return total


def print_faults(found: dict[str, dict[str, dict]]) -> None:
    """Print the places that were tried and what came of them."""
    columns = ("tried", "survived", "lost", "broken", "left", "different", "unclear")
    print(f"\n  {'':<44}" + "".join(f"{column:>11}" for column in columns))
    for name, kinds in found.items():
        for kind, report in kinds.items():
            values = [report[column] for column in columns]
            counts = [value if isinstance(value, int) else len(value) for value in values]
            print(f"  {f'{name}: {kind}':<44}" + "".join(f"{count:>11,}" for count in counts))


def parse() -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    text = "strike each N-th file operation of several commands, by default all"
    parser.add_argument("--every", type=int, nargs="?", const=1, metavar="N", help=text)
    text = "of --every: places that are struck at the same time"
    parser.add_argument("--processes", type=int, default=1, help=text)
    text = "of --every: stop after so long; the same command goes on"
    parser.add_argument("--minutes", type=float, default=math.inf, help=text)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    return parser.parse_args()


def main() -> None:
    """Kill a training run again and again, or strike commands, and write what came of it."""
    options, started = parse(), time.monotonic()
    names = ("kills", "seed") if options.every is None else ("every",)
    result = describe_run() | {"arguments": {name: getattr(options, name) for name in names}}
    for key, values in result.items():
        print(f"{key:<12}{', '.join(f'{name} {value}' for name, value in values.items())}")
    with tempfile.TemporaryDirectory() as temporary:
        if options.every is None:
            report = measure(options, Path(temporary))
            print_table(report)
            result["report"] = asdict(report) | {"within_save": report.within_save}
            is_good = not any(getattr(report, name) for name in CONTENTS)
        else:
            progress = options.out.with_suffix(f".every-{options.every}.jsonl")
            result |= strike_every(Path(temporary), progress, options)
            print_faults(result["faults"])
            reports = [one for kinds in result["faults"].values() for one in kinds.values()]
            is_good = all(one["tried"] == one["survived"] for one in reports)
    result["run"] |= {"seconds": round(time.monotonic() - started)}
    result["machine"] |= {"load_after": os.getloadavg()[0]}
    write(result, options.out, key="kills" if options.every is None else "every")
    if options.every is not None and len(read_progress(progress)) == result["places"]:
        progress.unlink()
    print(f"\n{result['run']['seconds']} s, {options.out}")
    if not is_good:
        sys.exit("error: something was lost, broken, left behind or unclear, or came out different")


def write(result: dict, out: Path, *, key: str) -> None:
    """Write a result beside that of the other kind of run."""
    there = json.loads(out.read_text()) if out.is_file() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(there | {key: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
