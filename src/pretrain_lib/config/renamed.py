"""Settings that changed: old names are rejected in new input, and translated in old checkpoints."""

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
    "checkpoint.keep_best": None,
}


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
