"""The scores of runs beside those of published models."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pretrain_lib.evaluate.references import Figure, find_figure, models_near
from pretrain_lib.evaluate.scored import Score, last_scores, read_results, scores_of_results
from pretrain_lib.models.any_model import build_model, read_shape
from pretrain_lib.models.flops import count_parameters
from pretrain_lib.report.blocks import Note, Table
from pretrain_lib.report.runs import Run

OF_COMMAND = "scores.json"  # where `make quickstart` has `pretrain eval` write
ACCURACIES = ("acc", "exact_match", "f1")  # metrics from 0 to 1


@dataclass(frozen=True)
class Scored:
    """The scores of a run."""

    run: Run
    scores: dict[tuple[str, str], Score]
    """By task and metric."""
    sources: tuple[str, ...]
    """By what they were measured, a sentence each."""

    @property
    def parameters(self) -> int | None:
        """The number of parameters of the model; None if unknown."""
        if not self.run.settings:
            return None
        with torch.device("meta"):
            return count_parameters(build_model(read_shape(self.run.settings["model"])))

    @property
    def models(self) -> list[str]:
        """The published models of similar size."""
        return [] if self.parameters is None else models_near(self.parameters)


def scored(run: Run) -> Scored:
    """Return the scores of a run's last evaluation, and those of a `scores.json` in its folder."""
    last, step = last_scores(run.folder, run.rows)
    sources = []
    if last:
        sources.append(f"{run.name}: lm-evaluation-harness during training, at step {step:,}.")
    scores = {(score.task, score.metric): score for score in last}
    path = run.folder / OF_COMMAND
    if path.is_file():
        results = read_results(path)
        of_files = {(s.task, s.metric): s for s in scores_of_results(results)}
        model = (results["config"].get("model_args") or {}).get("pretrained", "")
        of = f" of {model}" if model else ""
        by = f"lm-evaluation-harness {results.get('lm_eval_version', '')}".strip()
        if of_files.keys() - scores.keys():
            sources.append(f"{run.name}: {by}, from {OF_COMMAND}{of}.")
        scores = of_files | scores
    return Scored(run, scores, tuple(sources))


def score_table(runs: Sequence[Scored]) -> tuple[Table, tuple[Note, ...]]:
    """Return a row for each task and metric of the runs, and the notes below the table.

    Published scores have the letter of their source; only those with the same number of shots are
    shown.
    """
    keys = list(dict.fromkeys(key for each in runs for key in each.scores))
    models = list(dict.fromkeys(name for each in runs for name in each.models))
    letters: dict = {}
    columns = {}
    for model in models:
        figures = [published(model, runs, key) for key in keys]
        if any(figures):
            columns[model] = [_with_letter(figure, letters) for figure in figures]
    rows = []
    for number, key in enumerate(keys):
        score = next(each.scores[key] for each in runs if key in each.scores)
        items = "" if score.items is None else f"{score.items:,}"
        shots = "" if score.shots is None else str(score.shots)
        values = [format_score(each.scores.get(key)) for each in runs]
        rows.append((*key, items, shots, *values, *(column[number] for column in columns.values())))
    header = ("Task", "Metric", "Items", "Shots", *(each.run.name for each in runs), *columns)
    filled = [i for i in range(len(header)) if any(row[i] for row in rows)]  # items may be unknown
    header, *rows = (tuple(cells[i] for i in filled) for cells in (header, *rows))
    notes = [Note(f"{letter}: {s.title}; {s.note}.", s.url) for s, letter in letters.items()]
    table = Table(header, tuple(rows), numeric=tuple(range(2, len(header))))
    return table, tuple(notes)


def published(model: str, runs: Sequence[Scored], key: tuple[str, str]) -> Figure | None:
    """Return a model's published score with the shots of the runs (none if unknown), or None."""
    score = next(each.scores[key] for each in runs if key in each.scores)
    return find_figure(model, *key, shots=score.shots or 0)


def _with_letter(figure: Figure | None, letters: dict) -> str:
    if figure is None:
        return ""
    letter = letters.setdefault(figure.source, chr(ord("a") + len(letters)))
    return f"{_number(figure.value)} {letter}"


def format_score(score: Score | None) -> str:
    """Return a score with its standard error: 0.2950 ± 0.0046."""
    if score is None:
        return ""
    spread = "" if score.error is None else f" ± {_number(score.error)}"
    return f"{_number(score.value)}{spread}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
