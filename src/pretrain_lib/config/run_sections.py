"""Settings of a run's execution: folder, output, evaluation, stability, system.

One dataclass per concern, as in `training_sections`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain_lib.config.units import Duration, TokenCount
from pretrain_lib.measures import VALIDATION_LOSS
from pretrain_lib.models.blocks import ActivationCheckpointing
from pretrain_lib.optim.spikes import SpikeAction
from pretrain_lib.values import setting, take_paths

YEAR = 365 * 24 * 3600  # seconds


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Texts that the model writes while it trains."""

    prompts: list[str] | None = setting(
        [],
        "What the texts begin with; []: no samples; null: the first words of two held-out "
        "documents.",
    )
    per_prompt: int = setting(4, "Samples of each prompt.", unit="samples", minimum=1)
    tokens: int = setting(
        32, "Length of a sample, its prompt not counted.", unit="tokens", minimum=1
    )
    temperature: float = setting(
        1.0, "Divides the logits; 0 takes the likeliest token.", minimum=1e-3, also=0
    )
    top_k: int | None = setting(
        50, "Draw from this many of the likeliest tokens; null: from all.", unit="tokens", minimum=1
    )
    top_p: float | None = setting(
        None,
        "Draw from the smallest set of tokens whose probability reaches this; null: from all.",
        above=0,
        maximum=1,
    )
    every: int = setting(
        250,
        "Interval until the first samples; there are always some at the end.",
        unit="steps",
        minimum=1,
    )
    growth: float = setting(
        1.0, "Factor of each interval over the one before.", minimum=1, maximum=1000
    )

    def due_steps(self) -> Iterator[int]:
        """Yield the steps at which samples are due, in order and without end."""
        interval = step = float(self.every)
        while True:
            yield round(step)
            interval *= self.growth
            step += interval

    def is_due(self, step: int) -> bool:
        """Return whether samples are due at `step`."""
        return next(due for due in self.due_steps() if due >= step) == step


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Tasks of lm-eval on which the model is scored while it trains."""

    tasks: list[str] = setting(
        [], "Names or patterns of lm-eval's tasks, or of those in `include_path`."
    )
    include_path: str | None = setting(
        None,
        "A folder of task files of your own (.yaml), whose data may be local; their Python is run.",
    )
    every: int = setting(
        250,
        "Interval between scores; also at step 0 and at the end.",
        unit="steps",
        minimum=1,
    )
    limit: int | None = setting(
        None, "Score the first items of each task only; null: all.", unit="items", minimum=1
    )
    batch_size: int = setting(
        16, "Contexts read at once on each process.", unit="contexts", minimum=1
    )

    def __post_init__(self) -> None:
        _expand_home(self, "include_path")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run is written, how long it goes on and from what it starts."""

    dir: str = setting("runs/default", "The run folder.")
    seed: int = setting(
        1337, "Decides weights, data order, dropout and samples.", minimum=0, maximum=2**63 - 1
    )
    max_steps: int | None = setting(
        None,
        "Stop after this many optimizer steps; the schedule stays as it is.",
        unit="steps",
        minimum=0,
    )
    max_time: Duration | None = setting(
        None,
        "Save and stop, resumable, before this much time has passed since the command was given.",
        unit="seconds",
        above=0,
    )
    resume: str = setting(
        "auto", "auto, never, or the path of a checkpoint: another run's makes this one its fork."
    )
    initial_weights: str | None = setting(
        None,
        "A folder of transformers with the same model, or its name on the hub, whose weights a new "
        "run begins with.",
    )
    allow_changes: list[str] = setting(
        [], "Settings that may differ from the checkpoint's on resume, such as schedule.tokens."
    )

    def __post_init__(self) -> None:
        _expand_home(self, "dir", "resume")
        take_paths(self, "initial_weights")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics."""

    every: int = setting(
        1,
        "Interval between rows of metrics; the loss of a row is the mean over it.",
        unit="steps",
        minimum=1,
    )
    trackers: list[str] = setting([], "Any of Accelerate's: tensorboard, trackio, wandb, ...")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: int | None = setting(
        None,
        "Interval between checkpoints; there is always one at the end.",
        unit="steps",
        minimum=1,
    )
    every_tokens: TokenCount | None = setting(
        None, "Interval between checkpoints, in tokens.", unit="tokens", minimum=1
    )
    keep_last: int = setting(
        3, "Keep this many of the newest checkpoints; 0: all.", unit="checkpoints", minimum=0
    )
    keep_best: str | None = setting(
        None,
        f"Save a checkpoint whenever this is better than ever, and keep the newest of these: "
        f"{VALIDATION_LOSS} (of validation), or a score TASK/METRIC, such as hellaswag/acc_norm.",
    )
    keep_every: int | None = setting(
        None, "Never delete checkpoints at multiples of this step.", unit="steps", minimum=1
    )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The loss on held-out text."""

    every: int = setting(
        250,
        "Interval between validations; also at step 0 and at the end.",
        unit="steps",
        minimum=1,
    )
    tokens: TokenCount | None = setting(
        TokenCount(20 * 2**19),
        "Read at most this much; null: all that is held out. Of a mixture each path gives its "
        "share.",
        unit="tokens",
        minimum=1,
    )


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """What is done about updates that are not finite, and about spikes."""

    max_skipped: int = setting(
        10, "Stop after this many skipped updates in a row.", unit="updates", minimum=1
    )
    spike_sigma: float | None = setting(
        None,
        "Skip updates whose loss or gradient norm is this far above its mean; null: none.",
        unit="standard deviations",
        above=0,
    )
    spike_window: int = setting(
        128,
        "Steps whose mean and standard deviation tell a spike.",
        unit="steps",
        minimum=2,
        maximum=100_000,
    )
    spike_action: SpikeAction = setting(
        "skip",
        "skip the update, or rollback: go back to the newest checkpoint and continue with the data "
        "after the spike.",
    )


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """How the run uses the machine: speed and memory, not mathematics."""

    processes: int | None = setting(
        None,
        "The number of processes expected; another stops the run.",
        unit="processes",
        minimum=1,
    )
    compile: bool | None = setting(None, "torch.compile of the blocks and the loss; null: on CUDA.")
    activation_checkpointing: ActivationCheckpointing = setting(
        "none",
        "What backward computes again to save memory: selective (all but matrix products and "
        "attention; what is compiled does so by itself) or full (the blocks).",
    )
    fsdp_param_dtype: Literal["fp32", "bf16"] = setting(
        "fp32",
        "The dtype in which FSDP2 gathers weights: bf16 is half of the traffic and rounds "
        "embeddings and norms as well.",
    )
    collective_timeout: Duration = setting(
        Duration(1800),
        "How long a process waits for another before it gives up.",
        unit="seconds",
        minimum=1,
        maximum=YEAR,
    )
    profile: tuple[int, int] | None = setting(
        None,
        "The first and the last step to profile, on the main process; the trace goes to profile/ "
        "in the run folder.",
        unit="steps",
        minimum=1,
    )


def _expand_home(section: object, *names: str) -> None:
    """Expand `~` to the home folder in the given fields of a section."""
    for name in names:
        path = getattr(section, name)
        if isinstance(path, str | os.PathLike):
            object.__setattr__(section, name, os.path.expanduser(path))  # noqa: PTH111 (keeps "./")
