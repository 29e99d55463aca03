"""Compose the report of one run, or of several beside each other."""

from collections.abc import Sequence

from pretrain_lib.report.blocks import (
    Block,
    Charts,
    Report,
    Sample,
    Samples,
    Section,
    Table,
    side_by_side,
)
from pretrain_lib.report.changes import changed_settings, differences
from pretrain_lib.report.facts import (
    bits,
    cost_facts,
    device_hours,
    environment_facts,
    event_blocks,
    result_facts,
    state_of,
)
from pretrain_lib.report.runs import Run
from pretrain_lib.report.score_tables import score_table, scored
from pretrain_lib.run_folder.metrics import human, human_time, perplexity
from pretrain_lib.run_folder.rows import last_row, own_part, read_samples
from pretrain_lib.wording import plural

SHOWN_STEPS = 12  # at which samples are shown
SHOWN_OF_SEVERAL = 3  # of each of several runs


def compose(runs: Sequence[Run], *, watts: float | None = None) -> Report:
    """Return the report of runs, with the energy if `watts` of a device are given."""
    names = [run.name for run in runs]
    sections = [
        Section("Results", (side_by_side(names, runs, result_facts),)),
        Section("Curves", _curve_blocks(runs)),
        _score_section(runs),
        _sample_section(runs),
        *_setting_sections(runs),
        _event_section(runs),
        _table_section("Environment", side_by_side(names, runs, environment_facts)),
        _cost_section(runs, watts),
    ]
    title = names[0] if len(runs) == 1 else " · ".join(names)
    line = _describe(runs[0]) if len(runs) == 1 else f"{plural(len(runs), 'run')} side by side"
    facts = _key_figures(runs[0]) if len(runs) == 1 else ()
    return Report(title, line, facts, tuple(section for section in sections if section.blocks))


def has_curves(run: Run) -> bool:
    """Return whether there is a curve to draw."""
    return bool(last_row(run.rows, "train"))


def _describe(run: Run) -> str:
    state, _ = state_of(run)
    parameters = scored(run).parameters
    size = "" if parameters is None else f"{human(parameters)} parameters, "
    last = max((row["step"] for row in run.rows), default=0)
    return f"{size}{state} at step {last:,}"


def _key_figures(run: Run) -> tuple[tuple[str, str, str], ...]:
    train, validation = last_row(run.rows, "train"), last_row(run.rows, "validation")
    hours, figures = device_hours(run), []
    if validation.get("loss") is not None:
        figures.append(_loss_figure("Validation loss", validation))
    if train.get("loss") is not None:
        figures.append(_loss_figure("Training loss", train))
    if train:
        figures.append(("Tokens", human(train["tokens"]), plural(train["step"], "step")))
        _, seconds = own_part(run.rows, run.manifest)
        remark = "in training steps" if hours is None else f"{hours:,.3g} device hours"
        figures.append(("Time", human_time(seconds), remark))
    best = [(key, score) for key, score in scored(run).scores.items() if score.error]
    for (task, metric), score in best[:1]:
        figures.append((f"{task}", f"{score.value:.3f}", f"{metric}, ± {score.error:.3f}"))
    return tuple(figures)


def _loss_figure(label: str, row: dict) -> tuple[str, str, str]:
    remark = bits(row) or f"perplexity {perplexity(row['loss']):,.4g}"
    return label, f"{row['loss']:.3f}", f"nats per token; {remark}"


def _curve_blocks(runs: Sequence[Run]) -> tuple[Block, ...]:
    without = [run.name for run in runs if not has_curves(run)]
    blocks: list[Block] = []
    if without:
        blocks.append(f"No training step is logged yet: {', '.join(without)}.")
    if len(without) < len(runs):
        blocks.append(Charts("curves"))
    return tuple(blocks)


def _score_section(runs: Sequence[Run]) -> Section:
    all_scores = [scored(run) for run in runs]
    if not any(each.scores for each in all_scores):
        return Section("Scores", ("No scores have been measured.",))
    table, notes = score_table(all_scores)
    intro = ["Value ± standard error."]
    if notes:
        intro.append("Published scores of models of similar size have the letter of their source.")
    intro += [source for each in all_scores for source in each.sources]
    return Section("Scores", (" ".join(intro), Charts("scores"), table, *notes))


def _sample_section(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for run in runs:
        rows = read_samples(run.folder)
        steps = list(dict.fromkeys(row["step"] for row in rows))
        chosen = _spread(steps, SHOWN_STEPS if len(runs) == 1 else SHOWN_OF_SEVERAL)
        if len(chosen) < len(steps):
            text = f"Samples at {len(chosen)} of {len(steps)} steps; samples.jsonl has all."
            blocks.append(text if len(runs) == 1 else f"{run.name}: {text}")
        for step in chosen:
            texts = [Sample(r["prompt"], r["text"]) for r in rows if r["step"] == step]
            title = f"Step {step:,}" if len(runs) == 1 else f"{run.name}, step {step:,}"
            blocks.append(Samples(title, tuple(texts), is_open=step == steps[-1]))
    return Section("Samples", tuple(blocks or ["No samples have been written."]))


def _spread(steps: list[int], number: int) -> list[int]:
    """Return at most `number` of the steps, evenly spaced, the first and the last among them."""
    if len(steps) <= number:
        return steps
    places = [round(i * (len(steps) - 1) / (number - 1)) for i in range(number)]
    return [steps[place] for place in places]


def _setting_sections(runs: Sequence[Run]) -> list[Section]:
    sections = []
    if len(runs) > 1:
        table = differences(runs)
        same = "The runs have the same settings, software and devices."
        blocks = (table,) if table.rows else (same,)
        sections.append(Section("Differences between the runs", blocks))
    blocks: list[Block] = []
    for run in runs:
        changes = changed_settings(run)
        whose = "" if len(runs) == 1 else f"{run.name}: "
        if changes is None:
            blocks.append(f"{whose}The settings are unknown: there is no manifest.json.")
            continue
        source, table = changes
        number = plural(len(table.rows), "setting")
        verb = "differs" if len(table.rows) == 1 else "differ"
        text = (
            f"{number} {verb} from {source}."
            if table.rows
            else f"All settings are those of {source}."
        )
        blocks += [f"{whose}{text} config.yaml has every setting.", *[table] * bool(table.rows)]
    return [*sections, Section("Settings", tuple(blocks))]


def _event_section(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for run in runs:
        first, *others = event_blocks(run)
        blocks += [first if len(runs) == 1 else f"{run.name}: {first}", *others]
    return Section("Events", tuple(blocks))


def _table_section(title: str, table: Table) -> Section:
    return Section(title, (table,) if table.rows else ("Unknown: there is no manifest.json.",))


def _cost_section(runs: Sequence[Run], watts: float | None) -> Section:
    def facts(run: Run) -> dict[str, str]:
        return cost_facts(run, watts=watts)

    text = (
        "The time is that spent in training steps. What they wait for data, or for a save to end, "
        "counts; evaluations do not. Steps that a rollback has undone count in the time, but not "
        "in FLOPs and MFU."
    )
    if any(run.manifest.get("parent") for run in runs):
        text += " A fork counts its own steps, not those of the run that it was forked from."
    if watts is None:
        text += " With --watts N, the power of a device, the report has the energy too."
    return Section("Cost", (side_by_side([run.name for run in runs], runs, facts), text))
