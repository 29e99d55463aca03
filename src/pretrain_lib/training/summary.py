"""The table printed at the end of a run: result, cost, paths and next steps."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from pretrain_lib.checkpoint.folders import find_newest, step_of
from pretrain_lib.evaluate.references import find_figure, models_near
from pretrain_lib.files.reading import read_if_whole
from pretrain_lib.models.flops import count_parameters, has_data_sheet
from pretrain_lib.run_folder.folder import CHECKPOINTS, MANIFEST, METRICS, SAMPLES, SCORES
from pretrain_lib.run_folder.metrics import human, human_time
from pretrain_lib.run_folder.rows import COMMON, Rows, mean_mfu, own_part, read_rows
from pretrain_lib.training.console_lines import WIDTH, fill
from pretrain_lib.training.measurements import Memory, peak_memory
from pretrain_lib.training.run import Run
from pretrain_lib.wording import in_line, plural

LABEL = 18  # characters of the first column
MEMORY = {"GPU": "of tensors on the GPU", "RAM": "of RAM"}
FAMILY = "GPT-"  # the published models that scores are compared with


def summary(run: Run, *, state: str, reason: str) -> list[str]:
    """Return the lines about a run that has ended; `state` and `reason` are those of its status.

    Call it on the main process. A summary that fails is remarked, for the run has ended well.
    """
    try:
        return _lines(run, state=state, reason=reason)
    except Exception as error:  # whatever has become of the files of the run
        return [f"warning: no summary of the run: {in_line(f'{type(error).__name__}: {error}')}"]


def _lines(run: Run, *, state: str, reason: str) -> list[str]:
    rows = read_rows(run.folder / METRICS) if (run.folder / METRICS).is_file() else []
    newest = find_newest(run.folder / CHECKPOINTS)
    pairs = [
        *_cost(run, rows),
        *_losses(run, rows),
        *_scores(run, rows),
        ("", ""),
        *_places(run, newest),
        ("", ""),
        *(_next_commands(run, state) if newest is not None else ()),
    ]
    table = [f"  {name:<{LABEL}}{text}".rstrip() for name, text in pairs]
    return ["", *_headline(run, state, reason, newest), "", *table, ""]


def _headline(run: Run, state: str, reason: str, newest: Path | None) -> list[str]:
    step, left = run.state.step, run.config.whole_run() - run.state.step
    if state == "resumable" and newest is None:
        text = f"stopped at step {step:,} of {run.last_step:,}, without a checkpoint: {reason}. "
        return fill(f"{text}The same command begins the run anew").split("\n")
    if state == "resumable":
        step = step_of(newest)
        text = f"stopped, resumable at step {step:,} of {run.last_step:,}: {reason}. "
        return fill(f"{text}Start the same command again to go on from there").split("\n")
    text = "the schedule is complete"
    if left > 0:
        remaining = f"{plural(left, 'step')} of the schedule {'is' if left == 1 else 'are'} left"
        text = f"run.max_steps={run.config.run.max_steps} is reached, {remaining}"
    nothing = "; there was nothing left to do" if run.continued_at == step else ""
    return fill(f"done at step {step:,}: {text}{nothing}").split("\n")


def _cost(run: Run, rows: Rows) -> Iterator[tuple[str, str]]:
    state, trained = run.state, [row for row in rows if row["kind"] == "train"]
    yield "tokens", f"{state.tokens:,} in {plural(state.step, 'step')}"
    manifest, now = read_if_whole(run.folder / MANIFEST), vars(state) | {"kind": "train"}
    tokens, seconds = own_part([*trained, now], manifest)
    if not seconds or not trained:
        return
    of_fork = ", of the fork alone" if manifest.get("parent") else ""
    yield "training time", f"{human_time(seconds)}, not counting evaluation{of_fork}"
    yield "speed", f"{human(tokens / seconds, digits=3)} tokens/s"
    if (mfu := mean_mfu(rows, manifest)) is not None:
        yield "MFU", f"{mfu:.1%} of {_describe_peak(run)}"
    memory = peak_memory(run.accelerator.device)
    largest = max([memory.peak_bytes, *(row.get("peak_memory_bytes") or 0 for row in trained)])
    several = run.accelerator.num_processes > 1
    what = MEMORY[memory.kind] + (", in the first process" if several else "")
    yield "peak memory", f"{Memory(memory.kind, largest).gigabytes()} GB {what}"


def _describe_peak(run: Run) -> str:
    processes = run.accelerator.num_processes
    rate = f"{(run.peak or 0) / processes / 1e12:.3g} TFLOP/s"
    several = " on each device" if processes > 1 else ""
    if has_data_sheet(run.accelerator.device):
        return f"the {rate} of the data sheet{several}"
    return f"the rate of a large matrix product measured here, {rate}{several}"


def _losses(run: Run, rows: Rows) -> Iterator[tuple[str, str]]:
    for kind, name, label in (
        ("train", "loss", "training loss"),
        ("validation", "loss", "validation loss"),
        ("validation", "bits_per_byte", "bits per byte"),
    ):
        values = [row[name] for row in rows if row["kind"] == kind and row.get(name) is not None]
        if not values:
            continue
        best, state = "", run.state
        if label == "validation loss" and (state.best_loss or values[-1]) < values[-1]:
            best = f", best {state.best_loss:.4f} at step {state.best_step:,}"
        yield label, f"{_first_to_last(values)}{best}"
    if run.state.skipped:
        yield "left out", f"{plural(run.state.skipped, 'update')}, not finite or a spike"


def _first_to_last(values: list[float]) -> str:
    ends = [values[0], values[-1]] if len(values) > 1 else values
    return " -> ".join(f"{value:.4f}" for value in ends)


def _scores(run: Run, rows: Rows) -> Iterator[tuple[str, str]]:
    """Yield each score, first and last, with the published scores of models of similar size."""
    scored = [row for row in rows if row["kind"] == "evaluation"]
    if not scored:
        return
    shots = _shots(run.folder / SCORES / f"step-{scored[-1]['step']:08d}.json")
    for name in (n for n in scored[-1] if n not in COMMON and not n.endswith("_stderr")):
        values = [row[name] for row in scored if row.get(name) is not None]
        error = scored[-1].get(f"{name}_stderr")
        text = _first_to_last(values) if values else "unknown"
        text += "" if error is None else f" +- {error:.4f}"
        task, _, metric = name.rpartition("/")
        for model in models_near(count_parameters(run.model)):
            figure = find_figure(model, task, metric, shots=shots.get(task, 0))
            text += f"; {model} {figure.value:.4f}" if figure and FAMILY in model else ""
        yield (name, text) if len(name) < LABEL else (name, "")
        if len(name) >= LABEL:
            yield "", text


def _shots(path: Path) -> dict[str, int]:
    """Return the number of examples in the prompts of each task, from lm-eval's results."""
    return read_if_whole(path).get("n-shot", {})


def _places(run: Run, newest: Path | None) -> Iterator[tuple[str, str]]:
    yield "run folder", str(run.folder)
    if newest is not None:
        yield "checkpoint", f"{newest} (a Hugging Face model folder)"
    for label, name in (("metrics", METRICS), ("samples", SAMPLES), ("scores", SCORES)):
        if (run.folder / name).exists():
            yield label, str(run.folder / name)


def _next_commands(run: Run, state: str) -> Iterator[tuple[str, str]]:
    folder = shlex.quote(str(run.folder))
    commands = [
        f"pretrain export {folder} --out {shlex.quote(str(run.folder / 'export'))}",
        f"pretrain plot {folder}",
    ]
    if run.corpus.tokenizer is not None:
        prompt = next(iter(run.config.samples.prompts), "Once upon a time")
        prompt = prompt if len(prompt) < WIDTH // 2 and prompt.isprintable() else "Once upon a time"
        commands.insert(0, f"pretrain sample {folder} --prompt {shlex.quote(prompt)}")
    for number, command in enumerate(commands if state == "done" else commands[:1]):
        yield ("next command", command) if not number else ("", command)
