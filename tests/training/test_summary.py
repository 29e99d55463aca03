"""What a run prints at its start and at its end, and the warning of too many epochs."""

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from pretrain_lib import GPT2, open_corpus
from pretrain_lib.config.units import TokenCount
from pretrain_lib.corpus.corpus import build_dataset
from pretrain_lib.run_folder.folder import SCORES, read_status
from pretrain_lib.run_folder.metrics import human
from pretrain_lib.training import summary
from pretrain_lib.training.banner import banner
from pretrain_lib.training.failures import remark_on
from tests.conftest import change, read_rows
from tests.training.test_loop import run

pytestmark = pytest.mark.moderate


def table(output):
    """Return the rows of the table at the end of a run, by name."""
    found = re.findall(r"^  (\S.{16})(?: {1,2})(\S.*)$", output.split("\n\n", 1)[1], re.MULTILINE)
    return {name.strip(): text for name, text in found}


def test_a_run_ends_with_what_it_cost_and_where_all_lies(recipe, capsys):
    run(recipe)
    output, rows = capsys.readouterr().out, read_rows(recipe.run.dir, clock=True)
    folder, ended = recipe.run.dir, table(output)
    assert "done at step 8: the schedule is complete\n" in output
    assert ended["tokens"] == "2,048 in 8 steps"
    trained = [row for row in rows if row["kind"] == "train"]
    assert ended["training loss"] == f"{trained[0]['loss']:.4f} -> {trained[-1]['loss']:.4f}"
    validated = [row for row in rows if row["kind"] == "validation"]
    losses, bits = ([row[n] for row in validated] for n in ("loss", "bits_per_byte"))
    assert ended["validation loss"].startswith(f"{losses[0]:.4f} -> {losses[-1]:.4f}")
    assert ended["bits per byte"] == f"{bits[0]:.4f} -> {bits[-1]:.4f}"
    assert "of the rate of a large matrix product measured here" in ended["MFU"]
    assert ended["peak memory"].endswith(" GB of RAM")
    assert ended["checkpoint"].startswith(f"{folder}/checkpoints/step-00000008 ")
    assert ended["samples"] == f"{folder}/samples.jsonl"
    assert ended["next command"] == f"pretrain sample {folder} --prompt 'def '"
    assert all(row["peak_memory_bytes"] > 50e6 for row in trained)
    own = [line for line in output.splitlines() if folder not in line and "prepared" not in line]
    assert max(map(len, own)) <= 100
    for riddle in ("eta", "ppl", "1 x 1", "+256", "TFLOP/s taken", "1 steps", "1 tokens"):
        assert riddle not in output


def test_a_fork_tells_its_own_time_and_speed(recipe, tmp_path, capsys):
    run(change(recipe, run={"max_steps": 4}))
    fork = change(recipe, run={"dir": str(tmp_path / "fork"), "resume": recipe.run.dir})
    capsys.readouterr()
    run(fork)
    ended = table(capsys.readouterr().out)
    parent, own = read_rows(recipe.run.dir, clock=True), read_rows(fork.run.dir, clock=True)
    before, after = ([r for r in rows if r["kind"] == "train"][-1] for rows in (parent, own))
    tokens, seconds = (after[name] - before[name] for name in ("tokens", "seconds"))
    assert (before["step"], after["step"]) == (4, 8)
    assert ended["tokens"] == "2,048 in 8 steps"
    assert ended["training time"].endswith(", not counting evaluation, of the fork alone")
    assert ended["speed"] == f"{human(tokens / seconds, digits=3)} tokens/s"


def test_damaged_rows_leave_a_run_done_that_is_done(recipe, capsys):
    run(recipe)
    path, folder = Path(recipe.run.dir) / "metrics.jsonl", Path(recipe.run.dir)
    rows = path.read_bytes()
    path.write_bytes(rows.replace(b'"tokens"', b'"tokenr"', 1))
    with pytest.warns(UserWarning, match="metrics.jsonl, line 1 is damaged and is dropped"):
        run(recipe)
    assert read_status(folder)["state"] == "done"
    assert path.read_bytes() == b"".join(rows.splitlines(keepends=True)[1:])

    score = {"kind": "evaluation", "step": 8, "tokens": 2048, "task/acc": "high"}
    path.write_bytes(path.read_bytes() + json.dumps(score).encode() + b"\n")
    capsys.readouterr()
    run(recipe)
    assert read_status(folder)["state"] == "done"
    remarks = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert [remark.partition(":")[2][:29] for remark in remarks] == [
        " no summary of the run: Value"
    ]


def test_a_run_that_is_cut_short_says_how_it_goes_on(recipe, capsys):
    run(change(recipe, run={"max_steps": 7}))
    assert "done at step 7: run.max_steps=7 is reached, 1 step of" in capsys.readouterr().out
    run(recipe)
    output = capsys.readouterr().out
    assert "resumed at step 7 of 8, from the checkpoint\n" in output
    assert "changed since the checkpoint: run.max_steps was 7, is null" in output
    assert table(output)["tokens"] == "2,048 in 8 steps"  # of both parts
    run(recipe)
    assert "nothing left to do" in capsys.readouterr().out


def test_a_stop_says_so_at_once_and_how_to_go_on(recipe, capsys, monkeypatch):
    monkeypatch.delenv("PRETRAIN_LIB_STARTED", raising=False)
    run(change(recipe, run={"max_time": 1e-3}))
    output = capsys.readouterr().out
    assert "stopping after step 0: run.max_time=0.001s is used up\n" in output
    assert "stopped, resumable at step 0 of 8: run.max_time" in output
    assert "Start the same command again" in output
    assert "pretrain export" not in output


def begin_full(folder, *_, **__):
    """Begin a checkpoint on a disk without room for any."""
    raise OSError(errno.ENOSPC, "No space left on device", str(folder))


def test_a_run_without_any_checkpoint_does_not_say_that_it_goes_on(recipe, monkeypatch, capsys):
    monkeypatch.setattr("pretrain_lib.checkpoint.state._begin", begin_full)
    run(recipe)
    output = " ".join(capsys.readouterr().out.split())
    assert "stopped at step 8 of 8, without a checkpoint: step 8 is reached, but its" in output
    assert "The same command begins the run anew" in output
    assert "resumable at" not in output and "next command" not in output


def test_a_fork_without_any_checkpoint_begins_anew(recipe, tmp_path, capsys):
    run(change(recipe, run={"max_steps": 4}))
    parent = Path(recipe.run.dir) / "checkpoints" / "step-00000004"
    fork = change(recipe, run={"dir": str(tmp_path / "fork"), "resume": str(parent)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain_lib.checkpoint.state._begin", begin_full)
        run(fork)
    run(fork)
    output = capsys.readouterr().out
    assert output.count(f"resumed at step 4 of 8, from the checkpoint of {parent}") == 2
    assert "done at step 8: the schedule is complete\n" in output


def test_a_run_whose_last_checkpoint_failed_goes_on_from_the_one_before(recipe, capsys):
    with pytest.MonkeyPatch.context() as patch:

        def check(folder, needed):
            if any(folder.glob("step-00000006")):
                raise OSError(errno.ENOSPC, "No space left on device", str(folder))

        patch.setattr("pretrain_lib.checkpoint.state.check_free_space", check)
        run(recipe)
    output = " ".join(capsys.readouterr().out.split())
    assert "stopped, resumable at step 6 of 8: step 8 is reached, but its" in output
    run(recipe)
    assert "resumed at step 6 of 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "remark"),
    [(OSError(errno.ENOSPC, "full"), "make room"), (RuntimeError("peer reset"), "Started again,")],
)
def test_an_error_before_the_first_checkpoint_promises_none(error, remark, tmp_path):
    assert "the run begins anew: it has no checkpoint" in remark_on(error, tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    said = remark_on(error, tmp_path)
    assert remark in said and said.endswith("the run goes on from its newest checkpoint")


def test_scores_stand_beside_published_ones(recipe, capsys):
    class Ended:
        model, folder = GPT2(recipe.model), Path(recipe.run.dir)

    name = "hellaswag/acc_norm"
    rows = [
        {"kind": "evaluation", "step": step, "tokens": 0, name: value, f"{name}_stderr": 0.0045}
        for step, value in ((0, 0.25), (8, 0.29))
    ]
    ((label, _), (_, text)) = summary._scores(Ended, rows)
    assert (label, text) == (name, "0.2500 -> 0.2900 +- 0.0045; GPT-2 124M 0.3114")
    scores = Ended.folder / SCORES
    scores.mkdir(parents=True)
    (scores / "step-00000008.json").write_text(json.dumps({"n-shot": {"hellaswag": 10}}))
    assert "GPT-2" not in str(list(summary._scores(Ended, rows)))  # those are zero-shot
    assert list(summary._scores(Ended, [])) == []


def test_too_many_epochs_cannot_be_overlooked(recipe):
    def lines(tokens):
        config = change(recipe, schedule={"tokens": TokenCount(tokens)})
        corpus = open_corpus(config)
        with torch.device("meta"):
            model = GPT2(config.model)
        dataset = build_dataset(config, corpus)
        shown = "\n".join(banner(config, model, corpus, dataset, Accelerator(cpu=True)))
        assert all(len(line) <= 100 for line in shown.splitlines() if recipe.run.dir not in line)
        return len(corpus.train[0]), " ".join(shown.split())

    size, shown = lines(2048)
    assert "WARNING" not in shown and f"{size:,} tokens to train on" in shown
    assert "WARNING" not in lines(size * 39 // 10 // 256 * 256)[1]
    _, shown = lines(size * 1000 // 256 * 256)
    assert "WARNING 1,000 epochs planned: repeated data stops helping beyond about 4" in shown
    assert "https://arxiv.org/abs/2305.16264" in shown
    enough = int(re.search(r"--schedule.tokens (\d+) makes it 4", shown)[1])
    assert 3.9 < enough / size < 4.1
    assert "WARNING" not in lines(enough // 256 * 256)[1]
