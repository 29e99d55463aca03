"""What a report says of a run: its result, cost, environment and events."""

from collections import Counter

import numpy as np

from pretrain_lib.files.locks import LOCK, is_locked
from pretrain_lib.report.blocks import Table
from pretrain_lib.report.runs import Run, flops_per_token
from pretrain_lib.run_folder.folder import PRECISIONS, read_status
from pretrain_lib.run_folder.metrics import human, human_time, perplexity
from pretrain_lib.run_folder.rows import begun_at, last_row, mean_mfu, own_part
from pretrain_lib.wording import plural

SHOWN_EVENTS = 100
EVENT_NOUNS = {
    "skipped": "update left out",
    "rollback": "rollback",
    "not_saved": "checkpoint not written",
    "resumed": "resume",
}
EVENT_PLURALS = {
    "skipped": "updates left out",
    "rollback": "rollbacks",
    "not_saved": "checkpoints not written",
    "resumed": "resumes",
}


def state_of(run: Run) -> tuple[str, str]:
    """Return the state of a run in a word, and why, from its status and its lock."""
    status = read_status(run.folder)
    state, reason = status.get("state", "unknown"), status.get("reason", "")
    if state == "running" and (run.folder / LOCK).is_file() and not is_locked(run.folder):
        return "killed", "no process holds the run; started again, it resumes"
    return state, reason


def result_facts(run: Run) -> dict[str, str]:
    """Return how far a run came, and its losses."""
    train, validation = last_row(run.rows, "train"), last_row(run.rows, "validation")
    last = max(run.rows, key=lambda row: row["step"], default={"step": 0, "tokens": 0})
    state, reason = state_of(run)
    losses = [
        row for row in run.rows if row["kind"] == "validation" and row.get("loss") is not None
    ]
    best = min(losses, key=lambda row: row["loss"], default={})
    return {
        "State": f"{state}: {reason}" if reason else state,
        "Steps": f"{last['step']:,}",
        "Tokens": f"{last['tokens']:,}",
        "Training loss": format_loss(train),
        "Validation loss": format_loss(validation),
        "Lowest validation loss": "" if best is validation else format_loss(best),
    }


def format_loss(row: dict) -> str:
    """Return the loss of a row with its unit and step, empty if there is none."""
    loss = row.get("loss")
    if loss is None:
        return ""
    details = ", ".join(filter(None, [f"perplexity {perplexity(loss):,.4g}", bits(row)]))
    return f"{loss:.4f} nats per token at step {row['step']:,} ({details})"


def bits(row: dict) -> str:
    """Return the bits per byte of a validation row, empty if unknown."""
    value = row.get("bits_per_byte")
    return "" if value is None else f"{value:.4f} bits per byte"


def device_hours(run: Run) -> float | None:
    """Return the time spent in steps times the number of devices; None if that is unknown.

    A run that was resumed with another number of processes counts each stretch with its own, up to
    the step of a later start. The steps that a fork has from its parent are not its own.
    """
    world = run.manifest.get("world", {})
    if not world.get("processes"):
        return None
    trained = [row for row in run.rows if row["kind"] == "train" and row.get("seconds") is not None]
    if not trained:
        return 0.0
    starts = run.manifest.get("starts") or [{"step": 0, "processes": world["processes"]}]
    of_parent = begun_at(run.manifest)[1]
    if np.isnan(of_parent):  # the first row, of which a part is the parent's, is left out
        of_parent = trained[0]["seconds"]
    points = [(row["step"], row["seconds"]) for row in trained]
    steps, seconds = np.array([(starts[0]["step"], of_parent), *points]).T
    begins = [start["step"] for start in starts]
    ends = [min(begins[number:]) for number in range(1, len(begins))] + [steps[-1]]
    lengths = np.interp(ends, steps, seconds) - np.interp(begins, steps, seconds)
    devices = [start["processes"] for start in starts]
    return float(np.maximum(lengths, 0.0) @ devices) / 3600


def cost_facts(run: Run, *, watts: float | None) -> dict[str, str]:
    """Return time, device hours, energy (with `watts` per device) and FLOPs of the own steps."""
    (tokens, seconds), hours = own_part(run.rows, run.manifest), device_hours(run)
    rate = flops_per_token(run.settings)
    mfu = mean_mfu(run.rows, run.manifest)
    facts = {
        "Time in training steps": human_time(seconds),
        "Device hours": "" if hours is None else f"{hours:,.3g} h",
        "Energy": "",
        "Speed": f"{human(tokens / seconds)} tokens per second" if seconds else "",
        "Model FLOPs": f"{rate * tokens:.3g}".replace("e+", "e") if rate and tokens else "",
        "FLOPs utilization (MFU)": "" if mfu is None else f"{mfu:.1%}",
    }
    if watts is not None and hours is not None:
        facts["Energy"] = f"{hours * watts / 1000:,.3g} kWh at {watts:g} W per device"
    return facts


def environment_facts(run: Run) -> dict[str, str]:
    """Return devices, precision, versions and git revision of a run."""
    world, git = run.manifest.get("world"), run.manifest.get("git")
    if not world:
        return {}
    name = world.get("device_name") or world["device"].upper()
    file = (world.get("configuration") or {}).get("file")
    revision = f"{git['revision']}{', with uncommitted changes' * git['dirty']}" if git else ""
    versions = run.manifest.get("versions", {})
    return {
        "Devices": f"{world['processes']} × {name}",
        "Processes": f"{world['processes']:,}",
        "Distributed": "" if world["distributed"] == "NO" else world["distributed"],
        "Threads": f"{world['threads']:,} per process",
        "Precision": PRECISIONS.get(world["precision"], world["precision"]),
        "System": world["system"],
        "Launcher's file": file or "",
        "Git revision": revision,
        "Data fingerprint": run.manifest.get("data_fingerprint", ""),
        "Forked from": run.manifest.get("parent") or "",
        **versions,
    }


def events_of(run: Run) -> list[tuple[int, str, str]]:
    """Return the events of a run by step, as `(step, event, message)`."""
    events = [
        (row["step"], row["event"], row.get("message") or "")
        for row in run.rows
        if row["kind"] == "event"
    ]
    for start in run.manifest.get("starts", [])[1:]:
        message = f"at {start['time']}, {plural(start['processes'], 'device')}"
        events.append((start["step"], "resumed", message))
    return sorted(events, key=lambda event: event[0])


def event_blocks(run: Run) -> list[str | Table]:
    """Return how often each event happened, and a table of the latest."""
    events = events_of(run)
    if not events:
        return ["No update was left out, and the run was neither rolled back nor resumed."]
    counts = Counter(event for _, event, _ in events)
    phrases = [
        f"{number:,} {(EVENT_NOUNS if number == 1 else EVENT_PLURALS).get(event, event)}"
        for event, number in counts.items()
    ]
    text = f"{', '.join(phrases)}."
    if len(events) > SHOWN_EVENTS:
        text += f" The last {SHOWN_EVENTS} of {len(events):,} are shown."
    rows = [(f"{s:,}", e.replace("_", " "), m) for s, e, m in events[-SHOWN_EVENTS:]]
    return [text, Table(("Step", "Event", "What happened"), tuple(rows), numeric=(0,))]
