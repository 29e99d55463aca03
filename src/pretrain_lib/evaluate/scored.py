"""Read the scores of a run or of a file of lm-eval results, for reports and model cards."""

from dataclasses import dataclass
from pathlib import Path

from pretrain_lib.evaluate.results import iterate_scores
from pretrain_lib.files.reading import interpreting, parse_json
from pretrain_lib.run_folder.folder import SCORES
from pretrain_lib.run_folder.rows import COMMON, Rows


@dataclass(frozen=True)
class Score:
    """A score of lm-eval."""

    task: str
    metric: str
    value: float
    error: float | None
    """The standard error; None if unknown."""
    shots: int | None
    items: int | None
    """How many items were scored; None if unknown."""


def read_results(path: Path) -> dict:
    """Return the content of a file of lm-eval results; raises ValueError for another file."""
    try:
        results = parse_json(path.read_bytes())
    except ValueError:
        results = {}
    remedy = "give a file written by `pretrain eval --out`"
    if not isinstance(results, dict) or not {"results", "config"} <= results.keys():
        raise ValueError(f"scores={path} holds no lm-eval results: {remedy}")
    with interpreting(path, remedy=remedy):
        for score in scores_of_results(results):
            if not isinstance(score.value, int | float | str) or not isinstance(score.task, str):
                raise TypeError(f"{score.task} has the score {score.value!r}")
        results["config"].keys()
    return results


def scores_of_results(results: dict) -> tuple[Score, ...]:
    """Return the scores in lm-eval's results."""
    shots, counts = results.get("n-shot", {}), results.get("n-samples", {})
    return tuple(
        Score(
            task=task,
            metric=metric,
            value=value,
            error=error if isinstance(error, float) else None,  # it is "N/A" for a single item
            shots=shots.get(task),
            items=counts.get(task, {}).get("effective"),
        )
        for task, metric, value, error in iterate_scores(results)
    )


def last_scores(run: Path, rows: Rows) -> tuple[tuple[Score, ...], int]:
    """Return the scores of the last evaluation in a run's rows, and its step; (), 0 if none.

    Shots and items come from lm-eval's results in the run folder, if they are there.
    """
    row = next((row for row in reversed(rows) if row["kind"] == "evaluation"), None)
    if row is None:
        return (), 0
    path = run / SCORES / f"step-{row['step']:08d}.json"
    if path.is_file():
        return scores_of_results(read_results(path)), row["step"]
    names = [name for name in row if name not in COMMON and not name.endswith("_stderr")]
    scores = [
        Score(*name.rsplit("/", 1), row[name], row.get(f"{name}_stderr"), None, None)
        for name in names
        if "/" in name and row[name] is not None
    ]
    return tuple(scores), row["step"]
