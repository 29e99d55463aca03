"""Write the report of runs: an HTML page, and beside it Markdown with a picture of the curves."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from pretrain_lib.files.writes import write_atomically
from pretrain_lib.report.charts import chart_data
from pretrain_lib.report.content import compose, has_curves
from pretrain_lib.report.markdown_page import to_markdown
from pretrain_lib.report.page import to_html
from pretrain_lib.report.pictures import plot_runs
from pretrain_lib.report.runs import open_runs
from pretrain_lib.report.score_tables import scored
from pretrain_lib.run_folder.folder import METRICS
from pretrain_lib.run_folder.rows import Rows, read_rows


def write_report(
    runs: Sequence[Path], out: Path | None = None, *, watts: float | None = None
) -> list[Path]:
    """Write the report of one or several runs; return the paths of its files.

    `out` is the HTML page, by default `report.html` in the folder of a single run. Beside it are
    the same as Markdown and, once a step is logged, a PNG of the curves. With `watts` per device it
    has the energy in kWh. Raises ValueError for a folder that is not a run, several runs without
    `out`, or an `out` that does not end in .html.
    """
    opened = open_runs(runs, read=_read_any)
    out = check_page(runs, out)
    report = compose(opened, watts=watts)
    html = to_html(report, chart_data(opened, [scored(run) for run in opened]))
    drawn = [run.folder for run in opened if has_curves(run)]
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = out.with_name(f"{out.stem}-curves.png")
    paths = [out, out.with_suffix(".md")]
    if drawn:
        paths += plot_runs(drawn, picture)
    text = to_markdown(report, picture=quote(picture.name) if drawn else None)
    for path, content in zip(paths, (html, text), strict=False):
        write_atomically(path, content.encode())
    return paths


def check_page(runs: Sequence[Path], out: Path | None) -> Path:
    """Return the path of the page; raises ValueError if it is missing or does not end in .html."""
    if out is None and len(runs) > 1:
        raise ValueError(
            f"a report of {len(runs)} runs belongs to none of their folders: give --out FILE.html"
        )
    if out is not None and out.suffix != ".html":
        raise ValueError(f"out={out} must end in .html; its copy as Markdown ends in .md")
    return runs[0] / "report.html" if out is None else out


def _read_any(run: Path) -> Rows:
    """Return the rows of a run, which may be none; raises ValueError if it is not a run folder."""
    path = run / METRICS
    if not path.is_file():
        raise ValueError(f"{run} is not a run folder: it has no {METRICS}")
    return read_rows(path)
