"""Kills a training run in every phase of a save and counts what is lost; see `README.md`."""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from measuring import describe_run  # noqa: E402

from pretrain_lib import Job, prepare  # noqa: E402
from pretrain_lib.run_folder.metrics import human_time  # noqa: E402
from tests.conftest import VOCABULARY  # noqa: E402
from tests.faults import Report, inject  # noqa: E402

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


def main() -> None:
    """Kill a training run again and again and write what came of it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    options, started = parser.parse_args(), time.monotonic()
    result = describe_run() | {"arguments": {"kills": options.kills, "seed": options.seed}}
    for key, values in result.items():
        print(f"{key:<12}{', '.join(f'{name} {value}' for name, value in values.items())}")
    with tempfile.TemporaryDirectory() as temporary:
        report = measure(options, Path(temporary))
    print_table(report)
    result["run"] |= {"seconds": round(time.monotonic() - started)}
    result["machine"] |= {"load_after": os.getloadavg()[0]}
    result["report"] = asdict(report) | {"within_save": report.within_save}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['run']['seconds']} s, {options.out}")
    if any(getattr(report, name) for name in CONTENTS):
        sys.exit("error: checkpoints were lost or broken, or a run came out different")


if __name__ == "__main__":
    main()
