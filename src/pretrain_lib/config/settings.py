"""The settings of a run: one dataclass per concern, checked against one another."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pretrain_lib.config.rules import (
    check_division,
    check_together,
    check_values,
    does_not_divide,
)
from pretrain_lib.config.units import Duration, TokenCount
from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.optim.schedule import BatchSizes, LearningRate


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    source: str | list[str] | None = None
    """The text: python-stdlib (the embedded corpus), files, folders, or OWNER/NAME[:CONFIG] on the
    hub. Prepared once into `path`."""
    path: str | list[str] | None = None
    """A folder made by `pretrain prepare` (made now from `source` if it is not there), or arrays
    of tokens (.npy, .bin, .ds; train_*.bin takes several as one). A list of these is a mixture.
    Default: a cache folder named by what decides its content."""
    weights: list[float] | None = None
    """The share of the windows that each path of a mixture gives; default: as it has tokens."""
    validation: str = "hash"
    """Held-out text: hash[:SHARE] of the documents, first:TOKENS of the source, the path of an
    array of tokens, or none."""
    tokenizer: str | None = None
    """A folder, a tokenizer.json, or a name on the hub."""
    train_tokenizer: int | None = None
    """Train a byte-level BPE of so many ids on the source, if no tokenizer is given."""
    text_field: str = "text"
    """The column or JSON field with the text."""
    document_masking: bool = False
    """Keep packed documents apart: attention and positions stay inside each."""
    packing: str = "concat"
    """concat (documents one after the other), or best_fit (only documents longer than a window are
    cut; what stays empty is padding)."""
    streaming: bool = False
    """Tokenise `source` while the run trains, into a spool of a few segments on disk."""
    spool_tokens: TokenCount = TokenCount(2**24)
    """Tokens in a segment of a stream: so far reaches its shuffle."""
    max_rejected: int = 100
    """Documents of `source` that may be left out because they cannot be read."""
    workers: int | None = None
    """Processes that prepare a source; default: one per core."""


@dataclass(frozen=True)
class BatchConfig:
    """What one optimizer step consumes."""

    tokens: TokenCount = TokenCount(2**19)
    """Tokens per optimizer step over all processes; accumulation follows from it."""
    micro_batch: int = 8
    """Sequences per process and forward pass: memory and speed, not mathematics."""
    sequence_length: int = 1024
    """Tokens per sequence (T)."""
    ramp_from: TokenCount | None = None
    """Tokens per step at the start, if the batch is to grow."""
    ramp_increment: TokenCount | None = None
    """Tokens that each stage of the ramp adds."""
    ramp_tokens: TokenCount | None = None
    """Tokens over which the batch grows."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and clipping."""

    learning_rate: float = 6e-4
    """The peak of the schedule."""
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """On tensors of two or more dimensions."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    moments: str = "fp32"
    """The dtype of both moments: fp32, or bf16 for half of their memory."""
    z_loss: float = 0.0
    """Times the squared log-sum-exp of each target's logits, added to the training loss."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run."""

    kind: str = "cosine"
    """cosine, linear, constant, or wsd (warm-up, stable, decay)."""
    tokens: TokenCount = TokenCount(10e9)
    """Tokens of the whole run."""
    warmup_tokens: TokenCount = TokenCount(375e6)
    decay_tokens: TokenCount = TokenCount(0)
    """Tokens of wsd's last phase."""
    final_fraction: float = 0.1
    """The rate at the end, as a fraction of the peak."""


@dataclass(frozen=True)
class SampleConfig:
    """Texts that the model writes while it trains."""

    prompts: list[str] = field(default_factory=list)
    per_prompt: int = 4
    tokens: int = 32
    """New tokens per sample."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int | None = 50
    top_p: float | None = None
    every: int = 250
    """Steps until the first samples; there are always some at the end."""
    growth: float = 1.0
    """Each interval is so many times the one before."""

    def is_due(self, step: int) -> bool:
        """Return whether an interval ends at `step`."""
        interval = end = float(self.every)
        while round(end) < step:
            interval *= self.growth
            end += interval
        return round(end) == step


@dataclass(frozen=True)
class ScoreConfig:
    """Tasks of lm-eval on which the model is scored while it trains."""

    tasks: list[str] = field(default_factory=list)
    """Names or patterns of lm-eval's tasks, or of those in `include_path`."""
    include_path: str | None = None
    """A folder of task files of your own (.yaml), whose data may be local; their Python is run."""
    every: int = 250
    """Steps between scores; also at step 0 and at the end."""
    limit: int | None = None
    """Items of each task, the first; default: all."""
    batch_size: int = 16
    """Contexts read at once on each process."""


@dataclass(frozen=True)
class RunConfig:
    """Where and how long."""

    dir: str = "runs/default"
    """The run folder."""
    seed: int = 1337
    max_steps: int | None = None
    """Stop after so many optimizer steps; the schedule stays as it is."""
    max_time: Duration | None = None
    """Stop, saved, within this time."""
    save_every: int | None = None
    """Steps between checkpoints; there is always one at the end."""
    save_every_tokens: TokenCount | None = None
    keep_last: int = 3
    """Checkpoints kept; 0 keeps all."""
    keep_every: int | None = None
    """Steps; checkpoints at a multiple of them are kept for ever."""
    log_every: int = 1
    """Steps between rows of metrics; the loss of a row is the mean over them."""
    evaluate_every: int = 250
    """Steps between validations; also at step 0 and at the end."""
    evaluate_tokens: TokenCount | None = TokenCount(20 * 2**19)
    """Validation tokens per evaluation, at most; null: all that are held out. Of a mixture each
    path gives its share."""
    resume: str = "auto"
    """auto, never, or the path of a checkpoint: another run's makes this one its fork."""
    initial_weights: str | None = None
    """A folder of transformers with the same model, whose weights a new run begins with."""
    allow_changes: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint's on resume, such as schedule.tokens."""
    compile: bool | None = None
    """torch.compile of the blocks and the loss; null: on CUDA."""
    recompute: str = "none"
    """What backward computes again to save memory: none, selective (all but matrix products and
    attention; what is compiled does so by itself), or full (the blocks)."""
    gather: str = "fp32"
    """The dtype in which FSDP2 sends weights to where they are used: fp32, or bf16, which is half
    of the traffic and rounds embeddings and norms as well."""
    processes: int | None = None
    """The number of processes expected; another stops the run."""
    max_skipped: int = 10
    """Stop after so many updates in a row that were left out."""
    spike_sigma: float | None = None
    """Leave out updates whose loss or gradient norm is so many standard deviations too high."""
    spike_window: int = 128
    """Steps by which a spike is told."""
    spike_action: str = "skip"
    """skip, or rollback: go back to the newest checkpoint and on with the data behind the spike."""
    collective_timeout: Duration = Duration(1800)
    """How long a process waits for another before it gives up."""
    trackers: list[str] = field(default_factory=list)
    """Any of Accelerate's: tensorboard, trackio, wandb, ..."""


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    model: GPT2Config | LlamaConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    samples: SampleConfig
    run: RunConfig
    scores: ScoreConfig = field(default_factory=ScoreConfig)

    def batch_sizes(self) -> BatchSizes:
        """Return the windows per step; raises ValueError where tokens are no whole windows."""
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
        """Return the schedule in steps."""
        sizes, length = self.batch_sizes(), self.batch.sequence_length
        total = sizes.steps_within(self.schedule.tokens // length)
        before_decay = max(0, self.schedule.tokens - self.schedule.decay_tokens)
        return LearningRate(
            kind=self.schedule.kind,
            peak=self.optimizer.learning_rate,
            floor=self.optimizer.learning_rate * self.schedule.final_fraction,
            warmup_steps=sizes.steps_within(self.schedule.warmup_tokens // length),
            total_steps=total,
            decay_steps=total - sizes.steps_within(before_decay // length),
        )

    def save_is_due(self, step: int, tokens: int) -> bool:
        """Return whether the interval in steps or in tokens ends at `step`, after `tokens`."""
        if not step:
            return False
        every, every_tokens = self.run.save_every, self.run.save_every_tokens
        step_tokens = self.batch_sizes().at(step - 1) * self.batch.sequence_length
        by_steps = every is not None and step % every == 0
        # The step in which a multiple of so many tokens was passed.
        return by_steps or (every_tokens is not None and tokens % every_tokens < step_tokens)

    def last_step(self) -> int:
        """Return the step at which this start of the run ends."""
        total = self.learning_rate().total_steps
        return total if self.run.max_steps is None else min(total, self.run.max_steps)

    def check(self, *, processes: int) -> None:
        """Raise ValueError for settings that contradict one another on so many processes."""
        check_values(self)
        check_together(self)
        check_division(self, processes=processes)
        if self.learning_rate().total_steps < 1:
            raise ValueError(
                f"schedule.tokens={self.schedule.tokens} is less than one step of "
                f"batch.tokens={self.batch.tokens}"
            )

    def to_dict(self) -> dict:
        """Return the settings as plain values, section by section."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    for kind in (TokenCount, Duration):
        if isinstance(value, kind):
            return kind.__base__(value)
    return value
