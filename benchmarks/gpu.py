"""Everything that a GPU has to show, in one command of about ten minutes on an H100 or H200.

    python benchmarks/gpu.py --nanogpt ../nanoGPT

Correctness first (the tests marked `cuda`), then speed and memory of GPT-2 124M and LLaMA 1.3B
against the peers, then profiles. Each result is written as soon as it stands, and what no time is
left for is named. Wants torch, accelerate, transformers and what they bring, pyarrow, xxhash,
tiktoken, lazy_loader, psutil, matplotlib and pytest; no lm-eval, datasets or orjson.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from contenders import (
    COMPILED,
    DTYPES,
    FAMILIES,
    OURS,
    Trial,
    add_path_flags,
    device,
    peer_name,
    peer_paths,
    run_trial,
)
from measuring import RESULTS, ChildFailed, begin, describe_run, ready, run_child, say
from profiling import profile_trial

from pretrain_lib.models.flops import device_peak, model_flops
from pretrain_lib.plan.memory import estimate_memory
from pretrain_lib.plan.step import Step

ROOT = Path(__file__).parents[1]
PRIMED_AT_ONCE = 4  # trials that compile while the tests run
PRIMED_BYTES = 30e9  # and take no more memory than this each


@dataclass(frozen=True)
class Stage:
    """Something to do, and about how long it takes on an H200 once it is compiled."""

    name: str
    seconds: int
    trial: Trial | None = None
    profiled: bool = False


def stages(options: argparse.Namespace) -> list[Stage]:
    """Return what to do, in order of worth."""
    paths = peer_paths(options)
    dtype = "fp32" if options.tiny else "bf16"  # not every CPU is fast in bf16
    gpt2 = Trial("ours", "gpt2", dtype, 64, 1024, warmup=3, steps=15, paths=paths)
    llama = Trial("ours", "llama", dtype, 8, 2048, warmup=3, steps=8, paths=paths)
    if options.tiny:
        small = {"num_layers": 1, "num_heads": 2, "width": 64, "vocabulary_size": 500}
        gpt2 = replace(gpt2, batch=4, length=32, shape=small, warmup=1, steps=2)
        shape = small | {"num_key_value_heads": 2, "mlp_width": 96}
        llama = replace(llama, batch=2, length=32, shape=shape, warmup=1, steps=2)
    b, nano = gpt2.batch, f"nanoGPT{COMPILED}"
    trials = [
        gpt2,
        replace(gpt2, contender=nano),
        llama,
        replace(gpt2, documents=4),
        replace(gpt2, batch=b // 2),
        replace(gpt2, batch=b // 2, contender=nano),
        replace(llama, batch=2 * llama.batch),
        replace(llama, contender="transformers"),
        replace(gpt2, batch=b // 2, contender="transformers"),
        replace(llama, contender="ours lean"),
        replace(gpt2, batch=b // 4),
        replace(gpt2, batch=b // 4, contender=nano),
        replace(llama, contender="ours leanest"),
        replace(llama, documents=4),
        replace(gpt2, dtype="fp32", batch=b // 4),
        replace(gpt2, dtype="fp32", batch=b // 4, contender=nano),
        replace(gpt2, batch=b // 2, contender=f"transformers{COMPILED}"),
        replace(llama, batch=llama.batch // 2),
    ]
    seconds = 2 if options.tiny else 25
    speed = [Stage(name_of(trial), seconds, trial) for trial in trials if is_here(trial)]
    profiles = [
        Stage(f"profile of {name_of(trial)}", seconds, replace(trial, steps=3), profiled=True)
        for trial in (gpt2, llama)
    ]
    tests = [] if options.no_tests else [Stage("correctness", 150)]
    return [*tests, *speed[:4], *profiles, *speed[4:]]


def is_here(trial: Trial) -> bool:
    """Return whether a contender is ours, a package, or a checkout that was named."""
    return trial.contender in OURS or peer_name(trial.contender) in {"transformers", *trial.paths}


def name_of(trial: Trial) -> str:
    """Return what a row of the table is called."""
    documents = f", {trial.documents} documents" if trial.documents else ""
    sizes = f"{trial.batch} x {trial.length}{documents}"
    return f"{trial.family} {trial.dtype} {trial.contender}, {sizes}"


def measure(given: dict) -> dict:
    """Run a trial in a process of its own."""
    ready()
    return run_trial(Trial(**given))


def profile(given: dict, folder: str, name: str) -> dict:
    """Profile the steps of a trial in a process of its own."""
    ready()
    return profile_trial(Trial(**given), Path(folder), name)


def run_tests(out: Path, trials: list[Trial], *, prime: bool) -> dict:
    """Run the tests marked cuda while the first trials compile, whose results later ones find."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "tests/cuda", "--durations=8", "-rf"]
    with (out / "tests.log").open("w") as log:
        tests = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        if prime:
            _compile_ahead(trials)
        code = tests.wait()
    text = (out / "tests.log").read_text()
    failed = [line for line in text.splitlines() if line.startswith("FAILED")]
    return {"exit": code, "failed": failed, "summary": text.strip().splitlines()[-1]}


def _compile_ahead(trials: list[Trial]) -> None:
    """Let trials compile beside one another into inductor's cache."""
    # One step; the cache on disk does not care whose it was.
    chosen = [t for t in trials if _is_compiled(t) and _planned_bytes(t) < PRIMED_BYTES]
    for first in range(0, len(chosen), PRIMED_AT_ONCE):
        children = []
        for trial in chosen[first : first + PRIMED_AT_ONCE]:
            given = json.dumps([asdict(replace(trial, warmup=1, steps=1))])
            command = [sys.executable, __file__, "--child", "measure", given]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, **quiet)
            child.stdin.write("go\n")
            child.stdin.close()
            children.append(child)
        for child in children:
            child.wait()


def _is_compiled(trial: Trial) -> bool:
    return trial.contender in OURS or trial.contender.endswith(COMPILED)


def _planned_bytes(trial: Trial) -> int:
    """Return what `--plan` says that a trial takes, as if it were ours."""
    changes = OURS.get(trial.contender, {})
    with torch.device("meta"):
        model = FAMILIES[trial.family][0](trial.config)
    step = Step(
        trial.batch,
        trial.length,
        precision=trial.dtype,
        activation_checkpointing=changes.get("system.activation_checkpointing", "none"),
        moments=changes.get("optimizer.moments", "fp32"),
    )
    return estimate_memory(model, step).peak


def row_of(trial: Trial, result: dict) -> dict:
    """Return the figures of a trial."""
    speed = trial.batch * trial.length / median(result["seconds"])
    with torch.device("meta"):
        model = FAMILIES[trial.family][0](trial.config)
    flops = model_flops(model, sequence_length=trial.length)
    peak = device_peak(device(), DTYPES[trial.dtype]) if trial.dtype == "bf16" else None
    row = {
        "tokens_per_second": speed,
        "mfu": peak and speed * flops.total / peak,
        "peak_gb": result["peak_mb"] / 1e3,
        "milliseconds": [round(1e3 * s, 2) for s in result["seconds"]],
        "first_steps_seconds": [round(s, 1) for s in result["warmup_seconds"]],
        "matrix_tflops": result["matrix_rate"] / 1e12,
        "loss": result["loss"],
    }
    if trial.contender in OURS and device().type == "cuda":
        row["planned_gb"] = _planned_bytes(trial) / 1e9
    return row


def run_stage(stage: Stage, out: Path, ahead: list[Trial], *, prime: bool) -> dict:
    """Do what a stage says, and return its row."""
    if stage.trial is None:
        return run_tests(out, ahead, prime=prime)
    try:
        if stage.profiled:
            file = "".join(c if c.isalnum() else "_" for c in stage.name)
            return run_child(profile, asdict(stage.trial), str(out), file)[0]
        return row_of(stage.trial, run_child(measure, asdict(stage.trial))[0])
    except ChildFailed as error:
        return {"failed": str(error)}


def run_all(options: argparse.Namespace) -> Iterator[tuple[Stage, dict]]:
    """Run the stages for which there is time; yield and keep each with what came of it."""
    started, todo = time.monotonic(), stages(options)
    ahead = [stage.trial for stage in todo if stage.trial and not stage.profiled]
    with (options.out / "rows.jsonl").open("w") as rows:
        for number, stage in enumerate(todo):
            elapsed = time.monotonic() - started
            if elapsed + stage.seconds > 60 * options.minutes:
                row = {"left_out": "no time was left"}
            else:
                say(f"{elapsed:4.0f} s  {number + 1}/{len(todo)} {stage.name}")
                row = run_stage(stage, options.out, ahead, prime=not options.tiny)
                row["seconds"] = round(time.monotonic() - started - elapsed, 1)
            print(json.dumps({"stage": stage.name} | row), file=rows, flush=True)
            yield stage, row


def format_row(stage: Stage, row: dict) -> str:
    """Return a line of the table."""
    if "tokens_per_second" in row:
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        planned = f" (planned {row['planned_gb']:.1f})" if "planned_gb" in row else ""
        return (
            f"{stage.name:<48}{row['tokens_per_second']:>10,.0f} tokens/s  mfu {mfu:>6}  "
            f"{row['peak_gb']:.1f} GB{planned}"
        )
    shown = {key: value for key, value in row.items() if key not in ("top", "seconds")}
    return f"{stage.name:<48}{json.dumps(shown)}"


def main() -> None:
    """Run the tests, the trials and the profiles, and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="what would end later is left")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="a folder")
    parser.add_argument("--no_tests", action="store_true", help="speed and profiles only")
    parser.add_argument("--tiny", action="store_true", help="sizes for a try without a GPU")
    add_path_flags(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if options.tiny:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # a CPU compiles for minutes
    sources = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sources))
    (options.out / "machine.json").write_text(json.dumps(describe_run(), indent=1) + "\n")
    planned = stages(options)
    print(f"{len(planned)} stages, about {sum(s.seconds for s in planned) / 60:.0f} minutes:")
    for stage in planned:
        print(f"  {stage.seconds:>4} s  {stage.name}")
    lines = [format_row(stage, row) for stage, row in run_all(options)]
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    begin(main)
