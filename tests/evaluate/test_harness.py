"""Scores of a folder: those that our own model gives by hand, and those of lm-eval's CLI."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api import metrics
from lm_eval.api.metrics import bootstrap_stderr, perplexity
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from pretrain_lib.data.text.tokenizer import Tokenizer, load_tokenizer
from pretrain_lib.evaluate.error_bars import safe_perplexities
from pretrain_lib.evaluate.harness import evaluate_folder, is_ours
from pretrain_lib.evaluate.results import format_line, format_table, write_results
from pretrain_lib.evaluate.tasks import open_tasks
from pretrain_lib.models.any_model import save_pretrained
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from tests.conftest import write_text_and_tasks
from tests.forks import forked_python

pytestmark = pytest.mark.moderate

ITEMS = 24
CONTEXT_LENGTH = 48  # shorter than some items and all documents, so truncation is covered


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with `tasks`, `model` and the prepared `data` that both come from."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = write_text_and_tasks(folder, items=ITEMS)
    save_pretrained(build(tokenizer), folder / "model", tokenizer=tokenizer)
    return folder


def build(tokenizer: Tokenizer) -> GPT2:
    config = GPT2Config(
        tokenizer.vocabulary_size, CONTEXT_LENGTH, num_layers=2, num_heads=2, width=32
    )
    model = GPT2(config)
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # or all endings would be nearly as likely
    return model.eval()


@pytest.fixture(scope="module")
def results(workplace) -> dict:
    return evaluate_folder(
        workplace / "model",
        ["heldout_choice", "heldout_perplexity"],
        include_path=workplace / "tasks",
        device="cpu",
        log_samples=True,
    )


@torch.no_grad()
def log_likelihood(model: GPT2, ids: list[int], num_scored: int) -> float:
    """Return the log-likelihood in nats of the last `num_scored` of `ids`."""
    logits = model(torch.tensor([ids[:-1]]))[0, :, : model.config.vocabulary_size]
    scores = logits.double().log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    return float(scores[-num_scored:].sum())


def read_rows(workplace: Path, task: str) -> list[dict]:
    text = (workplace / "tasks" / f"{task}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_choices_are_those_of_our_own_logits(workplace, results):
    tokenizer = load_tokenizer(workplace / "model")
    model, right, informed = build(tokenizer), 0, 0
    samples = sorted(results["samples"]["heldout_choice"], key=lambda sample: sample["doc_id"])
    rows = read_rows(workplace, "heldout_choice")
    longest = 0
    for row, sample in zip(rows, samples, strict=True):
        expected, alone = [], []
        for ending in row["choices"]:
            context = tokenizer.encode(row["context"])
            ids = tokenizer.encode(f"{row['context']} {ending}")
            longest = max(longest, len(ids))
            num_scored = len(ids) - len(context)
            expected.append(log_likelihood(model, ids[-CONTEXT_LENGTH - 1 :], num_scored))
            ids = tokenizer.encode(f" {ending}")  # lm-eval keeps the delimiter
            start = [tokenizer.end_of_text_id, *ids][-CONTEXT_LENGTH - 1 :]
            alone.append(log_likelihood(model, start, len(ids)))
        found = [response[0][0] for response in sample["resps"]]
        assert found == pytest.approx(expected + alone, abs=1e-3)
        right += int(np.argmax(expected)) == row["label"]
        informed += int(np.argmax(np.subtract(expected, alone))) == row["label"]
    assert longest > CONTEXT_LENGTH + 1
    scores = results["results"]["heldout_choice"]
    assert scores["acc,none"] == pytest.approx(right / ITEMS)
    assert scores["acc_mutual_info,none"] == pytest.approx(informed / ITEMS)


def test_bits_per_byte_is_that_of_our_own_logits(workplace, results):
    tokenizer = load_tokenizer(workplace / "model")
    model, nats, num_bytes, num_words = build(tokenizer), 0.0, 0, 0
    for row in read_rows(workplace, "heldout_perplexity"):
        ids = tokenizer.encode(row["text"])
        assert len(ids) > 2 * CONTEXT_LENGTH
        num_bytes += len(row["text"].encode())
        num_words += len(re.split(r"\s+", row["text"]))
        stream = [tokenizer.end_of_text_id, *ids]
        # Windows that do not overlap, but for the last, which sees as much as there is room for.
        for start in range(0, len(ids), CONTEXT_LENGTH):
            stop = min(start + CONTEXT_LENGTH, len(ids))
            window = stream[max(0, stop - CONTEXT_LENGTH) : stop + 1]
            nats -= log_likelihood(model, window, stop - start)
    scores = results["results"]["heldout_perplexity"]
    assert scores["bits_per_byte,none"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)
    assert scores["byte_perplexity,none"] == pytest.approx(math.exp(nats / num_bytes), rel=1e-5)
    assert scores["word_perplexity,none"] == pytest.approx(math.exp(nats / num_words), rel=1e-4)


@pytest.mark.slow
def test_results_of_the_harness_are_those_of_the_plain_command(workplace, tmp_path):
    results = evaluate_folder(
        workplace / "model",
        ["heldout_choice", "heldout_perplexity"],
        include_path=workplace / "tasks",
        device="cpu",
        log_samples=True,
        harness=True,
    )
    command = [forked_python(), "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={workplace / 'model'},dtype=float32"]
    command += ["--tasks", "heldout_choice,heldout_perplexity", "--batch_size", "8"]
    command += ["--include_path", str(workplace / "tasks")]
    command += ["--output_path", str(tmp_path / "cli"), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    theirs = json.loads(next(tmp_path.glob("cli/*/results_*.json")).read_text())

    write_results(results, tmp_path / "ours" / "results.json")
    ours = json.loads((tmp_path / "ours" / "results.json").read_text())
    assert ours.keys() == theirs.keys()
    for key in ("results", "versions", "n-shot", "n-samples", "task_hashes", "max_length"):
        assert ours[key] == theirs[key], key
    for task in ("heldout_choice", "heldout_perplexity"):
        path = next(tmp_path.glob(f"cli/*/samples_{task}_*.jsonl"))
        our_lines = (tmp_path / "ours" / f"samples_{task}.jsonl").read_text().splitlines()
        assert our_lines == path.read_text().splitlines()


def test_the_table_holds_every_score(results):
    lines = format_table(results).splitlines()
    assert lines[0].split() == ["task", "metric", "value", "stderr"]
    assert len({len(line) for line in lines}) == 1
    found = {tuple(line.split()[:2]): line.split()[2:] for line in lines[1:]}
    metrics = ["acc", "acc_mutual_info"], ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    tasks = ("heldout_choice", "heldout_perplexity")
    expected = [(t, m) for t, names in zip(tasks, metrics, strict=True) for m in names]
    assert sorted(found) == sorted(expected)
    scores = results["results"]["heldout_choice"]
    value, error = scores["acc,none"], scores["acc_stderr,none"]
    assert found["heldout_choice", "acc"] == [f"{value:.4f}", f"{error:.4f}"]
    assert error == pytest.approx(math.sqrt(value * (1 - value) / (ITEMS - 1)))


def test_random_numbers_go_on_as_if_nothing_had_been_scored(workplace):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    results = evaluate_folder(
        workplace / "model", ["heldout_c*"], include_path=workplace / "tasks", limit=2, device="cpu"
    )
    assert results["n-samples"]["heldout_choice"] == {"original": ITEMS, "effective": 2}
    assert "samples" not in results
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == states


def test_error_bars_are_drawn_in_this_process_and_in_silence(
    workplace, tmp_path, capfd, monkeypatch
):
    sentences = [row["context"] for row in read_rows(workplace, "heldout_choice")]
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    (tmp_path / "words.yaml").write_text(
        f"""
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' ' + text.split(' ')[-1]}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""
    )
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    monkeypatch.setattr("multiprocessing.Pool", None)  # to call it raises
    monkeypatch.chdir(tmp_path)  # which git knows nothing of
    results = evaluate_folder(
        workplace / "model", ["words"], include_path=tmp_path, device="cpu", log_samples=True
    )
    nats = np.array([sample["resps"][0][0][0] for sample in results["samples"]["words"]])
    scores = results["results"]["words"]
    assert scores["perplexity,none"] == pytest.approx(np.exp(-nats.mean()))
    written = capfd.readouterr()
    assert written.out == ""
    assert "fatal" not in written.err  # of git
    assert "DISABLE_MULTIPROC" not in os.environ
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    expected = bootstrap_stderr(perplexity, nats.tolist(), iters=100_000)
    assert scores["perplexity_stderr,none"] == pytest.approx(expected, rel=1e-9)
    value, error = scores["perplexity,none"], scores["perplexity_stderr,none"]
    assert format_line(results) == f"words/perplexity {value:,.0f} +- {error:,.0f}"


def test_a_perplexity_that_overflows_is_infinite():
    nats = [-300.0, -1200.0]
    with safe_perplexities():
        assert metrics.perplexity(nats) == metrics.weighted_perplexity([(-1e6, 3)]) == math.inf
        assert metrics.perplexity([-1.0, -4.0]) == math.exp(2.5)
        assert metrics.weighted_perplexity([(-6.0, 3), (-1.0, 1)]) == math.exp(7 / 4)
        error = metrics.bootstrap_stderr(metrics.perplexity, nats, iters=1000)
    assert not math.isfinite(error)
    scores = {"perplexity,none": math.inf, "perplexity_stderr,none": error}
    results = {"results": {"words": scores | {"acc,none": 0.5, "acc_stderr,none": 0.25}}}
    assert format_line(results) == "words/perplexity inf, words/acc 0.5000 +- 0.2500"
    with pytest.raises(OverflowError):
        metrics.perplexity(nats)  # without it, as before


def test_bfloat16_is_scored_with_a_float32_softmax(workplace, results):
    rounded = evaluate_folder(
        workplace / "model",
        ["heldout_choice"],
        include_path=workplace / "tasks",
        dtype="bfloat16",
        device="cpu",
        limit=4,
        log_samples=True,
    )
    assert rounded["config"]["model_dtype"] == torch.bfloat16
    found = [
        response[0][0] for s in rounded["samples"]["heldout_choice"] for response in s["resps"]
    ]
    exact = [
        response[0][0] for s in results["samples"]["heldout_choice"] for response in s["resps"]
    ]
    assert found == pytest.approx(exact[: len(found)], rel=0.05)
    assert any(score != float(torch.tensor(score).bfloat16()) for score in found)


def test_other_families_are_scored_by_the_harness(workplace, tmp_path):
    tokenizer = load_tokenizer(workplace / "model")
    sizes = {"vocab_size": tokenizer.vocabulary_size, "hidden_size": 16, "intermediate_size": 16}
    config = GPTNeoXConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert not is_ours(tmp_path) and is_ours(workplace / "model")
    scored = [
        evaluate_folder(
            folder, ["heldout_choice"], include_path=workplace / "tasks", limit=1, device="cpu"
        )
        for folder in (tmp_path, workplace / "model")
    ]
    assert [results["config"]["model"] for results in scored] == ["hf", "LiveModel"]


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a model folder: it has no config\.json"):
        evaluate_folder(tmp_path, ["heldout_choice"])


def test_a_broken_tokenizer_is_refused(workplace, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(workplace / "model", folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=f"^the tokenizer of {folder} cannot be loaded \\(KeyError"
    ):
        evaluate_folder(folder, ["heldout_choice"], include_path=workplace / "tasks")


def test_an_unknown_dtype_is_refused(workplace):
    with pytest.raises(ValueError, match="dtype=fp8 must be one of float32, bfloat16"):
        evaluate_folder(workplace / "model", ["heldout_choice"], dtype="fp8")


def test_a_missing_folder_of_tasks_is_refused(workplace, tmp_path):
    with pytest.raises(ValueError, match="is not a folder of task files"):
        evaluate_folder(workplace / "model", ["heldout_choice"], include_path=tmp_path / "none")


def test_paths_are_taken_as_text_and_one_task_is_no_list(tmp_path):
    with pytest.raises(ValueError, match="is not a model folder"):
        evaluate_folder(str(tmp_path), ["heldout_choice"])
    with pytest.raises(ValueError, match="include_path=.*nowhere is not a folder of task files"):
        open_tasks(["heldout_choice"], include_path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="tasks=heldout_choice must be a list, such as .heldout"):
        open_tasks("heldout_choice")


@pytest.mark.slow
def test_an_unknown_task_is_refused(workplace):
    for folder, reason in (
        (workplace / "tasks", f"known neither to lm-eval nor below include_path={workplace}/tasks"),
        (None, "not known to lm-eval, and there is no include_path"),
    ):
        with pytest.raises(ValueError, match=f"^tasks=nonsense is {reason}; `lm-eval ls tasks`"):
            evaluate_folder(workplace / "model", ["nonsense"], include_path=folder)


def test_data_out_of_reach_are_named(workplace, tmp_path):
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: owner/name\ntest_split: test\n")
    # In a process of its own, because the hub client reads the variable once.
    code = (
        "from pathlib import Path; from pretrain_lib.evaluate.harness import evaluate_folder\n"
        f"evaluate_folder(Path({str(workplace / 'model')!r}), ['far'], include_path=Path())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
    )
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ValueError: tasks=far: the data is neither in the cache nor in a local file"
    )
    assert "include_path" in last


def test_importing_it_does_not_import_lm_eval():
    code = (
        "import sys, pretrain_lib.evaluate.harness, pretrain_lib.evaluate.local_tasks\n"
        "sys.exit(bool({'lm_eval', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
