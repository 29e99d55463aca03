"""Error messages for a source that yields no windows."""

from collections.abc import Sequence

from pretrain_lib.data.tokens.arrays import TokenArray


def name_source(tokens: TokenArray) -> str:
    """Return the name of a token array: its prepared folder, or its files."""
    if not tokens.files:
        return ""
    first, others = tokens.files[0], len(tokens.files) - 1
    if first.is_shard:
        return str(first.path.parent)
    return f"{first.path}{f' and {others} more' if others else ''}"


def too_short(num_tokens: int, sequence_length: int, name: str) -> ValueError:
    """Return the error that refuses a source of less than one window; `name` may be empty."""
    shorter = f", or set batch.sequence_length to at most {num_tokens - 1}"
    return ValueError(
        f"{f'data.path={name}: ' if name else ''}a source of {num_tokens} tokens is too short: a "
        f"window needs batch.sequence_length + 1 = {sequence_length + 1}; add text, leave it out "
        f"of a mixture{shorter if num_tokens > 1 else ''}"
    )


def too_rare(weights: Sequence[float], number: int, block: int, name: str | None) -> ValueError:
    """Return the error that refuses a source without a window in a block of `block` windows.

    The weights are those of the user, or without `data.weights` (`name` is given) token counts.
    """
    weight, total = weights[number], sum(weights)
    if name is None:
        return ValueError(
            f"data.weights={list(weights)}: {weight} is less than one window in {block}; raise it "
            f"above {total / block:.3g}, or leave its path out"
        )
    return ValueError(
        f"data.path={name or number}: its {weight:,} of {total:,} tokens are less than one window "
        f"in {block}; leave it out, or give data.weights"
    )
