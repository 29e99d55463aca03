"""Settings that changed: old names are rejected in new input, and translated in old checkpoints."""

from collections.abc import Iterable

from pretrain_lib.values import did_you_mean

RENAMED = {
    "run.save_every": "checkpoint.every",
    "run.save_every_tokens": "checkpoint.every_tokens",
    "run.keep_last": "checkpoint.keep_last",
    "run.keep_every": "checkpoint.keep_every",
    "run.log_every": "log.every",
    "run.trackers": "log.trackers",
    "run.evaluate_every": "validation.every",
    "run.evaluate_tokens": "validation.tokens",
    "run.max_skipped": "stability.max_skipped",
    "run.spike_sigma": "stability.spike_sigma",
    "run.spike_window": "stability.spike_window",
    "run.spike_action": "stability.spike_action",
    "run.processes": "system.processes",
    "run.compile": "system.compile",
    "run.recompute": "system.activation_checkpointing",
    "run.gather": "system.fsdp_param_dtype",
    "run.collective_timeout": "system.collective_timeout",
}

# Settings that older checkpoints lack, with the value that describes what was done then.
ADDED = {
    "data.remote_cache_gib": 20.0,
    "data.shuffle": "windows",
    "model.qk_norm": False,
    "optimizer.kind": "adamw",
    "optimizer.momentum": 0.95,
    "schedule.decay_shape": "linear",
    "schedule.decay_fraction": None,
    "checkpoint.keep_best": None,
}


# What nanoGPT, litgpt and the Trainer of transformers call a setting (docs/migrating.md).
ELSEWHERE = {
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.epsilon",
    "batch_size": "batch.micro_batch",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "block_size": "batch.sequence_length",
    "dataset_name": "data.source",
    "eval_interval": "validation.every",
    "eval_iters": "validation.tokens",
    "eval_steps": "validation.every",
    "global_batch_size": "batch.tokens",
    "grad_clip": "optimizer.max_grad_norm",
    "gradient_accumulation_steps": "batch.tokens",
    "gradient_checkpointing": "system.activation_checkpointing",
    "log_interval": "log.every",
    "logging_steps": "log.every",
    "lr": "optimizer.learning_rate",
    "lr_decay_iters": "schedule.tokens",
    "lr_scheduler_type": "schedule.kind",
    "lr_warmup_steps": "schedule.warmup_tokens",
    "max_iters": "schedule.tokens",
    "max_norm": "optimizer.max_grad_norm",
    "max_seq_length": "batch.sequence_length",
    "max_steps": "schedule.tokens",
    "max_tokens": "schedule.tokens",
    "micro_batch_size": "batch.micro_batch",
    "min_lr": "schedule.final_fraction",
    "model_name_or_path": "run.initial_weights",
    "n_embd": "model.width",
    "n_head": "model.num_heads",
    "n_layer": "model.num_layers",
    "num_train_epochs": "schedule.epochs",
    "out_dir": "run.dir",
    "per_device_train_batch_size": "batch.micro_batch",
    "report_to": "log.trackers",
    "save_interval": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "tokenizer_name": "data.tokenizer",
    "torch_compile": "system.compile",
    "train_file": "data.source",
    "vocab_size": "model.vocabulary_size",
    "wandb_log": "log.trackers",
    "warmup_iters": "schedule.warmup_tokens",
    "warmup_ratio": "schedule.warmup_fraction",
    "warmup_steps": "schedule.warmup_tokens",
}


def meant(written: str, known: Iterable[str]) -> str:
    """Return which of the `known` settings or flags an unknown one may mean, as `did_you_mean`."""
    known = list(known)
    name = written.removeprefix("--")
    setting = ELSEWHERE.get(name.rpartition(".")[2])
    dashes = "--" if written != name else ""
    if setting is None or dashes + setting not in known:
        return did_you_mean(written, known)
    return f"; its counterpart here is {dashes}{setting} (docs/migrating.md)"


def now_called(name: str) -> str | None:
    """Return the rest of an error message that begins with an old name, or None for other names."""
    return f"is now called {RENAMED[name]}" if name in RENAMED else None


def with_new_names(settings: dict, *, now: dict | None = None) -> dict:
    """Return the settings of a checkpoint, by section, under their current names.

    A setting of `now` that was added since gets the value that describes what was done before.
    """
    renamed: dict = {}
    for name, value in ADDED.items():
        section, _, field = name.partition(".")
        if field in (now or {}).get(section, ()):
            renamed.setdefault(section, {})[field] = value
    for section, values in settings.items():
        for field, value in values.items():
            name = RENAMED.get(f"{section}.{field}", f"{section}.{field}")
            new_section, _, new_field = name.partition(".")
            renamed.setdefault(new_section, {})[new_field] = value
    return renamed
