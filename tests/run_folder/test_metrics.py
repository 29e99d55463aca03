"""Rows and lines: what is written, cut and shown."""

import io
import itertools
import json
import math

import pytest
from accelerate import Accelerator

from pretrain_lib.run_folder.cut import drop_rows_after
from pretrain_lib.run_folder.folder import STATUS, read_status, was_begun_here, write_status
from pretrain_lib.run_folder.metrics import (
    Metrics,
    human,
    human_time,
    perplexity,
)
from pretrain_lib.run_folder.rows import read_rows


def test_rows_after_the_checkpoint_and_torn_lines_go(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"kind": "train", "step": s, "tokens": s, "loss": 1 / (s + 1)} for s in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    drop_rows_after(file, 3)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:4]
    drop_rows_after(tmp_path / "none.jsonl", 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


DAMAGED = (b"\xff\xfe", b"null", b"[1]", b'{"kind": "train"}', b'{"step": null}', b"\0" * 40, b"")


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_row_is_named_and_the_others_stay(tmp_path, damage):
    file = tmp_path / "metrics.jsonl"
    row = {"kind": "train", "tokens": 1, "text": "\u2028"}
    rows = [json.dumps(row | {"step": step}) for step in range(4)]
    lines = [row.encode() for row in rows]
    file.write_bytes(b"\n".join([*lines[:2], damage, *lines[2:], b""]))
    with pytest.warns(UserWarning, match="metrics.jsonl, line 3 is damaged") as caught:
        drop_rows_after(file, 2)
    assert len(caught) == 1
    assert file.read_bytes() == b"".join(line + b"\n" for line in lines[:3])


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("metrics.jsonl", {"kind": "train", "step": 1, "tokens": 8, "loss": 2.5, "mfu": None}),
        ("metrics.jsonl", {"kind": "event", "step": 1, "tokens": 8, "event": "skipped"}),
        ("samples.jsonl", {"step": 1, "prompt": "a", "text": "b"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is damaged and is dropped")
def test_what_a_resume_keeps_of_a_row_with_a_flipped_bit_can_be_read(tmp_path, name, row):
    file, line = tmp_path / name, json.dumps(row).encode()
    dropped = 0
    for place, bit in itertools.product(range(len(line)), range(8)):
        damaged = bytearray(line)
        damaged[place] ^= 1 << bit
        file.write_bytes(bytes(damaged) + b"\n" + line + b"\n")
        drop_rows_after(file, 2)
        kept = read_rows(file)
        assert kept[-1] == row or b"\n" in damaged
        dropped += len(kept) == 1
    assert dropped > 4 * len(line)


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b"null", b"[]", b"\xff", b'{"state": "run'])
def test_a_damaged_status_counts_as_missing(tmp_path, damage):
    (tmp_path / STATUS).write_bytes(damage)
    with pytest.warns(UserWarning, match=STATUS):
        assert read_status(tmp_path) == {}
    with pytest.warns(UserWarning, match=STATUS):
        assert not was_begun_here(tmp_path)
    write_status(tmp_path, "running", step=3)
    assert read_status(tmp_path)["step"] == 3


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
