"""The `pretrain` command as installed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pretrain_lib import GPT2, GPT2Config, load_tokenizer, save_pretrained, verify_checkpoint
from pretrain_lib.commands.cli import main
from pretrain_lib.commands.data import describe_prepared
from pretrain_lib.data.prepare.holdout import holds_out_nothing
from pretrain_lib.data.text.opening import open_source
from tests.conftest import change, run_command, run_pretrain, run_python
from tests.training.test_loop import run

pytestmark = pytest.mark.moderate


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_prepare_verify_inspect(tmp_path, capsys):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"Text {number} has a few words to learn. " * 5)
    out = tmp_path / "out"
    source = tmp_path.as_posix()
    flags = ["--train_tokenizer", "300", "--out", out, "--validation", "hash:0.2"]
    assert call("prepare", source, *flags) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^train +[\d,]+ tokens in \d+ documents$", shown, re.MULTILINE)
    command = f"pretrain train gpt2_124m --config quickstart.yaml --data.path {out}"
    assert shown.endswith(f"To train a small GPT-2 on it:\n  {command} --run.dir runs/out\n")
    assert "warning" not in shown
    assert call("verify", out) == 0
    assert call("inspect", out, "--sequence_length", "128", "--window", "3") == 0
    shown = capsys.readouterr().out
    assert "median" in shown
    assert "has a few words to learn" in shown
    shard = out / "train-00000-000.bin"
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    copy = shutil.copytree(out, tmp_path / "copy")
    raw[100] ^= 1
    (copy / shard.name).write_bytes(raw)
    for folders in ([out], [copy, out], [out, copy]):  # a damaged one hides no other
        assert call("verify", *folders) == 2
        captured = capsys.readouterr()
        assert str(shard) in captured.out
        assert (f"{copy}: every file is as it was written" in captured.out) == (len(folders) > 1)
        assert captured.err == f"error: {out}: 1 file is not what was written\n"


@pytest.mark.parametrize(
    ("rule", "known_before"), [("hash", True), ("none", False), ("hash:0.99", False)]
)
def test_prepare_says_when_nothing_is_held_out(tmp_path, capsys, monkeypatch, rule, known_before):
    (tmp_path / "a.txt").write_text("A text of a few words. " * 20)
    flags = ["--train_tokenizer", "300", "--validation", rule, "--out", tmp_path / "out"]
    if rule == "hash:0.99":  # as it is of text whose documents are not its files
        monkeypatch.setattr("pretrain_lib.data.prepare.groups.hash_fraction", lambda _: 1.0)
    assert call("prepare", tmp_path / "a.txt", *flags) == 0
    output, progress = capsys.readouterr()
    warning = f"warning: --validation {rule} holds out no text"
    assert (warning in progress.split("preparing")[0]) == known_before
    assert warning in output and "--validation first:TOKENS" in output
    assert re.search(r"^train +\d+ tokens in 1 document$", output, re.MULTILINE)
    command = f"pretrain train gpt2_124m --config quickstart.yaml --data.path {tmp_path}/out"
    assert output.endswith(f"  {command} --data.validation none --run.dir runs/out\n")
    assert all(len(line) <= 100 for line in output.splitlines() if str(tmp_path) not in line)


def test_prepare_knows_beforehand_that_a_text_is_held_out(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"Text {number}")
    sources = [open_source(str(tmp_path))]
    assert not holds_out_nothing(sources, "hash:0.2")
    assert holds_out_nothing(sources, "hash:1e-9")
    assert not holds_out_nothing(sources, "first:10")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    assert not holds_out_nothing([open_source(str(tmp_path))], "hash:1e-9")  # not known


def test_prepare_counts_what_it_leaves_out_and_stops_at_the_limit(tmp_path, capsys):
    lines = ['{"text": "some words"}', "broken", '{"text": "  "}', '{"text": 5}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines * 3))
    flags = ["--train_tokenizer", "300", "--validation", "none", "--out", tmp_path / "out"]
    assert call("prepare", tmp_path / "a.jsonl", *flags, "--max_rejected", "5") == 2
    error = capsys.readouterr().err
    assert "\nerror: 6 documents could not be read, more than --max_rejected 5" in error
    assert call("prepare", tmp_path / "a.jsonl", *flags) == 0
    shown = capsys.readouterr().out
    assert "3 empty documents, 6 unreadable" in shown
    assert f"{tmp_path}/a.jsonl, line at byte {len(lines[0]) + 1}" in shown
    assert "3 documents: not a JSON object in UTF-8; the first: " in shown


@pytest.mark.parametrize(
    ("tokens", "flags"),
    [(10**5, " --config quickstart.yaml"), (10**8, " --schedule.epochs 4"), (10**10, "")],
)
def test_the_command_that_trains_suits_the_size_of_the_text(tokens, flags):
    splits = {split: {"tokens": tokens, "documents": 9} for split in ("train", "validation")}
    left_out = {"empty": 0, "rejected": 0, "examples": []}
    manifest = {"splits": splits, "left_out": left_out, "vocabulary_size": 300, "fingerprint": ""}
    *_, command = describe_prepared(Path("data/mine"), manifest)
    assert command == f"  pretrain train gpt2_124m{flags} --data.path data/mine --run.dir runs/mine"


def test_prepare_hints_at_files_that_are_read_twice(tmp_path, capsys):
    source = tmp_path / "texts"
    source.mkdir()
    line = json.dumps({"text": "A few words. " * 9}) + "\n"
    (source / "a.jsonl").write_text(f"{line}{{}}\n[]\n")
    (source / "b.txt").write_text("Other words. " * 9)
    flags = ["--train_tokenizer", "300", "--validation", "none", "--out"]
    assert call("prepare", source, *flags, tmp_path / "1") == 0
    shown = capsys.readouterr()
    assert "hint:" not in shown.err
    place = f"{source}/a.jsonl, line at byte {len(line)}"
    assert shown.out.count(place) == shown.out.count(f"the first: {place}: b'{{}}'\n") == 1
    assert call("prepare", source, source / "b.txt", *flags, tmp_path / "2") == 0
    hint = f"hint: 1 file is read more than once (the first: {source}/b.txt); to give a text more"
    assert hint in capsys.readouterr().err
    (source / "c.jsonl").symlink_to("a.jsonl")
    assert call("prepare", source, *flags, tmp_path / "3") == 0
    assert f"(the first: {source}/a.jsonl and {source}/c.jsonl)" in capsys.readouterr().err


def test_prepare_hints_at_separators_and_takes_one(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one boat\n<|endoftext|>\ntwo balls\n<|endoftext|>\n")
    flags = [tmp_path / "a.txt", "--train_tokenizer", "300", "--validation", "none", "--out"]
    assert call("prepare", *flags, tmp_path / "one") == 0
    shown = capsys.readouterr()
    assert "a.txt has lines of <|endoftext|> but is read as one document" in shown.err
    assert "--document_separator '<|endoftext|>' splits it there" in shown.err
    assert "in 1 document\n" in shown.out
    separator = ["--document_separator", "<|endoftext|>"]
    assert call("prepare", *flags, tmp_path / "two", *separator) == 0
    shown = capsys.readouterr()
    assert "hint:" not in shown.err
    assert "in 2 documents\n" in shown.out
    (tmp_path / "a.txt").write_text("one boat<|endoftext|>two balls")
    assert call("prepare", *flags, tmp_path / "three", *separator) == 0
    shown = capsys.readouterr()
    assert "a.txt has <|endoftext|> within lines, but no line equals it" in shown.err
    assert "so that --document_separator '<|endoftext|>' does not split it there" in shown.err


def test_overlap_names_the_item_and_where_it_stands(tmp_path, capsys):
    words = [f"word{i}" for i in range(40)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    items = [{"text": " ".join(words[5:25])}, {"text": " ".join(reversed(words))}]
    rows = "\n".join(json.dumps(item) for item in items)
    (tmp_path / "items.jsonl").write_text(rows)
    flags = ["--items", tmp_path / "items.jsonl", "--out", tmp_path / "report.json"]
    assert call("overlap", tmp_path / "text.txt", *flags) == 0
    assert "50.00%" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "report.json").read_text())["files"][0]["overlaps"]
    assert (found["line"], found["ngrams"], found["overlapping_ngrams"]) == (1, 8, 8)
    assert call("overlap", tmp_path / "text.txt", "--items", tmp_path / "none.jsonl") == 2


@pytest.mark.slow
def test_export_sample_plot(recipe, tmp_path, capsys, forked_reload):
    run(recipe)
    capsys.readouterr()
    out = tmp_path / "export"
    assert call("export", recipe.run.dir, "--out", out) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000008"
    ours = load_file(checkpoint / "model.safetensors")
    exported = load_file(out / "model.safetensors")
    assert ours.keys() == exported.keys()
    assert all(torch.equal(ours[name], exported[name]) for name in ours)
    assert not (out / "training").exists()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "(curves.png)" in (out / "README.md").read_text()
    half = tmp_path / "half"
    assert call("export", checkpoint, "--out", half, "--dtype", "bfloat16") == 0
    model = AutoModelForCausalLM.from_pretrained(half)
    assert model.dtype == torch.bfloat16
    prompts = ["--prompt", "def ", "--prompt", "x = ", "--tokens", "5", "--count", "2"]
    printed = []
    capsys.readouterr()
    for seed in (1, 1, 2):
        assert call("sample", out, *prompts, "--seed", seed) == 0
        printed.append(capsys.readouterr().out)
    texts = printed[0].split("\n---\n")
    assert all(text.startswith("def ") for text in texts[:2])
    assert all(text.startswith("x = ") for text in texts[2:4])
    assert texts[4:] == [""] and printed[0] == printed[1] != printed[2]
    assert call("plot", recipe.run.dir) == 0
    assert (tmp_path / "run" / "plots" / "curves.png").stat().st_size > 10_000
    for taken in (tmp_path / "run", checkpoint):
        assert call("export", recipe.run.dir, "--out", taken) == 2
        assert "is neither empty nor an export: it holds" in capsys.readouterr().err
    assert verify_checkpoint(checkpoint) == []
    (checkpoint / "config.json").write_text("{}")
    assert call("export", checkpoint, "--out", tmp_path / "more") == 2
    assert "is not whole" in capsys.readouterr().err


def test_eval_gives_the_same_scores_with_either_model(prepared, tmp_path, capsys):
    model, tasks = GPT2(GPT2Config(512, 160, num_layers=1, num_heads=2, width=32)), tmp_path / "t"
    folder, tokenizer = tmp_path / "model", load_tokenizer(prepared / "tokenizer")
    save_pretrained(model.initialize(0), folder, tokenizer=tokenizer)
    assert call("tasks", prepared, "--out", tasks, "--items", "3") == 0
    capsys.readouterr()
    flags = ["--tasks", "heldout_choice", "--include_path", tasks, "--device", "cpu"]
    printed = []
    for more in ([], ["--harness"]):
        assert call("eval", folder, *flags, *more) == 0
        printed.append(capsys.readouterr().out.splitlines())
    assert "with our model" in printed[0][0] and "with lm-eval's own" in printed[1][0]
    assert printed[0][1:] == printed[1][1:] and "acc_mutual_info" in "".join(printed[0])


@pytest.mark.slow
def test_a_checkpoint_is_scored_as_the_installed_command_does(recipe, prepared, tmp_path):
    recipe = change(recipe, model={"context_length": 128})  # room for an ending
    run(recipe)
    tasks, out = tmp_path / "tasks", tmp_path / "scores.json"
    made = run_pretrain("tasks", prepared, "--out", tasks, "--items", "8")
    assert made.returncode == 0, made.stderr
    flags = ["--tasks", "heldout_choice", "--include_path", tasks, "--out", out]
    no_git = {"GIT_DIR": str(tmp_path / "none")}  # of which git complains on the console
    command = ["pretrain", "eval", recipe.run.dir, *flags, "--log_samples"]
    scored = run_command(*command, environment=no_git)
    assert scored.returncode == 0, scored.stderr
    assert scored.stderr == ""  # no progress bars where there is no terminal
    samples = (tmp_path / "samples_heldout_choice.jsonl").read_text().splitlines()
    assert len(samples) == 8
    score = json.loads(out.read_text())["results"]["heldout_choice"]
    assert f"{score['acc_mutual_info,none']:.4f}" in scored.stdout
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000008"
    model = f"pretrained={checkpoint},dtype=float32"
    plain = [Path(sys.executable).with_name("lm_eval"), "--model", "hf", "--model_args", model]
    plain += ["--tasks", "heldout_choice", "--include_path", tasks]
    assert run_python(*plain, "--output_path", tmp_path / "plain.json").returncode == 0
    theirs = json.loads(next(tmp_path.glob("plain_*.json")).read_text())
    assert theirs["results"]["heldout_choice"] == score


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{dir}"], "holds no manifest.json"),
        (["export", "{dir}", "--out", "{dir}/out"], "neither a model folder"),
        (["eval", "{dir}", "--tasks", "x"], "neither a model folder"),
        (["plot", "{dir}"], "metrics.jsonl"),
        (["prepare", "{dir}/no.txt", "--train_tokenizer", "300", "--out", "{dir}/o"], "no such"),
        (["prepare", "{dir}", "--out", "{dir}/out"], "exactly one of --tokenizer NAME"),
        (
            ["prepare", "x", "--train_tokenizer", "9", "--out", "{dir}/out"],
            "number of at least 257",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    assert call(*(a.format(dir=tmp_path) for a in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("verify {run}", "FOLDER"),
        ("inspect {run}", "PATH"),
        ("tasks {run} --out {run}/tasks", "FOLDER"),
    ],
)
def test_a_run_is_not_taken_for_data(command, named, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text('{"config": {}, "run_id": "0123"}')
    assert call(*command.format(run=tmp_path).split()) == 2
    said = f"error: {named} {tmp_path} is the folder of a run, not of prepared data; give"
    assert capsys.readouterr().err.startswith(said)


def test_an_abbreviated_flag_is_refused(capsys):
    assert call("prepare", "python-stdlib", "--train", "300", "--out", "x") == 2
    assert "--train" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(prepared):
    result = run_command(
        "bash", "-c", f"pretrain inspect {prepared} --sequence_length 20000 | head -1"
    )
    assert result.stdout.startswith("path")
    assert result.stderr == ""


def test_what_does_not_fit_on_the_disk_is_an_error_in_one_line(tmp_path):
    # Python itself would fail once more at its end, where it writes what is left.
    command = f"PYTHONUNBUFFERED= pretrain new gpt2_124m {tmp_path} > /dev/full"
    result = run_command("bash", "-c", command)
    assert result.returncode == 2
    assert result.stderr == "error: [Errno 28] No space left on device\n"


def test_a_text_is_prepared_though_nobody_reads_how_far_it_is(tmp_path, unread):
    (tmp_path / "text.txt").write_text("some words of a text\n" * 2000)
    program = Path(sys.executable).with_name("pretrain")
    words = [program, "prepare", tmp_path / "text.txt", "--train_tokenizer", "300"]
    words += ["--out", tmp_path / "out", "--workers", "1"]
    assert subprocess.run(words, stdout=unread, stderr=unread).returncode == 0
    assert (tmp_path / "out" / "manifest.json").is_file()
