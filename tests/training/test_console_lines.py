"""What a run prints while it trains: lines that fit, and samples that read as text."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.training.console_lines import WIDTH, fill, format_sample, format_step
from pretrain_lib.training.measurements import Left, Memory

ROW = {"step": 40, "loss": 6.8312, "lr": 1.9e-3, "grad_norm": 0.914}
ROW |= {"tokens_per_second": 12345.6, "mfu": 0.412}
numbers = st.floats(min_value=0) | st.just(math.nan)


def step_line(row=ROW, total_steps=1220, left=None, memory=None, shows_mfu=False):
    memory = memory or Memory("RAM", 420_000_000)
    return format_step(row, total_steps=total_steps, memory=memory, left=left, shows_mfu=shows_mfu)


def test_a_step_line_needs_no_legend():
    expected = "step   40/1220  loss 6.8312  lr 1.9e-03  grad 0.91  12.3K tok/s  RAM 0.42 GB"
    assert step_line() == expected
    assert step_line(left=Left(192, is_complete=True)) == f"{expected}  3m12s left"
    assert step_line(left=Left(192, is_complete=False)) == f"{expected}  >3m12s left"
    assert "12.3K tok/s  MFU 41%  RAM" in step_line(shows_mfu=True)
    assert "MFU" not in step_line(ROW | {"mfu": None}, shows_mfu=True)
    assert "RAM" not in step_line(memory=Memory("RAM", 0))


def test_a_full_recipe_on_a_gpu_loses_nothing():
    row = ROW | {"step": 10_000, "loss": 3.2831, "tokens_per_second": 1_234_567.0}
    memory, left = Memory("GPU", 78_400_000_000), Left(5400, is_complete=True)
    line = step_line(row, 19_073, left, memory, shows_mfu=True)
    assert line.endswith("1.23M tok/s  MFU 41%  GPU 78.4 GB  1h30m left") and "lr" in line
    assert len(line) <= WIDTH


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(1, 10**10),
    part=st.floats(0, 1),
    values=st.tuples(numbers, numbers, numbers, st.floats(min_value=1e-9, max_value=1e30)),
    mfu=st.none() | st.floats(0, 100),
    memory=st.integers(0, 10**15),
    left=st.none() | st.builds(Left, st.floats(0, 1e10), st.booleans()),
)
def test_no_step_line_is_longer_than_the_screen(total, part, values, mfu, memory, left):
    loss, rate, norm, speed = values
    row = {"step": round(total * part), "loss": loss, "lr": rate, "grad_norm": norm, "mfu": mfu}
    row["tokens_per_second"] = speed
    line = step_line(row, total, left, Memory("GPU", memory), shows_mfu=True)
    assert len(line) <= WIDTH and line.isascii() and "\n" not in line
    assert line.startswith("step ") and "loss" in line and "tok/s" in line
    assert left is None or line.endswith(" left")


def test_a_sample_is_shown_as_text():
    sample = {"prompt": "def ", "text": "add(a, b):\n\treturn a + b\r\n\nprint('\x1b[2J')"}
    assert format_sample(sample, step=1000).split("\n") == [
        "sample at step 1,000",
        "  prompt | def ",
        "  model  | add(a, b):",
        r"         |     return a + b\r",
        "         | ",
        "         | print('\\x1b[2J')",
    ]


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(), text=st.text(max_size=3000))
def test_every_sample_fits_the_screen(prompt, text):
    lines = format_sample({"prompt": prompt, "text": text}, step=1).split("\n")
    assert all(len(line) <= WIDTH and line.isprintable() for line in lines)
    assert len(lines) <= 51


def test_a_long_sample_says_how_much_is_left_out():
    lines = format_sample({"prompt": "a", "text": "line\n" * 24}, step=1).split("\n")
    assert lines[-1].endswith("| (1 more line in samples.jsonl)")


def test_messages_are_broken_at_words_but_for_paths():
    path = "/a/very" * 20
    lines = fill(f"the file that could not be written is {path} on this disk").split("\n")
    assert lines == ["the file that could not be written is", f"    {path}", "    on this disk"]
