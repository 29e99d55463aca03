"""The recipes as users start them: real processes, the real launcher, real signals."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
import yaml

from pretrain_lib import GPT2, Llama
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.models.flops import count_parameters
from pretrain_lib.models.hf_config import config_to_hf
from tests.conftest import (
    ROOT,
    forked_launchers,
    launch,
    read_rows,
    run_command,
    run_python,
    run_recipe_script,
    tiny_flags,
)
from tests.forks import forked_python

sys.path.insert(0, str(ROOT / "recipes"))
import gpt2_124m  # noqa: E402
import llama_1_3b  # noqa: E402
import presets  # noqa: E402
import qwen3_124m  # noqa: E402


def test_gpt2_is_the_published_recipe():
    recipe = gpt2_124m.RECIPE
    recipe.check(processes=8)
    schedule = recipe.learning_rate()
    assert (schedule.total_steps, schedule.warmup_steps) == (19_073, 715)
    assert schedule(0) == pytest.approx(8.3916e-07, rel=1e-4)
    assert (schedule(714), schedule(19_073)) == (6e-4, pytest.approx(6e-5))
    assert recipe.batch.tokens == 524_288
    with torch.device("meta"):
        assert count_parameters(GPT2(recipe.model)) == 124_439_808


def test_llama_is_the_published_recipe():
    recipe = llama_1_3b.RECIPE
    recipe.check(processes=8)
    schedule = recipe.learning_rate()
    assert (schedule.total_steps, schedule.warmup_steps) == (85_830, 128)
    with torch.device("meta"):
        assert count_parameters(Llama(recipe.model)) == 1_266_780_160


def test_qwen3_has_the_size_the_vocabulary_and_the_text_of_gpt2():
    recipe, gpt2 = qwen3_124m.RECIPE, gpt2_124m.RECIPE
    recipe.check(processes=8)
    with torch.device("meta"):
        model = Llama(recipe.model)
    assert count_parameters(model) == 123_552_768
    assert config_to_hf(recipe.model)["architectures"] == ["Qwen3ForCausalLM"]
    assert recipe.model.vocabulary_size == gpt2.model.vocabulary_size
    assert (recipe.data, recipe.batch) == (gpt2.data, gpt2.batch)


def test_the_fast_overlay_keeps_all_of_gpt2_but_optimizer_and_schedule():
    flags = ["--config", str(ROOT / "recipes" / "gpt2_124m_fast.yaml")]
    config, _ = parse_recipe(gpt2_124m.RECIPE, arguments=flags)
    config.check(processes=8)
    assert config.optimizer.kind == "muon"
    schedule = config.learning_rate()
    assert (schedule.total_steps, schedule.floor) == (9_536, 0)
    assert schedule.decay_steps == pytest.approx(0.6 * 9_536, abs=1)
    same = ("model", "data", "batch", "validation", "scores", "samples")
    assert all(getattr(config, s) == getattr(gpt2_124m.RECIPE, s) for s in same)


@pytest.mark.parametrize(
    ("recipe", "overlay", "steps", "rate"),
    [
        (gpt2_124m, "gpt2_5_epochs", 95_365, 1e-3),
        (gpt2_124m, "gpt2_t2048", 19_073, 6e-4),
        (llama_1_3b, "basic", 100_000, 1e-4),
    ],
)
def test_overlays_keep_what_they_promise(recipe, overlay, steps, rate):
    flags = ["--config", str(ROOT / "recipes" / f"{overlay}.yaml")]
    config, _ = parse_recipe(recipe.RECIPE, arguments=flags)
    config.check(processes=1)
    assert config.learning_rate().total_steps == steps
    assert config.optimizer.learning_rate == rate


def test_five_epochs_are_evaluated_and_sampled_as_at_their_source():
    flags = ["--config", str(ROOT / "recipes" / "gpt2_5_epochs.yaml")]
    config, _ = parse_recipe(gpt2_124m.RECIPE, arguments=flags)
    samples, batch = config.samples, config.batch
    assert samples.prompts == ["Hello, I am a language model"]
    assert (samples.per_prompt, samples.top_k, samples.every) == (5, 50, 250)
    assert samples.tokens == 32 - 7  # six words and a comma, a token each in GPT-2's vocabulary
    assert config.validation.tokens == 20 * batch.micro_batch * batch.sequence_length
    assert config.validation.every == 250


@pytest.mark.parametrize("name", presets.SIZES)
def test_every_size_is_one_flag(name):
    config, _ = parse_recipe(
        gpt2_124m.RECIPE, presets=presets.GPT2_PRESETS, arguments=["--preset", name]
    )
    config.check(processes=8)
    with torch.device("meta"):
        millions = count_parameters(GPT2(config.model)) / 1e6
    published = {"gpt2": 124, "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558}
    published |= {"gpt3-small": 125, "gpt3-medium": 350, "gpt3-large": 760, "gpt3-xl": 1300}
    published |= {"gpt3-2.7b": 2700, "gpt3-6.7b": 6700, "gpt3-13b": 13_000, "gpt3-175b": 175_000}
    assert millions == pytest.approx(published[name], rel=0.025)


@pytest.mark.parametrize("script", ["gpt2_124m", "llama_1_3b", "qwen3_124m"])
def test_print_config_shows_settings_that_are_read_again(script, tmp_path):
    result = run_recipe_script("--print_config", script=f"recipes/{script}.py")
    assert result.returncode == 0, result.stderr
    shown = yaml.safe_load(result.stdout)
    assert set(shown) >= {"model", "data", "batch", "optimizer", "schedule", "samples", "run"}
    file = tmp_path / "shown.yaml"
    file.write_text(result.stdout)
    again = run_recipe_script("--config", file, "--print_config", script=f"recipes/{script}.py")
    assert yaml.safe_load(again.stdout) == shown


def test_plan_costs_nothing():
    result = run_recipe_script("--plan")
    assert result.returncode == 0, result.stderr
    for figure in ("124,439,808", "524,288", "19,073", "855.2M", "741.9M"):
        assert figure in result.stdout


@pytest.mark.slow
def test_launched_killed_and_started_again_it_is_the_run_that_was_never_killed(prepared, tmp_path):
    flags = ["--checkpoint.every", "2", "--schedule.tokens", "6144"]
    whole = launch(*tiny_flags(prepared, tmp_path / "whole"), *flags)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "recipes/gpt2_124m.py"]
    command += [*tiny_flags(prepared, tmp_path / "killed"), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step  9/24"):
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = launch(*tiny_flags(prepared, tmp_path / "killed"), *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step" in resumed.stdout
    assert read_rows(tmp_path / "killed") == read_rows(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_75(prepared, tmp_path, number):
    command = [forked_python(), "recipes/gpt2_124m.py", *tiny_flags(prepared, tmp_path / "run")]
    command += ["--schedule.tokens", "1e9"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step") and int(line.split("/")[0].split()[1].replace(",", "")) == 5:
            process.send_signal(number)
    assert process.wait(300) == 75
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "resumable"
    assert signal.Signals(number).name in status["reason"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{status['step']:08d}").is_dir()


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(prepared, tmp_path):
    flags = ["--data.document_masking", "true"]
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    one = run_recipe_script(
        *tiny_flags(prepared, tmp_path / "one"), *flags, environment=environment
    )
    assert one.returncode == 0, one.stderr
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu_2proc.yaml"]
    command += ["--mixed_precision", "no", "recipes/gpt2_124m.py", "--system.processes", "2"]
    command += [*tiny_flags(prepared, tmp_path / "two"), *flags]
    two = run_command(*command, environment=forked_launchers())
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("done at step 8") == 1  # the other rank is quiet
    rows = [read_rows(tmp_path / name) for name in ("one", "two")]
    assert [r["kind"] for r in rows[0]] == [r["kind"] for r in rows[1]]
    for single, double in zip(*rows, strict=True):
        assert single["loss"] == pytest.approx(double["loss"], abs=1e-5)
        assert single["targets"] == double["targets"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "code", "state"),
    [("train", 1, "failed"), ("validation", 2, None)],  # whose first tokens are read at the start
)
def test_a_damaged_file_is_bad_input_until_training_has_begun(
    prepared, tmp_path, split, code, state
):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(prepared, data)
    (shard,) = data.glob(f"{split}-*.bin")
    shard.write_bytes(bytes(100) + shard.read_bytes()[100:])
    result = run_recipe_script(*tiny_flags(data, run))
    assert result.stderr.startswith("error: ") and shard.name in result.stderr
    status = json.loads((run / "status.json").read_text()) if run.exists() else {}
    assert (result.returncode, status.get("state")) == (code, state)


def test_a_world_that_was_not_asked_for_is_refused(prepared, tmp_path):
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--system.processes", "2"]
    result = run_recipe_script(*flags)
    assert result.returncode == 2
    assert "error: system.processes=2 but 1 run" in result.stderr
    assert not (tmp_path / "run").exists()


def test_bad_input_ends_with_one_line_and_exit_code_2(prepared, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty.txt").write_text("")
    (bad / "file").write_text("in the way")
    torch.arange(1000).numpy().astype("uint16").tofile(bad / "ids.bin")
    run = tmp_path / "run"
    base = tiny_flags(prepared, run)
    cases = {
        "there is no such file": ["--data.path", f"{bad}/missing.npy"],
        "is empty": ["--data.path", "null", "--data.source", f"{bad}/empty.txt"],
        "could not be loaded from the Hugging Face Hub": [
            *("--data.path", "null", "--data.source", "nobody/nothing"),
            *("--data.train_tokenizer", "512", "--data.tokenizer", "null"),
        ],
        "set model.vocabulary_size=1000": [
            *("--data.path", f"{bad}/ids.bin", "--data.validation", "none"),
        ],
        "nearest: 384": ["--batch.tokens", "400"],
        "log.trackers=['nothing']: nothing is not installed": ["--log.trackers", "[nothing]"],
        "--batch.toke": ["--batch.toke", "1"],
        "longer than model.context_length=32": ["--batch.sequence_length", "64"],
        "is not the tokenizer that": ["--data.tokenizer", f"{bad}/tokenizer.json"],
        "cannot be written": ["--run.dir", f"{bad}/file/run"],
        "is neither empty nor a run folder: it holds": [
            "--run.dir",
            str(bad),
            "--run.resume",
            "never",
        ],
        "is not a whole checkpoint": ["--run.resume", f"{bad}/nothing"],
    }
    from pretrain_lib import train_tokenizer

    train_tokenizer(["other text"], vocabulary_size=300).save(bad)
    script = "\n".join(
        [
            "import runpy, sys",
            "sys.path.insert(0, 'recipes')",
            f"for flags in {list(cases.values())!r}:",
            f"    sys.argv = ['recipes/gpt2_124m.py', *{base!r}, *flags]",
            "    try:",
            "        runpy.run_path('recipes/gpt2_124m.py', run_name='__main__')",
            "    except SystemExit as end:",
            "        print('exit', end.code, file=sys.stderr)",
        ]
    )
    result = run_python("-W", "ignore", "-c", script)
    errors = [part.strip() for part in result.stderr.split("exit 2") if part.strip()]
    assert len(errors) == len(cases), result.stderr
    for (expected, flags), error in zip(cases.items(), errors, strict=True):
        assert error.startswith("error: "), f"{flags}: {error}"
        assert expected in error, f"{flags}: {error}"
        assert "\n" not in error


@pytest.mark.slow
def test_a_run_folder_in_use_is_refused(prepared, tmp_path):
    command = [forked_python(), "recipes/gpt2_124m.py", *tiny_flags(prepared, tmp_path / "run")]
    command += ["--schedule.tokens", "1e9"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while "step 3/" not in " ".join(process.stdout.readline().split()):
            assert process.poll() is None
        second = run_command(*command)
        assert second.returncode == 2
        assert "is in use by another process" in second.stderr
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.stdout.read()


QUIET = ["--samples.prompts", "[]", "--scores.tasks", "[]"]


@pytest.mark.slow
def test_the_whole_gpt2_takes_a_real_step(prepared, tmp_path):
    flags = ["--data.path", prepared, "--run.dir", tmp_path / "run", "--run.max_steps", "1"]
    flags += ["--batch.tokens", "1024", "--batch.micro_batch", "1", *QUIET]
    flags += ["--validation.tokens", "1024", "--schedule.warmup_tokens", "1024"]
    flags += ["--model.vocabulary_size", "50257"]
    result = launch(*flags)
    assert result.returncode == 0, result.stderr
    assert "GPT2, 124,439,808 parameters" in result.stdout
    rows = [row for row in read_rows(tmp_path / "run") if row["kind"] == "validation"]
    assert rows[0]["loss"] == pytest.approx(11.0, abs=0.2)  # ln 50257 = 10.82
    assert rows[1]["loss"] < rows[0]["loss"] - 0.2


@pytest.mark.slow
def test_a_run_says_how_it_saves_time_and_memory_and_resumes(prepared, tmp_path):
    flags = tiny_flags(prepared, tmp_path / "run")
    flags += [
        "--system.compile",
        "true",
        "--system.activation_checkpointing",
        "full",
        "--optimizer.moments",
        "bf16",
    ]
    flags += ["--optimizer.z_loss", "1e-4"]
    first = run_recipe_script(*flags, "--run.max_steps", "3")
    assert first.returncode == 0, first.stderr
    assert "compiled blocks and loss (the first step waits for the compiler)" in first.stdout
    assert "activation checkpointing: full, moments in bf16, z-loss 0.0001" in first.stdout
    again = run_recipe_script(*flags)
    assert again.returncode == 0, again.stderr
    whole = run_recipe_script(*flags, "--run.dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    rows = [read_rows(folder) for folder in (tmp_path / "run", tmp_path / "whole")]
    both = [row for row in rows[0] if row["kind"] == "train"]
    assert both == [row for row in rows[1] if row["kind"] == "train"]


@pytest.mark.slow
def test_llama_at_its_full_width_takes_a_real_step(prepared, tmp_path):
    flags = ["--data.path", prepared, "--run.dir", tmp_path / "run", "--run.max_steps", "1"]
    flags += ["--model.num_layers", "1", "--model.vocabulary_size", "8192"]
    flags += ["--batch.tokens", "2048", "--batch.micro_batch", "1", *QUIET]
    flags += ["--validation.tokens", "2048", "--schedule.warmup_tokens", "2048"]
    flags += [
        "--optimizer.learning_rate",
        "1e-4",
    ]  # at the recipe's peak it may overshoot
    result = launch(*flags, script="recipes/llama_1_3b.py")
    assert result.returncode == 0, result.stderr
    rows = [row for row in read_rows(tmp_path / "run") if row["kind"] == "validation"]
    # ln 8192, and half the variance of the logits: 2048 products with weights of deviation 0.02
    assert rows[0]["loss"] == pytest.approx(9.01 + 2048 * 0.02**2 / 2, abs=0.3)
    assert rows[1]["loss"] < rows[0]["loss"] - 0.2


SECRETS = {"HF_TOKEN": "hf_" + "x" * 34, "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567"}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_trackers_get_the_rows(prepared, tmp_path, tracker):
    environment = {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        **SECRETS,
    }
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--log.trackers", f"[{tracker}]"]
    for part in (["--run.max_steps", "4"], []):  # resumed, it is the same run to a tracker
        result = run_recipe_script(*flags, *part, environment=environment)
        assert result.returncode == 0, result.stderr
    run_id = json.loads((tmp_path / "run" / "manifest.json").read_text())["run_id"]
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "run" / "pretrain_lib"))
        events.Reload()
        logged = [(e.step, e.value) for e in events.Scalars("train/loss")]
        rows = [row for row in read_rows(tmp_path / "run") if row["kind"] == "train"]
        assert logged == [(r["step"], pytest.approx(r["loss"], rel=1e-5)) for r in rows]
    elif tracker == "trackio":
        (database,) = (tmp_path / "trackio").glob("pretrain_lib*.db")
        with sqlite3.connect(database) as connection:
            names = connection.execute("SELECT DISTINCT run_name FROM metrics").fetchall()
        assert names == [(run_id,)]
    else:
        files = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
        assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    for path in (tmp_path / "run").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(secret.encode() in content for secret in SECRETS.values()), path


@pytest.mark.slow
def test_max_time_is_kept_save_included(prepared, tmp_path):
    started = time.monotonic()
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--schedule.tokens", "1e9"]
    result = run_recipe_script(*flags, "--run.max_time", "5s")
    assert result.returncode == 75, result.stderr
    assert time.monotonic() - started < 20
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "resumable"


def test_under_elastic_restarts_bad_input_does_not_restart(prepared, tmp_path):
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--system.processes", "7"]
    result = run_recipe_script(*flags, environment={"TORCHELASTIC_MAX_RESTARTS": "3"})
    assert result.returncode == 0
    assert "error: system.processes=7" in result.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "refused"


@pytest.mark.slow
def test_a_run_moves_between_one_process_and_two_with_the_same_curve(prepared, tmp_path):
    fp32 = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    whole = run_recipe_script(*tiny_flags(prepared, tmp_path / "whole"), environment=fp32)
    assert whole.returncode == 0, whole.stderr
    flags = tiny_flags(prepared, tmp_path / "moved")
    begun = run_recipe_script(*flags, "--run.max_steps", "2", environment=fp32)
    assert begun.returncode == 0, begun.stderr
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu_2proc.yaml"]
    command += ["--mixed_precision", "no", "recipes/gpt2_124m.py", "--run.max_steps", "5"]
    middle = run_command(*command, *flags, environment=forked_launchers())
    assert middle.returncode == 0, middle.stderr
    assert "changed since the checkpoint: processes was 1, is 2" in middle.stdout
    ended = run_recipe_script(*flags, environment=fp32)
    assert ended.returncode == 0, ended.stderr
    assert "changed since the checkpoint: processes was 2, is 1" in ended.stdout
    rows = [
        [row for row in read_rows(tmp_path / name) if row["kind"] == "train"]
        for name in ("whole", "moved")
    ]
    assert [row["step"] for row in rows[1]] == list(range(1, 9))
    for one, moved in zip(*rows, strict=True):
        assert one["targets"] == moved["targets"]
        assert one["loss"] == pytest.approx(moved["loss"], abs=1e-5)
    last = "checkpoints/step-00000008/training/state.json"
    states = [json.loads((tmp_path / name / last).read_text()) for name in ("whole", "moved")]
    assert states[0]["windows"] == states[1]["windows"]


@pytest.mark.slow
def test_a_misspelt_task_is_said_before_text_is_prepared(tmp_path):
    (tmp_path / "text.txt").write_text("word " * 100)
    data = ["--data.source", tmp_path / "text.txt", "--data.path", tmp_path / "out"]
    flags = [*data, "--data.tokenizer", "null", "--data.train_tokenizer", "300"]
    flags += ["--run.dir", tmp_path / "run", "--scores.tasks", "[hellaswagg]"]
    result = run_recipe_script(*flags)
    assert result.returncode == 2
    assert "scores.tasks=hellaswagg is not known to lm-eval" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
