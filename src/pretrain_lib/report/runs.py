"""Read runs for plots and reports, with the place of each row on the x axis."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from pretrain_lib.files.reading import parse_json
from pretrain_lib.models.any_model import build_model, read_shape
from pretrain_lib.models.flops import model_flops
from pretrain_lib.run_folder.metrics import human
from pretrain_lib.run_folder.rows import NothingTrained, Rows, read_metrics
from pretrain_lib.wording import in_line

Axis = Literal["tokens", "steps", "flops", "hours"]
AXES: tuple[str, ...] = get_args(Axis)
AXIS_TITLES = {
    "tokens": "Tokens",
    "steps": "Steps",
    "flops": "Model FLOPs",
    "hours": "Hours of training",
}


@dataclass(frozen=True)
class Run:
    """A run as it is drawn."""

    folder: Path
    name: str
    rows: Rows
    """The rows of `metrics.jsonl`, each with its place on the axis as `x`."""
    manifest: dict = field(default_factory=dict)
    """The content of `manifest.json`, empty if there is none."""

    @property
    def settings(self) -> dict:
        """The settings by section, empty if unknown."""
        return self.manifest.get("config", {})


def open_runs(
    folders: Sequence[Path],
    *,
    axis: Axis = "tokens",
    last_step: int | None = None,
    read: Callable[[Path], Rows] = read_metrics,
) -> list[Run]:
    """Read the rows, up to `last_step`, and manifests of runs.

    Of several, one that has not trained yet is left out with a warning, if not all are.
    Raises ValueError for an empty list, for what `read` refuses, for a broken manifest, and if the
    place of a row on the axis is unknown.
    """
    if not folders:
        raise ValueError("runs is empty: name at least one run folder")
    runs, left_out = [], []
    for folder, name in zip(folders, names_of(folders), strict=True):
        try:
            rows, manifest = read(folder), read_manifest(folder)
        except NothingTrained as error:
            left_out.append(error)
            continue
        rows = [row for row in rows if last_step is None or row["step"] <= last_step]
        rate = flops_per_token(manifest.get("config", {})) if axis == "flops" else None
        if axis == "flops" and rate is None:
            raise ValueError(
                f"x=flops needs the shape of the model, but {folder / 'manifest.json'} does not "
                f"have it: give --x tokens, steps or hours"
            )
        places = positions(rows, axis, flops_per_token=rate)
        placed = [row | {"x": float(x)} for row, x in zip(rows, places, strict=True)]
        runs.append(Run(folder, name, placed, manifest))
    if not runs:
        raise left_out[0]
    for error in left_out:
        print(f"left out: {error}", file=sys.stderr)
    return runs


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the folder names of the runs, prefixed by their parents' if two are equal."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [f"{folder.resolve().parent.name}/{folder.resolve().name}" for folder in folders]


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a run, empty if it has none; raises ValueError if it is broken."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        manifest = parse_json(path.read_bytes())
        manifest["config"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the manifest of a run: {in_line(error)}") from error
    return manifest


def positions(rows: Rows, axis: Axis, *, flops_per_token: float | None = None) -> np.ndarray:
    """Return the place of each row on an axis: `(rows,)`, float64.

    Hours are those spent in steps, without evaluations and saves. They are known of train rows and
    interpolated for the others.
    """
    if axis == "steps":
        return np.array([row["step"] for row in rows], dtype=np.float64)
    if axis == "hours":
        points = [(0, 0.0)]
        points += [
            (row["step"], row["seconds"] / 3600)
            for row in rows
            if row["kind"] == "train" and row.get("seconds") is not None
        ]
        steps, hours = np.array(sorted(points), dtype=np.float64).T
        return np.interp([row["step"] for row in rows], steps, hours)
    tokens = np.array([row["tokens"] for row in rows], dtype=np.float64)
    return tokens if axis == "tokens" else tokens * flops_per_token


def flops_per_token(settings: dict) -> float | None:
    """Return the training FLOPs per token of a run's model, 6 N + 12 L d T; None if unknown."""
    shape, length = settings.get("model", {}), settings.get("batch", {}).get("sequence_length")
    if not shape or not length:
        return None
    with torch.device("meta"):
        model = build_model(read_shape(shape))
    return model_flops(model, sequence_length=length).total


def format_tick(axis: Axis) -> Callable[..., str]:
    """Return the function that formats the tick labels of an axis: 2.5B, 1.2e18, 0.5."""

    def tick(value: float, _position: object = None) -> str:
        return f"{value:.3g}".replace("e+", "e") if axis in ("flops", "hours") else human(value)

    return tick
