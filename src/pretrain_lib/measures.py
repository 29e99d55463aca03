"""The names of what a checkpoint may be the best in."""

VALIDATION_LOSS = "loss"


def check_measure(name: str | None, setting: str) -> None:
    """Raise ValueError unless `name` is that of the validation loss or of a score, or None."""
    task, _, metric = name.partition("/") if isinstance(name, str) else ("", "", "")
    if name is not None and name != VALIDATION_LOSS and not (task and metric):
        raise ValueError(
            f"{setting}={name} must be {VALIDATION_LOSS} or a score TASK/METRIC, such as "
            f"hellaswag/acc_norm"
        )
