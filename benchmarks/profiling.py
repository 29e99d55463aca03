"""Where the time of a training step goes on a GPU: kernels, gaps, waits of the host."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from contenders import Trial, device, import_contender
from torch.profiler import ProfilerActivity

TOP_KERNELS = 25
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profile_trial(trial: Trial, folder: Path, name: str) -> dict:
    """Profile some steps of ours; write a Chrome trace and return a summary.

    Seconds are those of a step: `busy` of kernels, `gpu_idle` from the first kernel's start to the
    last one's end without any.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    import_contender(trial)
    torch.manual_seed(0)
    step = sys.modules["ours"].build(trial)
    rows = trial.batch, trial.length + 1
    ids = torch.randint(trial.config.vocabulary_size, rows).to(device())
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for _ in range(trial.warmup):
        step(*batch)
    activities = [ProfilerActivity.CPU]
    if device().type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(trial.steps):
            step(*batch)
    trace = folder / f"{name}.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    with gzip.open(f"{trace}.gz", "wt") as compressed:
        compressed.write(trace.read_text())
    trace.unlink()
    return summarize(events, trial.steps)


def summarize(events: list[dict], steps: int) -> dict:
    """Return the figures of a trace, for one of its steps."""
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    waits = Counter(e["name"] for e in events if e.get("name") in WAITS)
    by_name: Counter = Counter()
    for kernel in kernels:
        by_name[kernel["name"][:110]] += kernel["dur"]
    return {
        "kernels": len(kernels) / steps,
        "busy": sum(e["dur"] for e in kernels) / 1e6 / steps,
        "gpu_idle": _idle(kernels) / 1e6 / steps,
        "waits": {name: count / steps for name, count in waits.items()},
        "top": {
            name: round(time / 1e3 / steps, 3) for name, time in by_name.most_common(TOP_KERNELS)
        },
    }


def _idle(kernels: list[dict]) -> float:
    """Return the microseconds in which no kernel runs, between the first and the last."""
    idle = 0.0
    ordered = sorted(kernels, key=lambda e: e["ts"])
    end = ordered[0]["ts"] if ordered else 0.0
    for kernel in ordered:
        idle += max(0.0, kernel["ts"] - end)
        end = max(end, kernel["ts"] + kernel["dur"])
    return idle
