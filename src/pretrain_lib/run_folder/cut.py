"""Cut the files of rows in a run folder back to the step from which the run goes on."""

import warnings
from pathlib import Path

from pretrain_lib.files.writes import write_atomically
from pretrain_lib.run_folder.rows import parse_row

OF_STEPS = ("train", "event")  # the kinds of rows that no evaluation writes


def drop_rows_after(path: Path, step: int, *, evaluated: bool = True) -> None:
    """Drop the rows after `step`, from which a run resumes, from its metrics or samples.

    With `evaluated=False`, the step is still to be evaluated: rows of that go, too.
    Lines that `read_rows` would refuse are dropped too, each with a warning that names it; an
    incomplete last line, left by a killed run, without one.
    """
    if not path.exists():
        return
    kept_lines = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_row(line, path.name)
        except ValueError:
            warnings.warn(f"{path}, line {number} is damaged and is dropped", stacklevel=2)
            continue
        of_step = evaluated or row.get("kind") in OF_STEPS
        if row["step"] < step or (row["step"] == step and of_step):
            kept_lines.append(line + b"\n")
    write_atomically(path, b"".join(kept_lines))
