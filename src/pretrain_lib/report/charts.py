"""The data of the interactive charts of a report, drawn by `page.js` with plotly."""

from collections.abc import Sequence

import numpy as np

from pretrain_lib.report.baselines import loss_baselines
from pretrain_lib.report.curves import SMOOTHED_SHARE, robust_limits, without_spikes
from pretrain_lib.report.pictures import COLUMNS_OF, HEADROOM, LOSS_TITLE, TITLES, choose_panels
from pretrain_lib.report.runs import AXES, AXIS_TITLES, Run, flops_per_token, positions
from pretrain_lib.report.score_tables import ACCURACIES, Scored, published
from pretrain_lib.run_folder.rows import column, smooth

MOST_POINTS = 2000  # of a curve; of more, the lowest and highest of each stretch are kept
SECOND_COLOR = 3  # of validation and scores, if there is a single run
Places = dict[str, np.ndarray]  # for each axis, the place of each row of a run


def chart_data(runs: Sequence[Run], scores: Sequence[Scored]) -> dict:
    """Return all charts, and the axes that every run has, as plain values for JSON."""
    rates = [flops_per_token(run.settings) for run in runs]
    axes = [axis for axis in AXES if axis != "flops" or None not in rates]
    places = [
        {axis: positions(run.rows, axis, flops_per_token=rate) for axis in axes}
        for run, rate in zip(runs, rates, strict=True)
    ]
    charts = [_loss_chart(runs, places)]
    charts += [_training_chart(runs, places, name) for name in TITLES]
    charts += _score_charts(runs, places)
    scored = [each for each in scores if each.scores]
    summary = _summary_chart(scored) if scored else None
    return {
        "axes": {axis: AXIS_TITLES[axis] for axis in axes},
        "charts": [chart for chart in charts if chart["traces"]],
        "scores": summary,
    }


def _loss_chart(runs: Sequence[Run], places: list[Places]) -> dict:
    traces, curves = [], []
    for number, (run, place) in enumerate(zip(runs, places, strict=True)):
        traces += _noisy(run, place, "loss", number, legend=_named(runs, run, "train"))
        name, color = _named(runs, run, "validation"), SECOND_COLOR if len(runs) == 1 else number
        traces += _measured(run, place, "validation", "loss", color, legend=name)
        traces += _events(run, place, number, many=len(runs) > 1)
        curves += [column(run.rows, kind, "loss") for kind in ("train", "validation")]
    figures = loss_baselines([run.settings for run in runs])
    low, high = robust_limits(curves, [figure.value for figure in figures])
    lines = [(f.model, f.value) for f in figures if low < f.value < high]
    return _chart(LOSS_TITLE, traces, limits=(low, high), lines=lines, wide=True)


def _training_chart(runs: Sequence[Run], places: list[Places], name: str) -> dict:
    field, traces = COLUMNS_OF.get(name, name), []
    for number, (run, place) in enumerate(zip(runs, places, strict=True)):
        if name == "lr":
            traces += _measured(run, place, "train", field, number, look="line")
        else:
            traces += _noisy(run, place, field, number, spikes=name == "grad_norm")
    high = robust_limits([column(run.rows, "train", field) for run in runs])[1]
    return _chart(TITLES[name], traces, limits=(0.0, HEADROOM * high))


def _score_charts(runs: Sequence[Run], places: list[Places]) -> list[dict]:
    charts = []
    for panel in choose_panels([run.rows for run in runs], [run.settings for run in runs]):
        traces, name = [], f"{panel.task}/{panel.metric}"
        for number, (run, place) in enumerate(zip(runs, places, strict=True)):
            color = SECOND_COLOR if len(runs) == 1 else number
            traces += _measured(run, place, "evaluation", name, color)
        lines = [(figure.model, figure.value) for figure in panel.published]
        log = "perplexity" in panel.metric
        charts.append(_chart(panel.title, traces, lines=lines, log=log) | {"rises": not log})
    return charts


def _named(runs: Sequence[Run], run: Run, what: str) -> str:
    return what if len(runs) == 1 else f"{run.name}, {what}"


def _chart(
    title: str,
    traces: list[dict],
    *,
    limits: tuple[float, float] | None = None,
    lines: Sequence[tuple[str, float]] = (),
    wide: bool = False,
    log: bool = False,
) -> dict:
    shown = [{"label": f"{model}: {value:.4g}", "value": value} for model, value in lines]
    return {
        **{"title": title, "traces": traces, "lines": shown, "wide": wide, "log": log},
        "limits": limits and [_rounded(limit) for limit in limits],
    }


def _trace(
    place: Places, indices: np.ndarray, values: np.ndarray, *, look: str, color: int, **more: object
) -> dict:
    """Return a trace of `values`, those of the rows `indices`; not finite ones become null."""
    x = {axis: [_rounded(v) for v in places[indices]] for axis, places in place.items()}
    y = [_rounded(value) for value in values]
    return {"look": look, "color": color, "x": x, "y": y} | more


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _rows_of(run: Run, kind: str) -> np.ndarray:
    return np.array([i for i, row in enumerate(run.rows) if row["kind"] == kind], dtype=np.int64)


def _noisy(
    run: Run, place: Places, name: str, color: int, *, spikes: bool = True, legend: str = ""
) -> list[dict]:
    """Return the values as a pale line, and their moving average as a thick one."""
    tokens, values = column(run.rows, "train", name)
    if not np.isfinite(values).any():
        return []
    window = max(1, round(len(values) * SMOOTHED_SHARE))
    usual = without_spikes(tokens, values, window) if spikes else values
    average, rows = smooth(usual, window), _rows_of(run, "train")
    pale, thick = thin(values, MOST_POINTS), thin(average, MOST_POINTS)
    traces = []
    if window > 1:
        traces.append(_trace(place, rows[pale], values[pale], look="pale", color=color))
    line = _trace(
        place, rows[thick], average[thick], look="line", color=color, name=run.name, legend=legend
    )
    return [*traces, line]


def _measured(
    run: Run,
    place: Places,
    kind: str,
    name: str,
    color: int,
    *,
    look: str = "measured",
    legend: str = "",
) -> list[dict]:
    _, values = column(run.rows, kind, name)
    if not np.isfinite(values).any():
        return []
    points = thin(values, MOST_POINTS)
    errors = column(run.rows, kind, f"{name}_stderr")[1][points]
    options = {"name": run.name, "legend": legend}
    if np.isfinite(errors).any():
        options["errors"] = [_rounded(error) for error in errors]
    rows = _rows_of(run, kind)[points]
    return [_trace(place, rows, values[points], look=look, color=color, **options)]


def _events(run: Run, place: Places, color: int, *, many: bool) -> list[dict]:
    rows = _rows_of(run, "event")
    if not len(rows):
        return []
    event_rows = [run.rows[i] for i in rows]
    texts = [
        f"step {row['step']:,}: {row.get('message') or row['event'].replace('_', ' ')}"
        for row in event_rows
    ]
    heights = np.full(len(rows), 0.04 * color)  # of the height of the chart
    legend = f"{run.name}, events" if many else "events"
    events = _trace(
        place, rows, heights, look="event", color=color, name=run.name, legend=legend, texts=texts
    )
    return [events]


def thin(values: np.ndarray, most: int) -> np.ndarray:
    """Return the indices of at most about `most` values: of each stretch its lowest and highest."""
    if len(values) <= most:
        return np.arange(len(values))
    indices = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), most // 2):
        finite = part[np.isfinite(values[part])]
        if len(finite):
            indices |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
    return np.array(sorted(indices))


def _summary_chart(runs: Sequence[Scored]) -> dict | None:
    """Return the accuracies of the runs and of published models, a row for each metric."""
    keys = list(dict.fromkeys(key for each in runs for key in each.scores))
    keys = [key for key in keys if key[1].startswith(ACCURACIES)]
    if not keys:
        return None
    series = []
    for number, each in enumerate(runs):
        scores = [each.scores.get(key) for key in keys]
        values = [None if score is None else _rounded(score.value) for score in scores]
        errors = [None if score is None or score.error is None else score.error for score in scores]
        series.append({"name": each.run.name, "color": number, "y": values, "errors": errors})
    models = dict.fromkeys(model for each in runs for model in each.models)
    for model in models:
        figures = [published(model, runs, key) for key in keys]
        values = [None if figure is None else figure.value for figure in figures]
        if any(figures):
            series.append({"name": model, "color": None, "y": values, "errors": None})
    return {"rows": [f"{task} {metric}" for task, metric in keys], "series": series}
