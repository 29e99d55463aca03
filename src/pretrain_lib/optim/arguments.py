"""Which arguments of an optimizer contradict one another; recipes refuse the same."""


def check_rates(learning_rate: float, **others: float | None) -> None:
    """Raise ValueError for a rate in `others` that is no multiple of `learning_rate`."""
    for name, rate in others.items():
        if rate is not None and not learning_rate:
            raise ValueError(
                f"{name}={rate}: learning_rate must be above 0, because the schedule of the other "
                f"rates is a multiple of its own"
            )
