"""The documentation says what the benchmarks measured, and each of them can be started."""

import json
import sys

import pytest

from pretrain_lib import GPT2, GPT2Config, save_pretrained, train_tokenizer
from tests.conftest import ROOT, forked_launchers, run_command, run_python

SCRIPTS = [path for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["table", "null_gpu_table"])
def test_the_tables_of_the_documentation_are_those_of_the_results(script):
    result = run_python(f"benchmarks/{script}.py", "--check")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_starts_and_explains_its_flags(script):
    result = run_python(script, "--help")
    assert result.returncode == 0 and "--" in result.stdout, result.stderr


@pytest.mark.slow
def test_scores_agree_with_the_command_line_of_lm_eval(tmp_path):
    text = (ROOT / "README.md").read_text()
    tokenizer = train_tokenizer([text], vocabulary_size=400)
    config = GPT2Config(400, context_length=128, num_layers=2, num_heads=2, width=32)
    save_pretrained(GPT2(config).initialize(0), tmp_path / "model", tokenizer=tokenizer)
    words = text.split()
    passages = [" ".join(words[n * 20 : n * 20 + 20]) for n in range(25)]
    item = {"activity_label": "Reading", "ctx_b": "", "label": "2", "endings": passages[5:9]}
    items = [item | {"ctx_a": passage} for passage in passages[:3]]
    for name, rows in {"items": items, "words": [{"text": text} for text in passages[9:]]}.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", tmp_path / "model", "--out", tmp_path / "out.json", "--items", "2"]
    flags += ["--hellaswag", tmp_path / "items", "--lambada", tmp_path / "words"]
    command = ["benchmarks/agreement.py", *flags, "--dtypes", "float32"]
    result = run_python(*command, environment=forked_launchers())
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["note"] for row in rows if row["name"] == "largest difference"] == [
        "2 items, 8 log-likelihoods",
        "2 items, 2 log-likelihoods",
        "2 items",
    ]
    assert all(row["met"] for row in rows if row["goal"])


ABSENT = ("datasets", "lm_eval", "orjson")  # on a machine lent for a GPU day
WITHOUT = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_bare_machine_and_names_what_it_left_out(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    check = run_command(
        sys.executable, "-c", "import orjson", environment={"PYTHONPATH": str(tmp_path)}
    )
    assert "No module named 'orjson'" in check.stderr
    flags = ["--tiny", "--no_tests", "--minutes", "0.4", "--out", tmp_path / "out"]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    command = [sys.executable, "benchmarks/gpu.py", *flags]
    result = run_command(*command, environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").open()]
    assert [row["stage"] for row in rows if row["stage"] not in result.stdout] == []
    ran = [row for row in rows if "left_out" not in row]
    assert ran and all(row["tokens_per_second"] > 0 for row in ran if "kernels" not in row), rows
    assert rows[-1]["left_out"] == "no time was left"


def test_scores_that_do_not_agree_miss_their_goals(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from agreement import compare

    def results(*nats: float, greedy: str) -> tuple[dict, dict]:
        endings = [" one", " longer"]
        sample = {
            "arguments": {str(n): {"arg_0": "a", "arg_1": text} for n, text in enumerate(endings)},
            "resps": [[[str(value), greedy]] for value in nats],
        }
        return {"task": {0: sample}}, {"task": {"acc,none": 0.0}}

    def missed(*arguments) -> list[str]:
        return [row.name for row in compare(*arguments) if row.met is False]

    # Per character -3.0 / 3 against -5.98 / 6: lm-eval's choice leads by 0.02 nats.
    theirs = results(-3.0, -5.98, greedy="False")
    assert missed("float32", theirs, theirs) == []
    assert missed("float32", results(-3.0, -5.9805, greedy="False"), theirs) == []
    changed = results(-2.98, -5.98, greedy="True")
    names = ["largest difference", "greedy flags that differ", "acc_norm: beyond the tolerance"]
    assert missed("float32", changed, theirs) == names
    assert missed("bfloat16", changed, theirs) == []
    # A tie to within the tolerance may be broken either way.
    assert (
        missed(
            "float32",
            results(-3.0, -6.0004, greedy="False"),
            results(-3.0, -5.9996, greedy="False"),
        )
        == []
    )
