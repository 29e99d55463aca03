"""Rows and lines: what is written, cut and shown."""

import json
import math

import pytest
from accelerate import Accelerator

from pretrain_lib.run_folder.metrics import (
    Metrics,
    drop_rows_after,
    format_train_row,
    human,
    human_time,
    perplexity,
)


def test_rows_after_the_checkpoint_and_torn_lines_go(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"kind": "train", "step": step, "loss": 1 / (step + 1)} for step in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    drop_rows_after(file, 3)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:4]
    drop_rows_after(tmp_path / "none.jsonl", 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_are_json_even_when_a_number_is_none(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", Accelerator(cpu=True), total_steps=3)
    metrics.write({"kind": "train", "step": 1, "tokens": 8, "loss": math.nan, "mfu": None})
    metrics.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"kind": "train", "step": 1, "tokens": 8, "loss": None, "mfu": None}


def OLD_LINE():
    row = {"step": 50, "tokens": 1_310_000, "loss": 2.0, "lr": 6e-4, "grad_norm": 0.5}
    row |= {"tokens_per_second": 1000.0, "mfu": 0.412}
    line = format_train_row(row, row_tokens=5000, step_tokens=1000, total_steps=200)
    for part in ("50/200", "25.0%", "loss 2.0000", "ppl 7.3891", "lr 6.00e-04", "norm 0.50"):
        assert part in line
    for part in ("+5K = 1.31M", "1K tok/s", "mfu 41.2%", "eta 2m30s"):
        assert part in line
    assert "mfu" not in format_train_row(
        row | {"mfu": None}, row_tokens=5000, step_tokens=1000, total_steps=200
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45s"), (130, "2m10s"), (3900, "1h05m"), (183_600, "2d03h")]
)
def test_times_are_readable(seconds, text):
    assert human_time(seconds) == text


def test_numbers_are_readable():
    assert [human(n) for n in (7, 1500, 1.31e6, 10e9, 4.5e12)] == [
        "7",
        "1.5K",
        "1.31M",
        "10B",
        "4.5T",
    ]
    assert perplexity(1e6) == math.inf
