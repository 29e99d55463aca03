"""Cut the files of rows in a run folder back to the step from which the run goes on."""

import warnings
from pathlib import Path

from pretrain_lib.files.reading import parse_json
from pretrain_lib.files.writes import write_atomically


def drop_rows_after(path: Path, step: int) -> None:
    """Drop the rows after `step`, from which a run resumes, from a file of JSON rows.

    Lines that are no rows are dropped too, each with a warning that names it; an incomplete last
    line, left by a killed run, without one.
    """
    if not path.exists():
        return
    kept = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        row_step = _step_of(line)
        if row_step is None:
            warnings.warn(f"{path}, line {number} is damaged and is dropped", stacklevel=2)
        elif row_step <= step:
            kept.append(line + b"\n")
    write_atomically(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """Return the step of a row, None if the line is no row."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None
