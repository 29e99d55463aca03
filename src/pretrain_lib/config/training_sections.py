"""Settings of training: data, batch, optimizer, schedule; one dataclass per concern.

Each field defines its type, default, unit, range and help sentence in one place; flags, help and
checks are generated from them (`pretrain_lib.values`).
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from pretrain_lib.config.units import TokenCount
from pretrain_lib.data.tokens.headerless import IdType
from pretrain_lib.data.windows.best_fit import Packing
from pretrain_lib.data.windows.shuffled import Shuffle
from pretrain_lib.optim.arguments import Moments
from pretrain_lib.optim.schedule import DecayShape, ScheduleKind
from pretrain_lib.values import setting, take_paths


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the run reads."""

    source: str | list[str] | None = setting(
        None,
        "The text: python-stdlib (the sources of Python's standard library), files, folders, URLs "
        "(s3://...), or OWNER/NAME[:CONFIG] on the hub. Prepared once into `path`.",
    )
    path: str | list[str] | None = setting(
        None,
        "A folder made by `pretrain prepare` (made now from `source` if it is not there), or "
        "arrays of tokens (.npy, .bin, .ds, litdata's index.json; train_*.bin takes several as "
        "one); also behind a URL (s3://...). A list of these is a mixture. Default: a cache folder "
        "named by what decides its content.",
    )
    remote_cache_gib: float = setting(
        20.0,
        "Local disk space for blocks of token files behind URLs, of all runs of a user together.",
        unit="GiB",
        above=0,
    )
    dtype: IdType | None = setting(
        None,
        "The type of the ids in arrays without a header (.bin, .npy of OLMo); null: uint16, unless "
        "the values leave that in doubt.",
    )
    weights: list[float] | None = setting(
        None,
        "The share of the windows that each path of a mixture gives; null: in proportion to its "
        "tokens.",
        above=0,
    )
    validation: str = setting(
        "hash",
        "Held-out text: hash[:SHARE] of the documents, first:TOKENS of the source, the path of a "
        "prepared folder or an array of tokens, or none.",
    )
    tokenizer: str | None = setting(None, "A folder, a tokenizer.json, or a name on the hub.")
    train_tokenizer: int | None = setting(
        None,
        "Train a byte-level BPE of this vocabulary on the source, if no tokenizer is given.",
        unit="ids",
        minimum=257,
    )
    text_field: str = setting("text", "The column or JSON field with the text.")
    document_separator: str | None = setting(
        None,
        "A line that separates documents in `.txt` files, such as <|endoftext|>; null: a file is "
        "one document.",
    )
    document_masking: bool = setting(
        False, "Keep packed documents apart: attention and positions stay inside each."
    )
    packing: Packing = setting(
        "concat",
        "Sequence packing: concat (documents one after the other) or best_fit (only documents "
        "longer than a window are cut; what stays empty is padding).",
    )
    shuffle: Shuffle = setting(
        "windows",
        "What each epoch permutes: windows, or also the documents before windows are cut from "
        "them, so that no two documents share their windows in every epoch.",
    )
    streaming: bool = setting(
        False, "Tokenize `source` while the run trains, into a spool of a few segments on disk."
    )
    spool_tokens: TokenCount = setting(
        TokenCount(2**24),
        "Size of a segment of a stream, within which the stream is shuffled.",
        unit="tokens",
        minimum=1,
    )
    max_rejected: int = setting(
        100,
        "Documents of `source` that may be left out because they cannot be read.",
        unit="documents",
        minimum=0,
    )
    workers: int | None = setting(
        None,
        "Processes that prepare a source; null: one per core.",
        unit="processes",
        minimum=1,
        maximum=4096,
    )

    def __post_init__(self) -> None:
        take_paths(self, "source", "path", "validation", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What one optimizer step consumes."""

    tokens: TokenCount = setting(
        TokenCount(2**19),
        "Tokens per optimizer step over all processes; gradient accumulation follows from it.",
        unit="tokens",
        minimum=1,
    )
    micro_batch: int = setting(
        8,
        "Sequences per process and forward pass: memory and speed; without dropout, the same run.",
        unit="sequences",
        minimum=1,
    )
    sequence_length: int = setting(1024, "Length of a sequence (T).", unit="tokens", minimum=1)
    ramp_from: TokenCount | None = setting(
        None, "Batch size at the start, if the batch is to grow.", unit="tokens", minimum=1
    )
    ramp_increment: TokenCount | None = setting(
        None, "Increase of the batch size at each stage of the ramp.", unit="tokens", minimum=1
    )
    ramp_tokens: TokenCount | None = setting(
        None, "Tokens over which the batch grows.", unit="tokens", minimum=1
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon, and gradient clipping."""

    kind: Literal["adamw", "muon"] = setting(
        "adamw",
        "adamw, or muon (Jordan et al. 2024): the matrices of the layers are updated by their "
        "orthogonalized momentum, all else by AdamW.",
    )
    learning_rate: float = setting(6e-4, "The peak of the schedule.", minimum=0)
    matrix_learning_rate: float | None = setting(
        None,
        "The peak for the matrices of the layers; null: `learning_rate`. Muon's updates are as "
        "large as AdamW's (0.2 root mean square).",
        minimum=0,
    )
    embedding_learning_rate: float | None = setting(
        None,
        "The peak for the embeddings and a head tied to them; null: `learning_rate`.",
        minimum=0,
    )
    momentum: float = setting(0.95, "Decay rate of Muon's momentum.", minimum=0, below=1)
    betas: tuple[float, float] = setting(
        (0.9, 0.95), "Decay rates of the first and the second moment.", minimum=0, below=1
    )
    epsilon: float = setting(
        1e-8, "Added to the root of the second moment.", minimum=1e-30, maximum=1
    )
    weight_decay: float = setting(
        0.1, "Decoupled weight decay of tensors of two or more dimensions.", minimum=0
    )
    max_grad_norm: float = setting(
        1.0,
        "Gradients are scaled down to this global norm; for no clipping give a large number such "
        "as 1e9.",
        above=0,
    )
    moments: Moments = setting(
        "fp32", "The dtype of moments and momentum; bf16 takes half of their memory."
    )
    z_loss: float = setting(
        0.0,
        "Coefficient of the squared log-sum-exp of each target's logits, minimized with the loss.",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run."""

    kind: ScheduleKind = setting("cosine", "The shape of the decay; wsd is warm-up, stable, decay.")
    tokens: TokenCount | None = setting(
        TokenCount(10e9), "Length of the whole run; null: `epochs`.", unit="tokens", minimum=1
    )
    epochs: float | None = setting(
        None,
        "Length of the whole run in passes over the training text, instead of `tokens`.",
        above=0,
        maximum=1e6,
    )
    warmup_tokens: TokenCount | None = setting(
        None, "Length of the linear warm-up; null: `warmup_fraction`.", unit="tokens", minimum=0
    )
    warmup_fraction: float | None = setting(
        0.0375,
        "Length of the linear warm-up as a fraction of the run, where `warmup_tokens` is null.",
        minimum=0,
        maximum=1,
    )
    decay_tokens: TokenCount = setting(
        TokenCount(0),
        "Length of the decay phase of wsd, where `decay_fraction` is null; wsd must have one.",
        unit="tokens",
        minimum=0,
    )
    decay_fraction: float | None = setting(
        None, "Length of the decay phase of wsd as a fraction of the run.", minimum=0, maximum=1
    )
    decay_shape: DecayShape = setting("linear", "The shape of the decay phase of wsd.")
    continue_at_floor: TokenCount | None = setting(
        None,
        "Train on for this long at the final rate, after `tokens`; null: stop there.",
        unit="tokens",
        minimum=1,
    )
    final_fraction: float = setting(
        0.1, "The rate at the end, as a fraction of the peak.", minimum=0, maximum=1
    )

    def count_warmup_tokens(self) -> TokenCount:
        """Return the length of the warm-up in tokens; `tokens` must be set."""
        if self.warmup_tokens is not None:
            return self.warmup_tokens
        return self._share(self.warmup_fraction)

    def count_decay_tokens(self) -> TokenCount:
        """Return the length of the decay phase of wsd in tokens; `tokens` must be set."""
        if self.decay_fraction is None:
            return self.decay_tokens
        return self._share(self.decay_fraction)

    def _share(self, fraction: float) -> TokenCount:
        # 0.29 of 100 is 28.999... in floating point
        return TokenCount(fraction * self.tokens * (1 + 1e-12))

    def in_tokens(self, train_tokens: int) -> "ScheduleConfig":
        """Return the schedule with all lengths in tokens; an epoch has `train_tokens`."""
        tokens = TokenCount(self.epochs * train_tokens) if self.tokens is None else self.tokens
        schedule = dataclasses.replace(self, tokens=tokens, epochs=None)
        return dataclasses.replace(
            schedule,
            warmup_tokens=schedule.count_warmup_tokens(),
            decay_tokens=schedule.count_decay_tokens(),
            warmup_fraction=None,
            decay_fraction=None,
        )
