"""The `Recipe`: all settings of a run, and the quantities derived from them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pretrain_lib.config.rules import check_changes, check_division, check_together, does_not_divide
from pretrain_lib.config.run_sections import (
    CheckpointConfig,
    LogConfig,
    RunConfig,
    SampleConfig,
    ScoreConfig,
    StabilityConfig,
    SystemConfig,
    ValidationConfig,
)
from pretrain_lib.config.training_sections import (
    BatchConfig,
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from pretrain_lib.config.units import Duration, TokenCount
from pretrain_lib.models.any_model import ModelConfig
from pretrain_lib.optim.schedule import BatchSizes, LearningRate
from pretrain_lib.values import check_fields, take_plain


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    system: SystemConfig = field(default_factory=SystemConfig)

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            take_plain(getattr(self, section.name))

    def batch_sizes(self) -> BatchSizes:
        """Return the batch sizes in windows; raises ValueError for fractions of a window."""
        ramp = (self.batch.ramp_from, self.batch.ramp_increment, self.batch.ramp_tokens)
        if any(value is not None for value in ramp) and None in ramp:
            raise ValueError(
                "batch.ramp_from, batch.ramp_increment and batch.ramp_tokens go together"
            )
        names = ("tokens", "ramp_from", "ramp_increment", "ramp_tokens")
        full, initial, increment, length = (self._windows(name) for name in names)
        return BatchSizes(full, initial, increment, length)

    def _windows(self, name: str) -> int:
        tokens, length = getattr(self.batch, name) or 0, self.batch.sequence_length
        if tokens % length and name != "ramp_tokens":
            raise does_not_divide(name, tokens, f"{length} tokens of a sequence", length)
        return tokens // length

    def learning_rate(self) -> LearningRate:
        """Return the learning-rate schedule, converted from tokens to steps."""
        schedule, length = self.schedule, self.batch.sequence_length
        assert schedule.tokens is not None, "schedule.epochs is resolved by `with_text`"
        sizes = self.batch_sizes()
        total = sizes.steps_within(schedule.tokens // length)
        is_wsd = schedule.kind == "wsd"
        decay = schedule.count_decay_tokens() if is_wsd else 0  # others leave it idle
        before_decay = max(0, schedule.tokens - decay)
        return LearningRate(
            kind=schedule.kind,
            peak=self.optimizer.learning_rate,
            floor=self.optimizer.learning_rate * schedule.final_fraction,
            warmup_steps=sizes.steps_within(schedule.count_warmup_tokens() // length),
            total_steps=total,
            decay_steps=total - sizes.steps_within(before_decay // length),
            decay_shape=schedule.decay_shape,
        )

    def with_text(self, train_tokens: int) -> "Recipe":
        """Return the recipe for a text of so many tokens; raises ValueError if it is too short."""
        resolved = dataclasses.replace(self, schedule=self.schedule.in_tokens(train_tokens))
        resolved.check_length()
        return resolved

    def save_is_due(self, step: int, tokens: int) -> bool:
        """Return whether a checkpoint is due at `step`, after `tokens` tokens."""
        if not step:
            return False
        every, every_tokens = self.checkpoint.every, self.checkpoint.every_tokens
        step_tokens = self.batch_sizes().at(step - 1) * self.batch.sequence_length
        by_steps = every is not None and step % every == 0
        # Due if this step has reached or passed a multiple of `every_tokens`.
        return by_steps or (every_tokens is not None and tokens % every_tokens < step_tokens)

    def whole_run(self) -> int:
        """Return the steps of the schedule, and of what is trained at its final rate."""
        tokens = self.schedule.tokens + (self.schedule.continue_at_floor or 0)
        return self.batch_sizes().steps_within(tokens // self.batch.sequence_length)

    def last_step(self) -> int:
        """Return the step at which training ends: that of `whole_run`, or `run.max_steps`."""
        total = self.whole_run()
        return total if self.run.max_steps is None else min(total, self.run.max_steps)

    def check_values(self) -> None:
        """Raise ValueError for a value that is out of range."""
        for section in dataclasses.fields(self):
            check_fields(getattr(self, section.name), name=section.name)
        check_changes(self)

    def check(self, *, processes: int) -> None:
        """Raise ValueError for invalid values, or settings that conflict for this world size."""
        self.check_values()
        check_together(self)
        check_division(self, processes=processes)
        if self.schedule.tokens is not None:
            self.check_length()

    def check_length(self) -> None:
        """Raise ValueError for a run that is shorter than one step, or than its phases."""
        schedule = self.learning_rate()
        floor_steps = self.whole_run() - schedule.total_steps
        for name, steps in (("tokens", schedule.total_steps), ("continue_at_floor", floor_steps)):
            if (tokens := getattr(self.schedule, name)) is not None and steps < 1:
                raise ValueError(
                    f"schedule.{name}={tokens} is less than one step of "
                    f"batch.tokens={self.batch.tokens}"
                )
        if schedule.kind == "wsd" and not schedule.decay_steps:
            raise ValueError(
                f"schedule.decay_tokens={self.schedule.decay_tokens}: with schedule.kind=wsd the "
                f"learning rate would never decay; give the length of its last phase, such as "
                f"{self.schedule.tokens // 5} (or schedule.decay_fraction=0.2), or take "
                f"schedule.kind=constant to branch decays off"
            )
        profile, last = self.system.profile, self.last_step()
        if profile is not None and profile[0] > last > 0:
            raise ValueError(
                f"system.profile={list(profile)}: the run ends at step {last:,}, before the first "
                f"of these steps; give earlier ones, or null"
            )

    def to_dict(self) -> dict:
        """Return the settings as nested dictionaries of plain values."""
        return plain(dataclasses.asdict(self))


def plain(value: Any) -> Any:
    """Convert a value to types that JSON and YAML can represent."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    for kind in (TokenCount, Duration):
        if isinstance(value, kind):
            return kind.__base__(value)
    return value
