"""Rows and lines: what is written, cut and shown."""

import io
import json
import math

import pytest
from accelerate import Accelerator

from pretrain_lib.run_folder.metrics import (
    Metrics,
    drop_rows_after,
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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_console_of_any_encoding_gets_every_text(tmp_path, monkeypatch, encoding):
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", written)
    metrics = Metrics(tmp_path / "metrics.jsonl", Accelerator(cpu=True), total_steps=3)
    metrics.say("caf\xe9 \u5b57 \ud800")  # the last one is half of a pair, in no encoding
    metrics.close()
    shown = written.buffer.getvalue().decode(encoding)
    expected = {"ascii": r"caf\xe9 \u5b57", "latin-1": "caf\xe9 \\u5b57", "utf-8": "caf\xe9 \u5b57"}
    assert shown == expected[encoding] + r" \ud800" + "\n"


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
    assert [human(n, digits=3) for n in (999.6, 12345, 999_999)] == ["1K", "12.3K", "1M"]
    assert perplexity(1e6) == math.inf
