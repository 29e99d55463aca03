"""Odd input to the commands: one line that names flag or file, value and rule; nothing is made."""

import argparse
import contextlib
import json
import shutil

import pytest

from pretrain_lib import GPT2, GPT2Config, load_tokenizer, save_pretrained
from pretrain_lib.commands.cli import build_parser, main
from pretrain_lib.commands.flag_names import in_terms_of_flags
from pretrain_lib.values import Rule
from tests.conftest import VOCABULARY


def refuse(capsys, *arguments):
    """Return the one line that a command says before it ends with 2."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert end.value.code == 2, shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1, shown.err
    return shown.err.strip()


def entries(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def model(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = GPT2(GPT2Config(VOCABULARY, 32, num_layers=1, num_heads=2, width=32)).initialize(0)
    save_pretrained(model, folder, tokenizer=load_tokenizer(prepared / "tokenizer"))
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("eval {m} --tasks x --limit 0", "--limit 0 must be a whole number of at least 1"),
        (
            "eval {m} --tasks x --device banana",
            "--device banana must be a device such as cpu, ",
        ),
        ("eval {m} --tasks x --device cuda:99", "--device cuda:99 is not on this machine"),
        ("eval {m} --tasks x --dtype float23", "did you mean float32?"),
        ("eval {m} --tasks x --limt 3", "there is no flag --limt; did you mean --limit?"),
        ("eval {m} --tasks x --include_path {m}/no", "--include_path {m}/no is not a folder"),
        ("eval {m} --tasks x --out {m}", "--out {m} is a folder: give the path of a file"),
        ("sample {m} --prompt a --temperature nan", "--temperature nan must be 0, or a number of"),
        ("sample {m} --prompt a --temperature 1e-40", "--temperature 1e-40 must be 0, or a number"),
        ("sample {m} --prompt a --top_p 0", "--top_p 0 must be a number above 0 and at most 1"),
        ("sample {m} --prompt a --top_p -inf", "--top_p -inf must be a number above 0"),
        ("inspect {m} --sequence_length 0", "--sequence_length 0 must be a whole number of at"),
        ("inspect {m} --tokens 1e30", "--tokens 1e30 must be a number of tokens of at least 1 and"),
        ("overlap {m} --items x --workers -1", "--workers -1 must be a whole number of at least 1"),
        (
            "export {m} --out {m}/o --max_shard_size 2gb",
            "2gb must be a size of at least 1",
        ),
        ("prepare {m}/no.txt --tokenizer {m} --out {m}/o", "SOURCE {m}/no.txt: there is no such"),
        (
            "prepare python-stdlib --tokenizer {m} --out {m}/config.json",
            "--out {m}/config.json is a file: give the path of a folder",
        ),
        (
            "prepare python-stdlib --tokenizer {m} --out {m}/config.json/o",
            "--out {m}/config.json/o cannot be written: {m}/config.json is a file",
        ),
        (
            "prepare python-stdlib --tokenizer {m} --validation half --out {m}/o",
            "--validation half must be hash",
        ),
        ("verify s3://b/p", "FOLDER s3://b/p must be a local path; copy files from or to a URL"),
        ("tasks s3://b/p --out {m}/o", "FOLDER s3://b/p must be a local path; copy files"),
        ("sample hf://b/p --prompt a", "FOLDER hf://b/p must be a local path; copy files"),
        ("eval s3://b/p --tasks x", "FOLDER s3://b/p must be a local path; copy files"),
        ("export s3://b/p --out {m}/o", "CHECKPOINT s3://b/p must be a local path; copy files"),
        ("plot {m} s3://b/p", "RUN s3://b/p must be a local path; copy files"),
        ("report {m} s3://b/p", "RUN s3://b/p must be a local path; copy files"),
        (
            "export {m} --out {m}/o --scores {m}/config.json",
            "--scores {m}/config.json holds no lm-eval results",
        ),
        ("export {m} --out {m}", "--out {m} is the folder that is exported: give another one"),
        ("export {m} --out {m}/../{n}", "--out {m}/../{n} is the folder that is exported"),
        ("prepar x", "did you mean prepare?"),
        ("verify {m}", "FOLDER {m} holds no manifest.json"),
    ],
)
def test_it_is_refused_in_one_line(model, capsys, arguments, expected):
    before = entries(model)
    names = {"m": model, "n": model.name}
    words = arguments.format(**names).split()
    assert expected.format(**names) in refuse(capsys, *words)
    assert entries(model) == before


@pytest.mark.parametrize(
    "command",
    ["eval {m} --tasks x", "sample {m} --prompt a", "export {m} --out {m}/out"],
)
@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", b"{", "config.json is damaged, no JSON"),
        ("config.json", b"\xff\xfe", "config.json is damaged, no JSON"),
        ("config.json", b"[]", "config.json is damaged: it must hold a JSON object"),
        ("model.safetensors", None, "model.safetensors is broken or cut short"),
        ("model.safetensors", b"", "model.safetensors is broken or cut short"),
    ],
)
def test_a_broken_model_folder_is_named(model, tmp_path, capsys, command, file, content, expected):
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / file
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    before = entries(folder)
    assert expected in refuse(capsys, *command.format(m=folder).split())
    assert entries(folder) == before


@pytest.mark.parametrize("command", ["eval {m} --tasks x", "sample {m} --prompt a"])
def test_a_folder_without_tokenizer_is_named(model, tmp_path, capsys, command):
    folder = shutil.copytree(model, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    error = refuse(capsys, *command.format(m=folder).split())
    assert str(folder) in error and "tokenizer.json" in error


def rows(count):
    return [
        {"kind": "train", "step": n, "tokens": 8 * n, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0}
        | {"tokens_per_second": 9.0, "mfu": None, "seconds": 1.0 * n, "targets": 8}
        for n in range(1, count + 1)
    ]


def test_a_run_killed_in_mid_write_is_plotted_without_its_last_row(tmp_path, capsys):
    text = "".join(json.dumps(row) + "\n" for row in rows(5))
    (tmp_path / "metrics.jsonl").write_text(text[:-40])
    with pytest.raises(SystemExit) as end:
        main(["plot", str(tmp_path)])
    assert end.value.code == 0
    assert (tmp_path / "plots" / "curves.png").is_file()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("plot x --panels los", "--panels los must be some of loss, lr, grad_norm, speed, scores"),
        ("plot x --panels loss,", "--panels loss, must be names separated by commas"),
        ("plot x --x token", "--x token must be tokens, steps, flops or hours; did you mean"),
        ("report x y", "a report of 2 runs belongs to none of their folders: give --out"),
        ("report x --out y.htm", "--out y.htm must end in .html"),
        ("report x --watts 0", "--watts 0 must be a number above 0"),
        ("report x", "x is not a run folder"),
    ],
)
def test_what_plot_and_report_refuse(capsys, tmp_path, monkeypatch, command, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refuse(capsys, *command.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", [b'{"kind": "tr', b"5", b'{"kind": "train"}', b"\xff\0\0"])
def test_a_broken_row_is_named(tmp_path, capsys, broken):
    good = json.dumps(rows(1)[0]).encode()
    (tmp_path / "metrics.jsonl").write_bytes(good + b"\n" + broken + b"\n" + good + b"\n")
    assert f"{tmp_path}/metrics.jsonl, line 2" in refuse(capsys, "plot", tmp_path)
    assert not (tmp_path / "plots").exists()


def test_home_is_expanded_in_every_path(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"FOLDER {tmp_path}/data: there is no such folder" in refuse(capsys, "verify", "~/data")


def test_settings_are_called_by_their_flags():
    message = "data.path=x is bad, see --data.path=y and more.data.path=z"
    told = "--out x is bad, see --data.path=y and more.data.path=z"
    assert in_terms_of_flags(message, "prepare") == told


def test_the_names_of_files_stay_as_they_are():
    told = "--out runs/out=1/rep.txt must end in .html"
    assert in_terms_of_flags("out=runs/out=1/rep.txt must end in .html", "report") == told
    assert in_terms_of_flags("runs/x=1 is not a run folder", "plot").startswith("runs/x=1 ")
    assert in_terms_of_flags("data.path=a/data.path/b", "verify") == "FOLDER a/data.path/b"


def parsers():
    (commands,) = (a for a in build_parser()._actions if a.choices)
    return commands.choices


# What each command needs beside the flag that is tried; none of it is read before the flags are.
NEEDED = {
    "prepare": ["x", "--out", "o"],
    "verify": ["x"],
    "inspect": ["x"],
    "overlap": ["x", "--items", "i"],
    "tasks": ["x", "--out", "o"],
    "export": ["x", "--out", "o"],
    "eval": ["x", "--tasks", "t"],
    "sample": ["x", "--prompt", "p"],
    "plot": ["x"],
    "new": ["gpt2_124m", "o"],
    "train": ["gpt2_124m"],
    "tune": ["gpt2_124m", "--budget", "60"],
    "completion": ["bash"],
    "report": ["x"],
}
FLAGS = [
    (name, action.option_strings[0])
    for name, parser in parsers().items()
    for action in parser._actions
    if action.option_strings and action.nargs != 0 and action.dest != "prompt"
]


def test_every_command_is_tried():
    assert parsers().keys() == NEEDED.keys()
    assert len(FLAGS) > 40


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_values_that_no_flag_takes(command, flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (action,) = (a for a in parsers()[command]._actions if flag in a.option_strings)
    wrong = ["", " "]
    if "(a local path" in action.help:
        wrong += ["s3://bucket/file"]
    elif not any(word in action.help for word in ("(text", "(names")):
        wrong += ["nan", "inf", "-inf", "1e400", "-1", "x", "null", "[1]", "1" * 5000]
    if "a whole number" in action.help:
        wrong += ["1e30", "1.5", str(2**63)]
    needed = NEEDED[command]
    if flag in needed:
        needed = [word for i, word in enumerate(needed) if flag not in (word, needed[i - 1])]
    if flag == "--suite":
        needed = ["x"]
    for value in wrong:
        error = refuse(capsys, command, *needed, f"{flag}={value}")
        assert error.startswith(f"error: {flag} "), error
        assert "must be" in error
        assert len(error) < 400
    error = refuse(capsys, command, *needed, flag)
    assert error.startswith(f"error: {flag} expected ")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("command", NEEDED)
def test_what_a_command_needs_is_asked_for(command, capsys):
    assert "required" in refuse(capsys, command)


@pytest.mark.parametrize("command", NEEDED)
def test_help_tells_rule_and_default_of_each_flag(command, capsys):
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for action in parsers()[command]._actions:
        if action.nargs not in (0, argparse.REMAINDER):
            assert "(" in action.help
            assert " ".join(action.help.replace("%%", "%").split()) in shown


def test_a_number_is_read_as_python_reads_it():
    assert Rule(float).read("1e-4") == 1e-4
    assert Rule(int).read("1_000") == 1000


@pytest.mark.parametrize(
    ("command", "flag"), [("eval", "tasks"), ("overlap", "fields"), ("plot", "panels")]
)
def test_spaces_around_commas_do_not_count(command, flag):
    needed = [word for word in NEEDED[command] if word not in ("--tasks", "t")]
    for written in ("loss,lr", "loss, lr", " loss ,\tlr "):
        options = build_parser().parse_args([command, *needed, f"--{flag}", written])
        assert getattr(options, flag) == ["loss", "lr"]


def test_fields_that_no_item_has_are_named_with_their_flag(tmp_path, capsys):
    text, items = tmp_path / "text.txt", tmp_path / "items.jsonl"
    text.write_text("one two three")
    items.write_text(json.dumps({"ctx": "one two", "endings": ["three"]}))
    words = ["overlap", text, "--items", items, "--ngram", "2", "--fields"]
    assert "error: --fields context: " in refuse(capsys, *words, "ctx, context")


def test_a_value_may_begin_with_dashes():
    given = ["prepare", "x", "--out", "o", "--document_separator", "---"]
    assert build_parser().parse_args(given).document_separator == "---"
    with pytest.raises(ValueError, match="expected one argument"):
        build_parser().parse_args(["prepare", "x", "--document_separator", "--out", "o"])


def test_settings_are_called_by_their_flags_wherever_they_stand():
    told = {
        "no text in data.text_field='text'": "no text in --text_field 'text'",
        "train a tokenizer with --data.train_tokenizer N": "train a tokenizer with "
        "--train_tokenizer N",
        "a share (data.validation)": "a share (--validation)",
        "data.source: x is damaged": "SOURCE: x is damaged",
        "data.validations stay": "data.validations stay",
    }
    assert {text: in_terms_of_flags(text, "prepare") for text in told} == told
