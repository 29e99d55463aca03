"""Read the rows of a run's `metrics.jsonl`, and their columns as arrays."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pretrain_lib.files.reading import parse_json
from pretrain_lib.run_folder.layout import METRICS, SAMPLES

Rows = list[dict]
COMMON = {"kind": str, "step": int, "tokens": int}  # the fields of every row, with their types
FIELDS = {METRICS: COMMON, SAMPLES: {"step": int, "prompt": str, "text": str}}
TIMED = ("tokens_per_second", "seconds", "mfu", "peak_memory_bytes")
NUMBERS = dict.fromkeys(
    ("loss", "lr", "grad_norm", "targets", "bits_per_byte", *TIMED), float | int | None
)


class NothingTrained(ValueError):
    """A run that has not written a train row yet."""


def read_metrics(run: Path) -> Rows:
    """Return every row of a run's `metrics.jsonl`, in order.

    Raises ValueError for a missing file, a line that is not JSON, or a file without a train row.
    """
    path = run / METRICS
    if not path.is_file():
        raise ValueError(f"{run} is not a run folder: it has no {METRICS}")
    rows = read_rows(path)
    if not any(row["kind"] == "train" for row in rows):
        raise NothingTrained(f"{path} has no train row yet: run at least one step, then plot")
    return rows


def last_row(rows: Rows, kind: str) -> dict:
    """Return the last row of a kind, empty if there is none."""
    return next((row for row in reversed(rows) if row["kind"] == kind), {})


def read_rows(path: Path) -> Rows:
    """Return the rows of `metrics.jsonl` or `samples.jsonl`, without an incomplete last line.

    Raises ValueError for a line that is not a row.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    return [_read_row(line, path, number) for number, line in enumerate(lines, start=1)]


def read_samples(run: Path) -> list[dict]:
    """Return the rows of a run's `samples.jsonl`: step, prompt, text; none without the file."""
    path = run / SAMPLES
    return read_rows(path) if path.is_file() else []


def _read_row(line: bytes, path: Path, number: int) -> dict:
    try:
        return parse_row(line, path.name)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} {error}") from error


def parse_row(line: bytes, name: str) -> dict:
    """Return the row in a line of the file `name`; raises ValueError, saying why, without one."""
    excerpt, fields = ascii(line[:60].decode(errors="replace")), FIELDS[name]
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {excerpt}") from error
    if isinstance(row, dict) and row.get("kind") == "event":
        fields = fields | {"event": str}
    if not isinstance(row, dict) or not row.keys() >= fields.keys():
        raise ValueError(f"is not a row with {', '.join(fields)}: {excerpt}")
    kinds = fields | NUMBERS
    for field, value in row.items():
        if not isinstance(value, kinds.get(field, object)):
            raise ValueError(f"is not a row, for its {field} is {value!r}")
    return row


def column(rows: Rows, kind: str, name: str, *, x: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
    """Return `(x, values)` of the rows of one kind, float64; a missing value is NaN.

    `x` is the field that has the place of a row on the x axis.
    """
    chosen = [row for row in rows if row["kind"] == kind]
    places = np.array([row[x] for row in chosen], dtype=np.float64)
    values = [row.get(name) for row in chosen]
    if wrong := [v for v in values if not isinstance(v, int | float | None)]:
        raise ValueError(f"{name} is {wrong[0]!r} in a row of kind {kind}, not a number")
    return places, np.array(values, dtype=np.float64)


def begun_at(manifest: dict) -> tuple[float, float]:
    """Return the tokens and the seconds that a run began with, of its parent; NaN if unknown."""
    first = (manifest.get("starts") or [{"step": 0}])[0]
    unknown = np.nan if first["step"] else 0.0
    return first.get("tokens", unknown), first.get("seconds", unknown)


def own_part(rows: Rows, manifest: dict) -> tuple[int, float]:
    """Return the tokens and the seconds of a run's own steps, without those of a fork's parent.

    Where it is unknown what the run began with, its first row is left out.
    """
    trained = [(row["tokens"], row.get("seconds") or 0.0) for row in rows if row["kind"] == "train"]
    if not trained:
        return 0, 0.0
    begun = np.array(begun_at(manifest))
    tokens, seconds = trained[-1] - np.where(np.isnan(begun), trained[0], begun)
    return int(tokens), float(seconds)


def mean_mfu(rows: Rows, manifest: dict) -> float | None:
    """Return the MFU over all steps of a run, each weighed by its time; None if it is unknown.

    The time of a row is its tokens over their speed; steps that a rollback has undone are not in
    it.
    """
    if not (trained := [row for row in rows if row["kind"] == "train"]):
        return None
    counts = np.diff([begun_at(manifest)[0], *(row["tokens"] for row in trained)])
    seconds = counts / np.array([row.get("tokens_per_second") or np.nan for row in trained])
    shares = np.array([row.get("mfu") for row in trained], dtype=np.float64)
    finite = np.isfinite(shares * seconds)
    total = seconds[finite].sum()
    return float((shares * seconds)[finite].sum() / total) if total else None


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centered moving average over `window` values, ignoring NaN.

    At the ends it averages the values that there are.
    """
    finite, ones = np.isfinite(values), np.ones(window)
    sums = np.convolve(np.where(finite, values, 0.0), ones)
    counts = np.convolve(finite.astype(np.float64), ones)
    middle = slice((window - 1) // 2, (window - 1) // 2 + len(values))
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)[middle]


def scored_tasks(runs: Iterable[Rows]) -> dict[str, list[str]]:
    """Return the metrics of each task in the runs' evaluation rows, in order of appearance."""
    tasks: dict[str, list[str]] = {}
    for row in (row for rows in runs for row in rows if row["kind"] == "evaluation"):
        for name in (name for name in row if name not in COMMON):
            task, slash, metric = name.rpartition("/")
            if slash and not metric.endswith("_stderr") and metric not in tasks.get(task, ()):
                tasks.setdefault(task, []).append(metric)
    return tasks
