"""Scores during training: those of the checkpoint as a folder, by any number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pretrain_lib import evaluate_folder
from pretrain_lib.evaluate.all_ranks import share
from pretrain_lib.evaluate.local_tasks import write_local_tasks
from tests.conftest import accelerate_script, change, launcher_environment, read_rows
from tests.distributed.test_sharding import SHARDED, command, flags_of
from tests.distributed.test_sharding import run as run_processes
from tests.forks import forked_python
from tests.models.test_models import SMALL
from tests.training.test_loop import elsewhere, run

pytestmark = pytest.mark.moderate

NAMES = ["heldout_choice", "heldout_perplexity"]
WRITING = "writing"  # has the model write, as a task of questions does


@pytest.fixture(scope="module")
def tasks(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    # Short ones, since the models of these tests see 32 tokens.
    sizes = {"context_characters": 40, "ending_characters": 12, "document_characters": 200}
    write_local_tasks(prepared, folder, items=12, **sizes)
    data = {"validation": str(folder / "heldout_choice.jsonl")}
    writing = {
        "task": WRITING,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data},
        "validation_split": "validation",
        "output_type": "generate_until",
        "doc_to_text": "context",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["zz"], "max_gen_toks": 8},
        "metric_list": [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
    }
    (folder / f"{WRITING}.yaml").write_text(yaml.safe_dump(writing))
    return folder


def scored(recipe, folder, **options):
    scores = {"tasks": NAMES, "include_path": str(folder), "every": 4, **options}
    return change(recipe, scores=scores)


def evaluations(folder):
    return [row for row in read_rows(folder) if row["kind"] == "evaluation"]


def test_scores_are_those_of_the_checkpoints_folder(recipe, tasks, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    run(scored(change(recipe, checkpoint={"every": 4}), tasks))
    rows = evaluations(recipe.run.dir)
    assert [row["step"] for row in rows] == [0, 4, 8]
    for row in rows[1:]:
        name = f"step-{row['step']:08d}"
        folder = Path(recipe.run.dir, "checkpoints", name)
        results = evaluate_folder(folder, NAMES, include_path=tasks, device="cpu", harness=True)
        expected = results["results"]["heldout_perplexity"]["bits_per_byte,none"]
        assert row["heldout_perplexity/bits_per_byte"] == pytest.approx(expected, rel=1e-5)
        for metric in ("acc", "acc_mutual_info"):
            expected = results["results"]["heldout_choice"][f"{metric},none"]
            assert row[f"heldout_choice/{metric}"] == expected, metric
        kept = json.loads(Path(recipe.run.dir, "scores", f"{name}.json").read_text())
        assert kept["results"].keys() == results["results"].keys()


def test_scoring_does_not_touch_the_training(recipe, tasks, tmp_path):
    dropout = change(recipe, model={"dropout": 0.2})
    run(scored(dropout, tasks, limit=3))
    run(elsewhere(dropout, tmp_path / "quiet"))
    rows = [
        [row for row in read_rows(folder) if row["kind"] != "evaluation"]
        for folder in (recipe.run.dir, tmp_path / "quiet")
    ]
    assert rows[0] == rows[1]


def test_tasks_that_cannot_be_had_are_refused_before_the_run(recipe, tasks):
    with pytest.raises(ValueError, match="tasks=nothing_such is known neither to lm-eval"):
        run(scored(recipe, tasks, tasks=["nothing_such"]))
    assert not Path(recipe.run.dir, "metrics.jsonl").exists()


def test_a_task_out_of_reach_is_said_with_the_way_to_do_without(recipe, tmp_path):
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: owner/name\ntest_split: test\n")
    with pytest.raises(ValueError, match=r"scores\.tasks=far: .* with --scores\.tasks '\[\]'"):
        run(scored(recipe, tmp_path, tasks=["far"]))


@pytest.mark.slow
def test_a_sharded_run_may_begin_with_scores(prepared, tasks, tmp_path):
    flags = flags_of(prepared, tmp_path, "--run.max_steps", "1", "--data.validation", "none")
    flags += ["--scores.tasks", "[heldout_choice]", "--scores.include_path", str(tasks)]
    said = run_processes(SHARDED, flags)
    assert [row["step"] for row in evaluations(tmp_path)] == [0, 1]
    assert "done at step 1" in said


FAILING = """
import os, runpy, sys
from pretrain_lib.evaluate import live_model
whole = live_model.score_endings

def score_endings(model, requests, *, batch_size):
    if os.environ["RANK"] == os.environ["FAILS"]:
        raise RuntimeError("no memory is left")
    return whole(model, requests, batch_size=batch_size)

live_model.score_endings = score_endings
sys.argv = sys.argv[1:]
sys.path.insert(0, "recipes")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["0", "1"])
def test_what_fails_on_one_process_is_said_and_waited_for_by_none(prepared, tasks, tmp_path, fails):
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    flags = flags_of(prepared, tmp_path / "run", "--run.max_steps", "1")
    flags += ["--scores.tasks", "[heldout_choice]", "--scores.include_path", str(tasks)]
    options = launcher_environment()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options["env"] |= {"PATH": path, "FAILS": fails}
    _, *rest = command([script, SHARDED[1]], flags)
    given = [forked_python(), accelerate_script(), *map(str, rest)]
    result = subprocess.run(given, **options, timeout=300)
    assert result.returncode == 1
    assert "no memory is left" in result.stderr


@pytest.mark.slow
def test_any_number_of_processes_scores_as_one_does(prepared, tasks, tmp_path):
    found = []
    for name, script, processes in (
        ("one", SHARDED[1:], 1),
        ("ddp", SHARDED[1:], 2),
        ("fsdp", SHARDED, 2),
    ):
        flags = flags_of(prepared, tmp_path / name, "--run.max_steps", "4")
        flags += ["--scores.tasks", f"[{','.join([*NAMES, WRITING])}]", "--scores.every", "4"]
        flags += ["--scores.include_path", str(tasks)]
        said = run_processes(script, flags, processes=processes)
        assert said.count("scores at step 4, in ") == 1
        found.append(evaluations(tmp_path / name))
    assert len(found[0]) == 2
    for one, *others in zip(*found, strict=True):
        for other in others:
            assert other.keys() == one.keys()
            numbers = [key for key, value in one.items() if isinstance(value, float)]
            assert len(numbers) > 4
            for key in numbers:
                assert other[key] == pytest.approx(one[key], rel=1e-4), key
        assert one["writing/chrf"] > 0


def test_every_request_is_scored_by_one_process_and_what_begins_alike_stays_together():
    requests = [([n % 5] * 9, [n]) for n in range(13)]
    live = SimpleNamespace(model=SimpleNamespace(config=SMALL["gpt2"]))
    shares = [share(live, "score", requests, process, 3) for process in range(3)]
    assert sorted(number for own in shares for number in own) == list(range(13))
    assert max(len(own) for own in shares) <= 6
    for own in shares:
        same = [n for n in range(13) if n % 5 in {number % 5 for number in own}]
        assert sorted(own) == same
