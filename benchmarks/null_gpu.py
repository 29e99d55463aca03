"""What a GPU would be asked to do, counted on a machine without one.

    python benchmarks/null_gpu.py

Two small libraries (`null_gpu/*.c`) answer CUDA's runtime, driver and cuBLAS as an H200 would,
launch nothing, and write down every call. Above them runs torch as it is: its CUDA code, its
allocator, torch.compile with Triton for the card. So launches, waits, grids, the types of matrix
products and peak memory are those of a GPU; numbers that are computed mean nothing, and times
neither. Wants torch built for CUDA, a C compiler, and nothing else: no GPU, no driver.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from measuring import RESULTS, begin, describe_run, ready, run_child, with_eta
from null_gpu_cases import Case, all_cases
from null_gpu_counts import LOG
from null_gpu_runs import prepare_text

SOURCES = Path(__file__).parent / "null_gpu"
BATCHES, DOCUMENTS = (16, 64), (0, 1, 4, 64, 1024)
FIRST_STEPS, ALL_STEPS = 4, 6
BEGUN, RESUMED = "a run, begun", "the run, resumed"
RUNTIME = ("log.c", "memory.c", "runtime.c", "cublas.c")


def require_cuda_build() -> None:
    """Exit where torch or the compiler that this needs is missing."""
    if torch.version.cuda is None:
        sys.exit(f"error: null_gpu.py needs a CUDA build of torch, and this is {torch.__version__}")
    if not shutil.which("cc"):
        sys.exit("error: null_gpu.py needs a C compiler, and there is no cc on the PATH")


def build_libraries(folder: Path) -> dict[str, str]:
    """Compile the null GPU into a folder; return the environment that puts it under torch."""
    site = Path(sysconfig.get_paths()["purelib"])
    major = torch.version.cuda.split(".")[0]
    headers = (site / "nvidia" / f"cu{major}" / "include", site / "triton/backends/nvidia/include")
    runtime, driver = folder / "libnull_gpu.so", folder / "libcuda.so.1"
    command = ["cc", "-O1", "-shared", "-fPIC", *(f"-I{path}" for path in headers)]
    sources = [str(SOURCES / name) for name in RUNTIME]
    subprocess.run([*command, *sources, "-o", runtime, "-ldl", "-lpthread"], check=True)
    subprocess.run([*command, SOURCES / "driver.c", "-o", driver, "-ldl"], check=True)
    (folder / "libcuda.so").symlink_to(driver.name)
    return {
        "LD_PRELOAD": str(runtime),
        "LD_LIBRARY_PATH": str(folder),
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # cuDNN plans on the card itself
        "OMP_NUM_THREADS": "1",
    }


def count(given: dict) -> dict:
    """Count the steps of a case, in a process on the null GPU."""
    import null_gpu_steps

    ready()
    return null_gpu_steps.count_steps(Case(**given))


def count_attention(batch: int, documents: int) -> dict:
    """Count attention over packed documents, in a process on the null GPU."""
    import null_gpu_attention

    ready()
    return null_gpu_attention.count_attention(batch, documents)


def count_run(folder: str, steps: int) -> dict:
    """Count a whole run up to a step, in a process on the null GPU."""
    import null_gpu_runs

    ready()
    return null_gpu_runs.count_run(folder, steps)


def jobs(folder: Path) -> dict[str, tuple]:
    """Return what is counted by name: a function and its arguments."""
    attention = {
        f"attention, {batch} rows, {documents or 'no'} documents": (
            count_attention,
            batch,
            documents,
        )
        for batch in BATCHES
        for documents in DOCUMENTS
    }
    runs = {
        BEGUN: (count_run, str(folder), FIRST_STEPS),
        RESUMED: (count_run, str(folder), ALL_STEPS),
    }
    return attention | runs | {str(case): (count, asdict(case)) for case in all_cases()}


def run_on_null_gpu(function: Callable, *arguments: object) -> dict:
    """Call a function in a process on the null GPU, with an empty log."""
    with tempfile.NamedTemporaryFile() as log:
        os.environ[LOG] = log.name
        return run_child(function, *arguments)[0]


def main() -> None:
    """Count what steps and runs ask of a GPU, and write the results and their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "null_gpu.json")
    parser.add_argument("--only", default="", help="what has this in its name; keep other rows")
    options = parser.parse_args()
    require_cuda_build()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        todo = jobs(folder)
        chosen = {name: job for name, job in todo.items() if options.only in name}
        if RESUMED in chosen:
            chosen = {BEGUN: todo[BEGUN]} | chosen
        if any(job[0] is count_run for job in chosen.values()):
            prepare_text(folder)
        rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else {}
        report = describe_run()
        os.environ |= build_libraries(folder)
        for name in with_eta([*chosen]):
            function, *arguments = chosen[name]
            counted = run_on_null_gpu(function, *arguments)
            rows[name] = counted | {"commit": report["run"]["commit"]}
            print(format_row(name, rows[name]), flush=True)
            report["rows"] = {name: rows[name] for name in todo if name in rows}
            options.out.write_text(json.dumps(report, indent=1) + "\n")


def format_row(name: str, row: dict) -> str:
    """Return a line of the console."""
    if "moved" not in row:
        return f"{name:<60} {json.dumps(row)}"
    waits, refused = sum(row["waits"].values()), sum(row["refused"].values())
    return (
        f"{name:<60} {row['kernels']:>6,} kernels, {waits} waits, {refused} refused, "
        f"{row['recompiled']} recompiled, {row['peak'] / 1e9:.2f} GB "
        f"(plan {row['planned'] / row['peak'] - 1:+.1%}), {row['moved'] / 1e9:,.0f} GB moved"
    )


if __name__ == "__main__":
    begin(main)
