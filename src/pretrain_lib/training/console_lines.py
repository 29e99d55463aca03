"""Format the lines that a run prints: steps, samples, long lists."""

import textwrap

from pretrain_lib.run_folder.metrics import human, human_time
from pretrain_lib.training.measurements import Left, Memory
from pretrain_lib.wording import plural

WIDTH = 100  # characters of a line
MOST_LINES = 24  # of a sample that are printed
# What a step line does without, in this order, if it would be longer than `WIDTH`.
DISPENSABLE = ("lr", "memory", "grad", "mfu")


def format_step(
    row: dict, *, total_steps: int, memory: Memory, left: Left | None, shows_mfu: bool
) -> str:
    """Format a train row as a line of at most `WIDTH` ASCII characters.

    `left` is the remaining time, None if it has not been measured yet.
    """
    digits = len(str(total_steps))
    parts = {
        "step": f"step {row['step']:>{digits}}/{total_steps}",
        "loss": f"loss {_compact(row['loss'], decimals=4)}",
        "lr": f"lr {row['lr']:.1e}",
        "grad": f"grad {_compact(row['grad_norm'], decimals=2)}",
        "speed": f"{human(row['tokens_per_second'], digits=3):>5} tok/s",
        "mfu": f"MFU {row['mfu']:.0%}" if shows_mfu and row["mfu"] is not None else "",
        "memory": f"{memory.kind} {memory.gigabytes()} GB" if memory.peak_bytes else "",
        "left": "" if left is None else format_left(left),
    }
    for name in ("", *DISPENSABLE):
        parts.pop(name, None)
        line = "  ".join(filter(None, parts.values()))
        if len(line) <= WIDTH:
            break
    return line


def format_left(left: Left) -> str:
    """Format the remaining time; ">" says that something still ahead has not been measured."""
    return f"{'' if left.is_complete else '>'}{human_time(left.seconds)} left"


def _compact(number: float, *, decimals: int) -> str:
    """Format a number in about `decimals` + 2 characters."""
    magnitude = abs(number)
    if not magnitude < 1000:  # also NaN and infinity
        return f"{number:.1e}"
    return f"{number:.{max(0, decimals - (magnitude >= 10) - (magnitude >= 100))}f}"


def format_sample(sample: dict[str, str], *, step: int) -> str:
    """Format a sample as two blocks of text, the prompt and what the model wrote after it."""
    lines = [f"sample at step {step:,}"]
    for label, name in (("prompt", "prompt"), ("model", "text")):
        wrapped = _text_lines(sample[name], WIDTH - 11)
        if (hidden := len(wrapped) - MOST_LINES) > 0:
            wrapped[MOST_LINES:] = [f"({plural(hidden, 'more line')} in samples.jsonl)"]
        lines += [f"  {'' if i else label:<6} | {line}" for i, line in enumerate(wrapped)]
    return "\n".join(lines)


def _text_lines(text: str, width: int) -> list[str]:
    """Split text into printable lines of at most `width` characters, at its own newlines first."""
    lines = []
    for line in text.split("\n"):
        printable = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode()
            for c in line.expandtabs(4)
        )
        lines += textwrap.wrap(
            printable, width, drop_whitespace=False, replace_whitespace=False, expand_tabs=False
        ) or [""]
    return lines


def fill(text: str, *, indent: int = 4) -> str:
    """Break a message into lines of at most `WIDTH` characters, the later ones indented.

    White space stays as it is, and so do words that are longer, such as paths.
    """
    return textwrap.fill(
        text,
        WIDTH,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
