"""Checkpoints: model folders, exact, verified, never pickled."""

import errno
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain_lib import (
    GPT2,
    GPT2Config,
    Llama,
    LlamaConfig,
    build_adamw,
    find_newest,
    load_checkpoint,
    load_tokenizer,
    save_checkpoint,
    train_step,
    verify_checkpoint,
)
from pretrain_lib.checkpoint import folders
from pretrain_lib.checkpoint.folders import FILES, still_there
from pretrain_lib.checkpoint.state import TrainingState, read_state

GPT2_SHAPE = GPT2Config(vocabulary_size=61, context_length=8, num_layers=2, num_heads=2, width=16)
LLAMA_SHAPE = LlamaConfig(
    vocabulary_size=61,
    context_length=8,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    width=16,
    mlp_width=24,
)


def build(shape):
    model = GPT2(shape) if isinstance(shape, GPT2Config) else Llama(shape)
    return model.initialize(0)


def batch(seed):
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids[:, :-1], "targets": ids[:, 1:]}]


def steps(model, optimizer, numbers):
    accelerator = Accelerator(cpu=True)
    options = {"learning_rate": 1e-2, "max_grad_norm": 1.0, "seed": 0}
    return [train_step(accelerator, model, optimizer, batch(n), step=n, **options) for n in numbers]


def save(folder, step, model, optimizer, **options):
    state = TrainingState(step=step, windows=2 * step)
    options = {"tokenizer": None, "manifest": {"parent": None}} | options
    return save_checkpoint(folder, state, model, optimizer, **options)


@pytest.mark.parametrize("shape", [GPT2_SHAPE, LLAMA_SHAPE])
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(shape, tmp_path):
    model = build(shape)
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(3))
    path = save(tmp_path, 3, model, optimizer)
    expected = steps(model, optimizer, range(3, 6))
    again = build(shape)
    fresh = build_adamw(again, learning_rate=1e-2)
    load_checkpoint(path, again, fresh)
    assert steps(again, fresh, range(3, 6)) == expected
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    padding = again.head_weight[shape.vocabulary_size :]
    assert padding.numel() > 0
    assert not padding.any()  # the folder holds V rows; the rest comes back as zeros


@pytest.mark.parametrize("shape", [GPT2_SHAPE, LLAMA_SHAPE])
def test_a_checkpoint_is_a_folder_that_transformers_loads(shape, prepared, tmp_path):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    shape = type(shape)(**{**vars(shape), "vocabulary_size": tokenizer.vocabulary_size})
    model = build(shape)
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(2))
    path = save(tmp_path, 2, model, optimizer, tokenizer=tokenizer)
    theirs, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values())
    loaded = AutoTokenizer.from_pretrained(path)
    assert loaded("def f(x):")["input_ids"] == tokenizer.encode("def f(x):")
    ids = torch.tensor([tokenizer.encode("import sys")])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-4)


def test_nothing_is_pickled(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise AssertionError("something was pickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(module, name, refuse)
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    path = save(tmp_path, 1, model, optimizer)
    load_checkpoint(find_newest(tmp_path), model, optimizer)
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_every_damage_is_found_and_the_newest_whole_one_taken(tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    older = save(tmp_path, 1, model, optimizer)
    newer = save(tmp_path, 2, model, optimizer)
    files = [file for file in newer.rglob("*") if file.is_file() and file.name != "files.json"]
    assert len(files) >= 6
    for file in files:
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damaged in (bytes(flipped), whole[:-1], None):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            assert any(str(file) in problem for problem in verify_checkpoint(newer))
            with pytest.warns(UserWarning, match=file.name):
                assert find_newest(tmp_path) == older
        file.write_bytes(whole)
    assert verify_checkpoint(newer) == []
    assert find_newest(tmp_path) == newer


def test_the_newest_is_taken_when_its_run_removes_the_one_before_meanwhile(tmp_path, monkeypatch):
    old, new = (folders.checkpoint_path(tmp_path, step) for step in (1, 2))
    model = build(GPT2_SHAPE)
    save(tmp_path, 1, model, build_adamw(model, learning_rate=1e-2))

    def save_the_next(path):
        if not new.exists():
            shutil.copytree(old, new)
            shutil.rmtree(old)
        return verify_checkpoint(path)

    monkeypatch.setattr(folders, "verify_checkpoint", save_the_next)
    assert find_newest(tmp_path) == new  # and no warning of a damaged one


@pytest.mark.parametrize("problem", [None, OSError("no such file"), ValueError("no weights")])
@pytest.mark.parametrize("is_replaced", [False, True])
def test_what_is_read_is_that_of_one_folder(tmp_path, is_replaced, problem):
    path = tmp_path / "step-00000001"
    path.mkdir()
    with pytest.raises(ValueError, match="was removed or replaced while it was read") as raised:  # noqa: SIM117
        with still_there(path):
            path.rename(tmp_path / "old")
            if is_replaced:
                path.mkdir()
            if problem is not None:
                raise problem
    assert raised.value.__cause__ is problem


def test_an_error_is_left_as_it_is_where_the_folder_stays(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="^broken$"), still_there(path):
            raise ValueError("broken")
    with pytest.raises(KeyboardInterrupt), still_there(tmp_path):
        raise KeyboardInterrupt


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    save(tmp_path, 1, model, optimizer).rename(tmp_path / ".step-00000001.tmp")
    assert find_newest(tmp_path) is None
    path = save(tmp_path, 1, model, optimizer)
    assert find_newest(tmp_path) == path
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_only_the_last_ones_are_kept(tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    for step in range(1, 6):
        save(tmp_path, step, model, optimizer, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_another_model_or_a_newer_format_is_refused(tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    path = save(tmp_path, 1, model, optimizer)
    wider = build(GPT2Config(**{**vars(GPT2_SHAPE), "width": 32}))
    with pytest.raises(ValueError, match="has shape"):
        load_checkpoint(path, wider, build_adamw(wider, learning_rate=1e-2))
    state = json.loads((path / "training" / "state.json").read_text())
    (path / "training" / "state.json").write_text(json.dumps(state | {"state_version": 99}))
    with pytest.raises(ValueError, match="state_version=99"):
        read_state(path)


def test_the_checkpoint_just_written_is_never_pruned(tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    for step in (1, 2, 8):
        save(tmp_path, step, model, optimizer)
    save(tmp_path, 3, model, optimizer, keep_last=1)  # the run turned back from step 8
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_paths_are_given_as_text_too(tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    path = save(str(tmp_path / "run"), 1, model, optimizer)
    assert path == tmp_path / "run" / "step-00000001" == find_newest(str(tmp_path / "run"))
    assert verify_checkpoint(str(path)) == []
    assert read_state(str(path)) == read_state(path)
    again = GPT2(GPT2_SHAPE)
    load_checkpoint(str(path), again, build_adamw(again, learning_rate=1e-2))
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_numbers_of_numpy_are_written_as_those_of_python(tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    options = {"tokenizer": None, "manifest": {}}
    counts = {"step": 7, "windows": 2**40, "tokens": 3, "best_step": 5, "row_tokens": 1}
    expected = TrainingState(**counts, best_loss=0.5)
    state = TrainingState(**{k: np.int64(n) for k, n in counts.items()}, best_loss=np.float32(0.5))
    plain = save_checkpoint(tmp_path / "plain", expected, model, optimizer, **options)
    path = save_checkpoint(tmp_path / "numpy", state, model, optimizer, **options)
    name = "training/state.json"
    assert (path / name).read_bytes() == (plain / name).read_bytes()
    assert read_state(path)[0] == expected


@pytest.mark.parametrize(
    ("counts", "manifest", "message"),
    [
        ({"step": -1}, {}, "state.step=-1 must be a whole number of at least 0"),
        ({"step": 10**8}, {}, "state.step=100000000 must be a whole number of at least 0 and at"),
        ({"windows": 1.5}, {}, "state.windows=1.5 must be a whole number"),
        ({"tokens": np.float64(8)}, {}, "state.tokens=8.0 must be a whole number"),
        ({"recent": [[np.float32(1), 1.0]]}, {}, "state cannot be written as JSON (Object of type"),
        ({}, {"seed": np.int64(1)}, "manifest cannot be written as JSON (Object of type int64"),
    ],
)
def test_a_state_that_cannot_be_written_is_refused_first(counts, manifest, message, tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    options = {"tokenizer": None, "manifest": manifest}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        save_checkpoint(tmp_path / "run", TrainingState(**counts), model, optimizer, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": -1}, "keep_last=-1 must be a whole number of at least 0"),
        ({"keep_last": None}, "keep_last=None must be a whole number"),
        ({"keep_every": 0}, "keep_every=0 must be a whole number of at least 1, or null"),
        ({"keep_best": "valid"}, "keep_best=valid must be loss or a score TASK/METRIC"),
        ({"keep_best": "hellaswag/"}, "keep_best=hellaswag/ must be loss or a score"),
        ({"keep_best": 3}, "keep_best=3 must be loss or a score"),
    ],
)
def test_a_rule_of_what_is_kept_that_says_nothing_is_refused_first(options, message, tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    paths = [save(tmp_path, step, model, optimizer) for step in (1, 2)]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        save(tmp_path, 3, model, optimizer, **options)
    assert sorted(tmp_path.iterdir()) == paths


def test_a_checkpoint_with_a_file_that_cannot_be_read_is_passed_over(tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    older, newer = (save(tmp_path, step, model, optimizer) for step in (1, 2))
    for file in [file for file in newer.rglob("*") if file.is_file()]:
        aside = file.rename(tmp_path / "aside")
        for error in (errno.EIO, errno.ELOOP, errno.EISDIR):
            if error == errno.EISDIR:
                file.mkdir()
            else:  # reading address 0 of a process's memory is an EIO, as of a bad sector
                file.symlink_to("/proc/self/mem" if error == errno.EIO else file.name)
            problem = f"{file}: cannot be read ({os.strerror(error)})"
            assert verify_checkpoint(newer) == [problem]
            with pytest.warns(UserWarning, match=re.escape(problem)):
                assert find_newest(tmp_path) == older
            file.rmdir() if error == errno.EISDIR else file.unlink()
        aside.rename(file)
    assert find_newest(tmp_path) == newer


FOREIGN = (
    ".DS_Store",
    ".ipynb_checkpoints/config-checkpoint.json",
    ".cache/huggingface/download/config.json.metadata",
    "notes.txt",
    "training/notes/today.md",
    "training/optimizer-copy.safetensors",
)


def test_foreign_files_in_a_checkpoint_neither_matter_nor_go(tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    path = save(tmp_path, 1, model, optimizer)
    for name in FOREIGN:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"not ours")
    assert verify_checkpoint(path) == []
    assert find_newest(tmp_path) == path
    other = build(GPT2_SHAPE)
    restored = build_adamw(other, learning_rate=1e-2)
    load_checkpoint(path, other, restored)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(optimizer.state[mine]["exp_avg"], restored.state[theirs]["exp_avg"])
    save(tmp_path, 2, model, optimizer)
    assert all((path / name).read_bytes() == b"not ours" for name in FOREIGN)


def test_a_file_list_with_a_flipped_bit_is_found(tmp_path):
    model = build(GPT2_SHAPE)
    path = save(tmp_path, 1, model, build_adamw(model, learning_rate=1e-2))
    whole = (path / FILES).read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / FILES).write_bytes(flipped)
        if json_of(flipped) != json.loads(whole):  # white space may become other white space
            assert verify_checkpoint(path), bit
    # One of two names became the other: JSON would keep the last entry without a word.
    entry = json.dumps(json.loads(whole)["config.json"])
    (path / FILES).write_text(f'{{"config.json": {entry}, "config.json": {entry}}}')
    assert verify_checkpoint(path) == [f"{path / FILES}: not readable"]


def test_a_file_list_that_names_what_lies_outside_is_no_whole_checkpoint(tmp_path):
    model = build(GPT2_SHAPE)
    path = save(tmp_path, 1, model, build_adamw(model, learning_rate=1e-2))
    listed = json.loads((path / FILES).read_text())
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    for outside in ("../config.json", "training/../../config.json", f"{tmp_path}/config.json"):
        (path / FILES).write_text(json.dumps(listed | {outside: listed["config.json"]}))
        assert verify_checkpoint(path) == [f"{path / outside}: missing"]


def json_of(text):
    try:
        return json.loads(text)
    except ValueError:
        return None
