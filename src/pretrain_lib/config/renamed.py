"""Renamed settings: old names are rejected in new input, and translated in old checkpoints."""

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


def now_called(name: str) -> str | None:
    """Return the rest of an error message that begins with an old name, or None for other names."""
    return f"is now called {RENAMED[name]}" if name in RENAMED else None


def with_new_names(settings: dict) -> dict:
    """Return the settings of a checkpoint, by section, under their current names."""
    renamed: dict = {}
    for section, values in settings.items():
        for field, value in values.items():
            name = RENAMED.get(f"{section}.{field}", f"{section}.{field}")
            new_section, _, new_field = name.partition(".")
            renamed.setdefault(new_section, {})[new_field] = value
    return renamed
