"""Write lm-eval results to disk and format them as a table."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from pretrain_lib.evaluate.references import Source, find_figure, models_near
from pretrain_lib.files.writes import make_folder, write_atomically


def write_results(results: dict, path: Path) -> None:
    """Write results as lm-eval's CLI does: one JSON file, and `samples_TASK.jsonl` files beside it.

    Samples are written only if the results have them, with log-likelihoods as strings.
    """
    from lm_eval.utils import handle_non_serializable, hash_string

    samples = results.get("samples", {})
    stored = {key: value for key, value in results.items() if key != "samples"}
    stored["task_hashes"] = {
        task: hash_string(
            "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in rows)
        )
        for task, rows in samples.items()
    }
    text = json.dumps(stored, indent=2, default=handle_non_serializable, ensure_ascii=False)
    make_folder(path.parent)
    write_atomically(path, text.encode())
    for task, rows in samples.items():
        lines = [
            json.dumps(_plain_sample(row), default=handle_non_serializable, ensure_ascii=False)
            for row in rows
        ]
        write_atomically(
            path.with_name(f"samples_{task}.jsonl"), ("\n".join(lines) + "\n").encode()
        )


def format_table(results: dict) -> str:
    """Format the scores as an aligned table: task, metric, value, stderr (empty if unknown).

    Further columns have published scores of models of similar size, if any. Each has a letter that
    refers to its source, and how its setup differs, below the table.
    """
    scores = list(iterate_scores(results))
    rows = [("task", "metric", "value", "stderr")]
    for task, metric, value, error in scores:
        rows.append((task, metric, _number(value), _number(error)))
    columns, sources = _published(results, [(task, metric) for task, metric, *_ in scores])
    rows = [(*row, *(c[number] for c in columns)) for number, row in enumerate(rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{'<>'[place > 1]}{widths[place]}}" for place, cell in enumerate(row))
        for row in rows
    ]
    notes = [f"{letter}  {s.title}; {s.note}; {s.url}" for s, letter in sources.items()]
    return "\n".join([*lines, *(["published, zero-shot:", *notes] if notes else ())])


def format_line(results: dict) -> str:
    """Format the scores in one line, each with its standard error if known."""
    parts = []
    for task, metric, value, error in iterate_scores(results):
        spread = f" +- {_number(error)}" if isinstance(error, float) else ""
        parts.append(f"{task}/{metric} {_number(value)}{spread}")
    return ", ".join(parts)


def iterate_scores(results: dict) -> Iterator[tuple[str, str, float, float | str | None]]:
    """Yield `(task, metric, value, stderr)` of lm-eval's results; `metric` includes a filter.

    The stderr of an infinite perplexity, which is no number, is None.
    """
    for task, scores in (results["results"] | results.get("groups", {})).items():
        for key, value in scores.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            label = metric if kind == "none" else f"{metric} ({kind})"
            error = scores.get(f"{metric}_stderr,{kind}")
            is_known = not isinstance(error, float) or math.isfinite(error)
            yield task, label, value, error if is_known else None


def find_score(results: dict, name: str) -> tuple[float, bool]:
    """Return the value of a score TASK/METRIC, and whether more of it is better.

    Raises ValueError for a name that the results do not have.
    """
    scores = {
        f"{task}/{metric}": (task, metric, v) for task, metric, v, _ in iterate_scores(results)
    }
    if name not in scores:
        raise ValueError(f"checkpoint.keep_best={name} is no score, there are {', '.join(scores)}")
    task, metric, value = scores[name]
    metric = metric.partition(" (")[0]  # a filter
    return value, results["higher_is_better"].get(task, {}).get(metric) is not False


def _published(
    results: dict, scores: list[tuple[str, str]]
) -> tuple[list[list[str]], dict[Source, str]]:
    """Return a column of published scores per model, headed by its name, and the sources."""
    shots, columns, letters = results.get("n-shot", {}), [], {}
    for model in models_near(results.get("config", {}).get("model_num_parameters", 0)):
        figures = [find_figure(model, *score, shots=shots.get(score[0], 0)) for score in scores]
        if any(figures):
            cells = []
            for figure in figures:
                letter = figure and letters.setdefault(figure.source, chr(ord("a") + len(letters)))
                cells.append(f"{figure.value:.4f} {letter}" if figure else "")
            columns.append([f"{model}  ", *cells])
    return columns, letters


def _plain_sample(row: dict) -> dict:
    """Convert a sample to the types that lm-eval's CLI writes, so that `datasets` can load it."""
    from lm_eval.utils import sanitize_list

    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(argument)}
        for i, argument in enumerate(row["arguments"])
    }
    return row | {
        "arguments": arguments,
        "resps": sanitize_list(row["resps"]),
        "filtered_resps": sanitize_list(row["filtered_resps"]),
        "target": str(row["target"]),
    }


def _number(value: float | str | None) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"  # such as an early perplexity
