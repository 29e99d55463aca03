"""The loop: what it writes, when it stops, and that a resumed run is the run."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from pretrain_lib import (
    GPT2,
    Job,
    open_corpus,
    prepare,
    start_accelerator,
    train,
    verify_checkpoint,
)
from pretrain_lib.checkpoint.state import read_state
from pretrain_lib.config.units import TokenCount
from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.evaluate.local_tasks import write_local_tasks
from pretrain_lib.run_folder.status import write_status
from pretrain_lib.training import evaluation
from tests.conftest import change, read_rows

pytestmark = pytest.mark.moderate


def run(config, *, seed=None):
    corpus = open_corpus(config)
    model = GPT2(config.model).initialize(config.run.seed if seed is None else seed)
    train(config, model, corpus, start_accelerator(config))
    return model


def status(config):
    return json.loads((Path(config.run.dir) / "status.json").read_text())


def checkpoints(config):
    return sorted(p.name for p in (Path(config.run.dir) / "checkpoints").iterdir())


def elsewhere(config, folder):
    return change(config, run={"dir": str(folder)})


def test_a_run_learns_and_leaves_all_its_files(recipe):
    model = run(recipe)
    rows = read_rows(recipe.run.dir, clock=True)
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in trained] == list(range(1, 9))
    assert [row["tokens"] for row in trained] == [256 * step for step in range(1, 9)]
    assert [row["lr"] for row in trained] == [recipe.learning_rate()(step) for step in range(8)]
    assert trained[0]["loss"] == pytest.approx(6.24, abs=0.1)  # ln 512, nothing learned
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.5
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] > 0 for row in trained)
    validated = [row for row in rows if row["kind"] == "validation"]
    assert [row["step"] for row in validated] == [0, 4, 8]
    assert all(row["bits_per_byte"] > 0 for row in validated)
    assert checkpoints(recipe) == ["step-00000003", "step-00000006", "step-00000008"]
    samples = (Path(recipe.run.dir) / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [4, 8]
    assert status(recipe) == {"state": "done", "step": 8, "reason": "step 8 is reached"}
    written = yaml.safe_load((Path(recipe.run.dir) / "config.yaml").read_text())
    expected = recipe.with_text(0).to_dict()  # with the length of its warm-up in tokens
    expected["data"]["validation"] = "hash:0.1"  # the rule that the data were prepared with
    assert written == expected
    manifest = json.loads((Path(recipe.run.dir) / "manifest.json").read_text())
    assert manifest["config"] == expected
    assert manifest["versions"]["torch"] == torch.__version__
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_resumed_from_any_checkpoint_is_bit_equal(recipe, tmp_path, step):
    whole = run(recipe)
    resumed = elsewhere(recipe, tmp_path / "resumed")
    shutil.copytree(recipe.run.dir, resumed.run.dir)
    for path in (Path(resumed.run.dir) / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    again = run(resumed, seed=99)  # the weights come from the checkpoint
    assert read_rows(resumed.run.dir) == read_rows(recipe.run.dir)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    same = [Path(c.run.dir) / "samples.jsonl" for c in (recipe, resumed)]
    assert same[0].read_text() == same[1].read_text()


def test_samples_that_fail_end_a_run_only_once_it_is_saved(recipe, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no room for samples")

    monkeypatch.setattr("pretrain_lib.training.evaluation.sample_texts", fail)
    late = change(recipe, samples={"every": 5}, checkpoint={"every": None})
    with pytest.raises(RuntimeError, match="no room for samples"):
        run(late)
    assert checkpoints(late) == ["step-00000005"]
    monkeypatch.undo()
    run(late)
    assert status(late)["step"] == 8


def test_max_steps_stops_the_run_and_leaves_the_schedule(recipe, tmp_path):
    run(recipe)
    part = change(elsewhere(recipe, tmp_path / "part"), run={"max_steps": 5})
    run(part)
    assert status(part)["state"] == "done"
    assert status(part)["step"] == 5
    assert checkpoints(part)[-1] == "step-00000005"
    run(elsewhere(recipe, tmp_path / "part"))
    train_rows = [
        [row for row in read_rows(c.run.dir) if row["kind"] == "train"] for c in (recipe, part)
    ]
    assert train_rows[0] == train_rows[1]


def test_a_finished_run_says_so_and_changes_nothing(recipe, capsys):
    run(recipe)
    rows, names = read_rows(recipe.run.dir, clock=True), checkpoints(recipe)
    run(recipe)
    assert "done at step 8" in capsys.readouterr().out
    assert read_rows(recipe.run.dir, clock=True) == rows
    assert checkpoints(recipe) == names


def test_evaluation_and_samples_do_not_touch_the_training(recipe, tmp_path):
    dropout = change(recipe, model={"dropout": 0.2})
    run(dropout)
    quiet = change(
        elsewhere(dropout, tmp_path / "quiet"),
        data={"validation": "none"},
        samples={"prompts": []},
        checkpoint={"every": None},
    )
    run(quiet)
    rows = [[r for r in read_rows(c.run.dir) if r["kind"] == "train"] for c in (dropout, quiet)]
    assert rows[0] == rows[1]


def test_micro_batches_do_not_change_the_curve(recipe, tmp_path):
    run(recipe)
    other = change(elsewhere(recipe, tmp_path / "other"), batch={"micro_batch": 8})
    run(other)
    for one, two in zip(read_rows(recipe.run.dir), read_rows(other.run.dir), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-2)  # bf16 where the CPU has it


def test_a_ramp_consumes_what_it_says(recipe):
    ramp = {"ramp_from": TokenCount(64), "ramp_increment": TokenCount(64)}
    config = change(recipe, batch=ramp | {"ramp_tokens": TokenCount(768)})
    config = change(config, schedule={"warmup_tokens": TokenCount(0)})
    run(config)
    rows = [row for row in read_rows(config.run.dir) if row["kind"] == "train"]
    sizes = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *rows], rows, strict=False)]
    assert sizes[0] == 64
    assert sizes[-1] == 256
    assert sizes == sorted(sizes)
    assert [row["targets"] for row in rows] == sizes


def test_checkpoints_by_tokens(recipe):
    every = {"every": None, "every_tokens": TokenCount(700)}
    config = change(recipe, checkpoint={**every, "keep_last": 0})
    run(config)
    assert checkpoints(config) == [f"step-{step:08d}" for step in (3, 6, 8)]  # past 700, 1400


def test_document_masking_trains(recipe):
    config = change(recipe, data={"document_masking": True})
    run(config)
    rows = [row for row in read_rows(config.run.dir) if row["kind"] == "train"]
    assert any(row["targets"] < 256 for row in rows)  # those that lie in another document
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_other_settings_are_refused_on_resume_unless_named(recipe):
    run(change(recipe, run={"max_steps": 2}))
    faster = change(recipe, optimizer={"learning_rate": 2e-2})
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate was 0\.01, is 0\.02"):
        run(faster)
    with pytest.raises(ValueError, match=r"run\.seed was 1337, is 7"):
        run(change(recipe, run={"seed": 7}))
    run(change(faster, run={"allow_changes": ["optimizer.learning_rate"]}))
    assert status(faster)["step"] == 8


def test_a_fork_names_its_parent_and_may_change_the_schedule(recipe, tmp_path):
    run(change(recipe, run={"max_steps": 4}))
    parent = Path(recipe.run.dir) / "checkpoints" / "step-00000004"
    fork = change(
        recipe,
        optimizer={"learning_rate": 1e-3},
        run={"dir": str(tmp_path / "fork"), "resume": str(parent)},
    )
    run(fork)
    manifest = json.loads((tmp_path / "fork" / "manifest.json").read_text())
    assert manifest["parent"] == str(parent)
    rows = [r for r in read_rows(fork.run.dir) if r["kind"] == "train"]
    assert [r["step"] for r in rows] == [5, 6, 7, 8]
    state, _ = read_state(tmp_path / "fork" / "checkpoints" / "step-00000008")
    assert state.windows == 64


def test_gradients_that_stay_infinite_end_the_run_with_a_reason(recipe):
    config = change(recipe, stability={"max_skipped": 2})
    model = GPT2(config.model).initialize(0)
    with torch.no_grad():
        model.transformer["ln_f"].bias[0] = torch.inf
    with pytest.raises(FloatingPointError, match="2 updates in a row .* start anew: there is none"):
        train(config, model, open_corpus(config), start_accelerator(config))
    events = [row for row in read_rows(config.run.dir) if row["kind"] == "event"]
    assert [row["step"] for row in events] == [1, 2]


def test_the_clock_ends_a_run_with_a_checkpoint(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("PRETRAIN_LIB_STARTED", raising=False)
    long = change(
        recipe,
        schedule={"tokens": TokenCount(10**9)},
        run={"max_time": 4.0},
        checkpoint={"every": None},
    )
    run(long)
    assert status(long)["state"] == "resumable"
    assert "run.max_time" in status(long)["reason"]
    last = [row for row in read_rows(long.run.dir) if row["kind"] == "train"][-1]["step"]
    assert checkpoints(long) == [f"step-{last:08d}"]


def test_a_run_killed_before_its_first_checkpoint_has_no_row_twice(recipe, tmp_path):
    run(recipe)
    killed = elsewhere(recipe, tmp_path / "killed")
    shutil.copytree(recipe.run.dir, killed.run.dir)
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    write_status(tmp_path / "killed", "running", step=0)
    run(killed)
    assert read_rows(killed.run.dir) == read_rows(recipe.run.dir)


def test_a_fork_with_other_sequences_counts_its_tokens_on(recipe, tmp_path):
    run(change(recipe, run={"max_steps": 3}))
    parent = Path(recipe.run.dir) / "checkpoints" / "step-00000003"
    fork = change(
        recipe,
        batch={"sequence_length": 16},
        run={"dir": str(tmp_path / "fork"), "resume": str(parent)},
    )
    run(fork)
    rows = [row for row in read_rows(fork.run.dir) if row["kind"] == "train"]
    assert [row["tokens"] for row in rows] == [256 * step for step in range(4, 9)]


def test_a_run_whose_checkpoints_are_all_broken_does_not_start_anew(recipe):
    run(recipe)
    for path in (Path(recipe.run.dir) / "checkpoints").iterdir():
        (path / "config.json").write_text("{}")
    rows = read_rows(recipe.run.dir)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="3 checkpoints and none is"):
        run(recipe)
    assert read_rows(recipe.run.dir) == rows


def test_a_checkpoint_that_is_named_is_the_one_that_is_loaded(recipe, capsys):
    run(recipe)
    rows, own = read_rows(recipe.run.dir), Path(recipe.run.dir) / "checkpoints"
    with pytest.raises(ValueError, match="step-00000099 is not a whole checkpoint"):
        run(change(recipe, run={"resume": str(own / "step-00000099")}))
    run(change(recipe, run={"resume": str(own / "step-00000003")}))
    assert "resumed at step 3" in capsys.readouterr().out
    assert read_rows(recipe.run.dir) == rows


def test_bits_per_byte_are_those_of_the_text_that_was_evaluated(recipe):
    run(change(recipe, run={"max_steps": 0}))
    corpus = open_corpus(recipe)
    text = corpus.tokenizer.backend.decode(corpus.validation[0].tokens.read(1, 512).tolist())
    row = read_rows(recipe.run.dir)[0]
    expected = row["loss"] * 512 / math.log(2) / len(text.encode())
    assert row["bits_per_byte"] == pytest.approx(expected)


def test_a_row_is_the_mean_over_its_steps_also_across_a_resume(recipe, tmp_path):
    masked = change(recipe, data={"document_masking": True})  # uneven numbers of targets
    run(masked)
    steps = [row for row in read_rows(recipe.run.dir) if row["kind"] == "train"]
    coarse = change(elsewhere(masked, tmp_path / "coarse"), log={"every": 5}, run={"max_steps": 3})
    run(change(coarse, log={"every": 50}))
    run(change(coarse, run={"max_steps": None}))
    rows = [row for row in read_rows(coarse.run.dir) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [3, 5, 8]
    for row, part in zip(rows, (steps[:3], steps[3:5], steps[5:]), strict=True):
        targets = sum(step["targets"] for step in part)
        mean = sum(step["loss"] * step["targets"] for step in part) / targets
        assert row["targets"] == targets
        assert row["loss"] == pytest.approx(mean, rel=1e-9)


def test_a_row_that_was_begun_goes_on_after_a_kill(recipe, tmp_path):
    coarse = change(recipe, log={"every": 4})
    run(coarse)
    resumed = elsewhere(coarse, tmp_path / "resumed")
    shutil.copytree(recipe.run.dir, resumed.run.dir)
    for step in (6, 8):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-{step:08d}")
    run(resumed)  # from step 3, in the middle of the first row
    assert read_rows(resumed.run.dir) == read_rows(coarse.run.dir)


def test_the_best_so_far_survives_a_resume(recipe, tmp_path, capsys):
    rising = change(recipe, optimizer={"learning_rate": 3.0}, validation={"every": 2})
    parts = change(rising, run={"dir": str(tmp_path / "parts")})
    run(rising)
    run(change(parts, run={"max_steps": 5}))
    run(parts)
    validated = [row for row in read_rows(rising.run.dir) if row["kind"] == "validation"]
    best = min(validated, key=lambda row: row["loss"])
    assert best["step"] < 5  # so that it stands in the state alone
    for config in (rising, parts):
        state, _ = read_state(Path(config.run.dir, "checkpoints", "step-00000008"))
        assert (state.best_loss, state.best_step) == (best["loss"], best["step"])
    assert f"best {best['loss']:.4f} at step {best['step']}\n" in capsys.readouterr().out


def test_other_data_is_refused_on_resume_unless_named(recipe, tmp_path):
    (tmp_path / "other.txt").write_text(Path(json.__file__).read_text() * 9)
    tokenizer = Path(recipe.data.path, "tokenizer")
    job = Job((str(tmp_path / "other.txt"),), tokenizer=str(tokenizer), validation="none")
    prepare(job, tmp_path / "other", quiet=True)
    run(change(recipe, run={"max_steps": 3}))
    other = change(recipe, data={"path": str(tmp_path / "other"), "validation": "none"})
    with pytest.raises(ValueError, match=r"step-00000003 was made with other .*\(data was \w+, is"):
        run(other)
    run(change(other, run={"allow_changes": ["data"]}))
    state, _ = read_state(Path(recipe.run.dir, "checkpoints", "step-00000008"))
    assert state.windows == 5 * 8  # counted anew, in the other text


def test_names_in_the_list_of_files_cannot_leave_the_checkpoint(recipe, tmp_path):
    run(change(recipe, run={"max_steps": 1}))
    (path,) = Path(recipe.run.dir, "checkpoints").iterdir()
    (tmp_path / "run" / "checkpoints" / "outside").write_text("outside")
    listed = json.loads((path / "training" / "files.json").read_text())
    for name in ("../outside", str(tmp_path / "run" / "checkpoints" / "outside")):
        changed = listed | {name: {"bytes": 7, "xxh3_128": "0" * 32}}
        (path / "training" / "files.json").write_text(json.dumps(changed))
        assert verify_checkpoint(path) == [f"{path / name}: missing"]  # it was not looked at


def test_the_checkpoint_of_the_lowest_validation_loss_is_kept(recipe):
    """At so high a rate the loss soon rises, so the lowest is neither the first nor the last."""
    config = change(recipe, optimizer={"learning_rate": 0.3}, schedule={"kind": "constant"})
    config = change(config, validation={"every": 1}, samples={"every": 100})
    config = change(config, run={"max_steps": 6})
    run(change(config, checkpoint={"every": None, "keep_last": 1, "keep_best": "loss"}))
    losses = {r["step"]: r["loss"] for r in read_rows(recipe.run.dir) if r["kind"] == "validation"}
    best = min((step for step in losses if step), key=losses.get)
    assert 0 < best < 6
    assert checkpoints(recipe) == [f"step-{best:08d}", "step-00000006"]
    assert verify_checkpoint(Path(recipe.run.dir) / "checkpoints" / f"step-{best:08d}") == []


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "best_of"), [("acc", max), ("bits_per_byte", min)])
def test_the_checkpoint_of_the_best_score_is_kept(recipe, metric, best_of, prepared, tmp_path):
    sizes = {"context_characters": 60, "ending_characters": 20, "document_characters": 200}
    choice, perplexity = write_local_tasks(prepared, tmp_path / "tasks", items=8, **sizes)
    task = choice if metric == "acc" else perplexity
    scores = {"tasks": [task], "include_path": str(tmp_path / "tasks"), "every": 2}
    config = change(recipe, optimizer={"learning_rate": 0.3}, schedule={"kind": "constant"})
    config = change(config, scores=scores, samples={"every": 100}, validation={"every": 100})
    kept = {"every": None, "keep_last": 1, "keep_best": f"{task}/{metric}"}
    run(change(config, checkpoint=kept))
    rows = [row for row in read_rows(recipe.run.dir) if row["kind"] == "evaluation"]
    values = {row["step"]: row[f"{task}/{metric}"] for row in rows}
    assert list(values) == [0, 2, 4, 6, 8]
    best = best_of(values, key=values.get)  # the first of equal ones
    assert checkpoints(recipe) == sorted({f"step-{s:08d}" for s in (best, 8) if s})
    state, _ = read_state(Path(recipe.run.dir, "checkpoints", "step-00000008"))
    assert state.best_scores == {f"{task}/{metric}": [values[best], best]}


def test_a_first_validation_that_is_not_finite_is_not_the_best(recipe, monkeypatch):
    losses, real = [], evaluation.validate

    def first_is_nan(*arguments, **options):
        result = real(*arguments, **options)
        losses.append(result.loss if losses else math.nan)
        return dataclasses.replace(result, loss=losses[-1])

    monkeypatch.setattr(evaluation, "validate", first_is_nan)
    run(change(recipe, checkpoint={"every": None, "keep_best": "loss"}))
    state, _ = read_state(Path(recipe.run.dir, "checkpoints", "step-00000008"))
    assert math.isnan(losses[0])
    assert (state.best_loss, state.best_step) == (
        min(losses[1:]),
        4 * losses.index(min(losses[1:])),
    )


@pytest.mark.slow
def test_a_perplexity_that_overflows_is_null_and_not_the_best(recipe, prepared, tmp_path, capsys):
    """A word of 118 tokens has 736 nats at first, and fewer than the 709 of a float64 soon."""
    text, tokenizer = "self.", load_tokenizer(prepared / "tokenizer")
    while len(tokenizer.encode(text)) < 118:
        text += "self."
    sizes = {"context_characters": 60, "ending_characters": 20, "document_characters": 200}
    write_local_tasks(prepared, tmp_path / "tasks", items=4, **sizes)
    (tmp_path / "tasks" / "heldout_perplexity.jsonl").write_text(json.dumps({"text": text}) + "\n")
    scores = {"tasks": ["heldout_perplexity"], "include_path": str(tmp_path / "tasks"), "every": 4}
    name = "heldout_perplexity/word_perplexity"
    run(change(recipe, scores=scores, checkpoint={"every": None, "keep_best": name}))
    assert "scores at step 0, in " in (output := capsys.readouterr().out)
    assert f"{name} inf,\n" in output
    rows = [row for row in read_rows(recipe.run.dir) if row["kind"] == "evaluation"]
    values = [row[name] for row in rows]
    assert values[0] is None and rows[0]["heldout_perplexity/bits_per_byte"] > 0
    assert values[2] < values[1] < 1e308
    state, _ = read_state(Path(recipe.run.dir, "checkpoints", "step-00000008"))
    assert state.best_scores == {name: [values[2], 8]}


@pytest.mark.slow
def test_a_score_that_there_is_not_is_refused_before_training(recipe, prepared, tmp_path):
    sizes = {"context_characters": 60, "ending_characters": 20, "document_characters": 200}
    write_local_tasks(prepared, tmp_path / "tasks", items=4, **sizes)
    scores = {"tasks": ["heldout_choice"], "include_path": str(tmp_path / "tasks")}
    config = change(recipe, scores=scores, checkpoint={"keep_best": "heldout_choice/wrong"})
    with pytest.raises(
        ValueError, match="heldout_choice/wrong is no score, there are .*heldout_choice/acc"
    ):
        run(config)
    assert [row for row in read_rows(recipe.run.dir) if row["kind"] == "train"] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("true", "must be loss or a score TASK/METRIC"),
        ("hellaswag/acc", "is a score, but there are no scores.tasks"),
    ],
)
def test_what_cannot_be_best_is_refused(recipe, name, message):
    with pytest.raises(ValueError, match=f"checkpoint.keep_best={name} {message}"):
        change(recipe, checkpoint={"keep_best": name}).check(processes=1)


def test_a_run_goes_on_at_the_floor_after_its_schedule(recipe, capsys):
    schedule = {"tokens": TokenCount(4 * 256), "continue_at_floor": TokenCount(3 * 256)}
    config = change(recipe, schedule=schedule)
    run(config)
    trained = [row for row in read_rows(recipe.run.dir) if row["kind"] == "train"]
    floor = 0.1 * config.optimizer.learning_rate
    assert [row["lr"] for row in trained[4:]] == pytest.approx([floor] * 3)
    assert trained[3]["lr"] > floor
    shown = " ".join(capsys.readouterr().out.split())
    assert "schedule 7 steps" in shown
    assert "then 3 steps there" in shown


def test_a_module_that_train_cannot_take_is_refused_by_name(recipe):
    model = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"takes GPT2, .*, not Linear \(it has no config, options"):
        train(recipe, model, open_corpus(recipe), start_accelerator(recipe))
    assert not Path(recipe.run.dir, "checkpoints").exists()
