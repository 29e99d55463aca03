"""The four ways in which people come to the library, with what each of them has to know.

A path is a script as its reader types it. What is counted are its commands, and its settings: the
flags that say something about data or run, and not where the result goes.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT, forked_launchers, run_pretrain
from tests.test_readme import EXAMPLE

FIRST_RUN = "make quickstart"
PARQUET = """
pretrain prepare texts/ --train_tokenizer 300 --out data/mine
pretrain train gpt2_124m --data.path data/mine --schedule.epochs 2
"""
TO = ("--out", "--run.dir")  # where results go
# What makes the GPT-2 124M of the path small enough for a test.
TINY = """
model: {num_layers: 1, num_heads: 2, width: 32, context_length: 32}
batch: {tokens: 256, micro_batch: 4, sequence_length: 32}
validation: {tokens: 1024}
samples: {tokens: 4}
"""


def commands(script):
    return [shlex.split(line) for line in script.strip().splitlines()]


def settings(script):
    words = [word for command in commands(script) for word in command]
    return [word for word in words if word.startswith("--") and word not in TO]


def test_a_first_run_is_one_command():
    assert FIRST_RUN in (ROOT / "README.md").read_text()
    assert len(commands(FIRST_RUN)) == 1 and settings(FIRST_RUN) == []
    expanded = subprocess.run(
        ["make", "--dry-run", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    steps = re.findall(r"bin/pretrain (\w+)", expanded.stdout)
    assert steps[:9] == ["train", "train", "tasks", "eval", "eval", "export", "plot", "report"] + [
        "sample"
    ]


@pytest.mark.slow
def test_parquet_on_one_gpu_is_two_commands_and_three_settings(tmp_path, monkeypatch):
    assert len(commands(PARQUET)) == 2
    assert len(settings(PARQUET)) == 3
    (tmp_path / "texts").mkdir()
    texts = [f"Text {n} speaks of the number {n}, {n + 1} and {n * n}." for n in range(2000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "texts" / "part.parquet")
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    environment = forked_launchers()
    for command in commands(PARQUET):
        small = ["--config", "tiny.yaml"] if command[1] == "train" else []
        done = subprocess.run(
            [environment["FORKS_CHILDREN"], Path(sys.executable).with_name("pretrain")]
            + [*command[1:], *small],
            env=os.environ | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert "vocabulary of 300 tokens" in done.stdout
    assert "done at step" in done.stdout
    shown = run_pretrain("sample", tmp_path / "runs" / "gpt2_124m", "--prompt", "Text")
    assert shown.stdout.startswith("Text")


def test_a_loop_of_ones_own_imports_it_in_twelve_lines():
    statements = re.sub(r"\(\n\s+(.*?)\n\)", r"(\1)", EXAMPLE)  # lines as formatted to a width
    lines = [line for line in statements.splitlines() if line.strip()]
    assert len(lines) <= 12


def test_the_comparison_is_one_page():
    page = (ROOT / "docs" / "comparison.md").read_text()
    assert "docs/comparison.md" in (ROOT / "README.md").read_text()
    assert len(page.splitlines()) <= 60
    for name in ("nanoGPT", "litgpt", "run_clm"):
        assert name in page
