"""Cut the files of rows in a run folder back to the step from which the run goes on."""

import warnings
from pathlib import Path

from pretrain_lib.files.reading import parse_json
from pretrain_lib.files.writes import write_atomically

OF_STEPS = ("train", "event")  # the kinds of rows that no evaluation writes


def drop_rows_after(path: Path, step: int, *, evaluated: bool = True) -> None:
    """Drop the rows after `step`, from which a run resumes, from a file of JSON rows.

    With `evaluated=False`, the step is still to be evaluated: rows of that go, too.
    Lines that are no rows are dropped too, each with a warning that names it; an incomplete last
    line, left by a killed run, without one.
    """
    if not path.exists():
        return
    kept = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        row_step, kind = _step_and_kind(line)
        if row_step is None:
            warnings.warn(f"{path}, line {number} is damaged and is dropped", stacklevel=2)
        elif row_step < step or (row_step == step and (evaluated or kind in OF_STEPS)):
            kept.append(line + b"\n")
    write_atomically(path, b"".join(kept))


def _step_and_kind(line: bytes) -> tuple[int | None, str | None]:
    """Return the step and the kind of a row; the step is None if the line is no row."""
    try:
        row = parse_json(line)
    except ValueError:
        row = None
    row = row if isinstance(row, dict) else {}
    step = row.get("step")
    return step if isinstance(step, int) else None, row.get("kind")
