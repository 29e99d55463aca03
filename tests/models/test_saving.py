"""`save_pretrained` leaves the old model or the new one, whatever goes wrong."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pretrain_lib as pl

SHAPE = {"vocabulary_size": 61, "context_length": 32, "num_heads": 2, "width": 16}


def model_of(seed, num_layers=2):
    return pl.GPT2(pl.GPT2Config(**SHAPE, num_layers=num_layers)).initialize(seed)


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_model(folder, model):
    """Return whether the model of a folder is a given one, and that of transformers as well."""
    loaded = pl.load_pretrained(folder)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        same = loaded.config == model.config and torch.equal(loaded(ids), model(ids))
    return same and torch.allclose(theirs, model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": torch.float64}, r"^dtype=torch\.float64 must be one of torch\.float32, .*$"),
        ({"dtype": torch.complex64}, r"^dtype=torch\.complex64 must be one of .*$"),
        ({"dtype": torch.int64}, r"^dtype=torch\.int64 must be one of .*$"),
        ({"max_shard_bytes": 0}, r"^max_shard_bytes=0 must be at least 1, .*$"),
        ({"max_shard_bytes": -5}, r"^max_shard_bytes=-5 must be at least 1, .*$"),
        ({"tokenizer": "theirs"}, r"^tokenizer is transformers\..*: open .* with load_tokenizer$"),
    ],
)
def test_arguments_are_refused_before_anything_is_written(changed, reason, tmp_path):
    tokenizer = pl.train_tokenizer(["some text"], vocabulary_size=260)
    if "tokenizer" in changed:
        changed = {"tokenizer": PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)}
    pl.save_pretrained(model_of(0), tmp_path / "old", tokenizer=tokenizer)
    before = bytes_in(tmp_path / "old")
    for folder in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(ValueError, match=reason):
            pl.save_pretrained(model_of(1), folder, **({"tokenizer": None} | changed))
    assert bytes_in(tmp_path / "old") == before and not (tmp_path / "new").exists()
    if "tokenizer" in changed:
        optimizer = pl.build_adamw(model_of(1), learning_rate=1e-3)
        arguments = tmp_path / "new", pl.TrainingState(), model_of(1), optimizer
        with pytest.raises(ValueError, match=reason):
            pl.save_checkpoint(*arguments, manifest={}, **changed)
        assert not (tmp_path / "new").exists()


def test_the_folder_may_be_given_as_text(tmp_path):
    model = model_of(0)
    pl.save_pretrained(model, str(tmp_path / "model"), tokenizer=None)
    assert is_model(tmp_path / "model", model)


def test_an_error_while_writing_leaves_the_old_model(tmp_path, monkeypatch):
    pl.save_pretrained(model_of(0), tmp_path, tokenizer=None)
    before = bytes_in(tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            pl.save_pretrained(model_of(1), tmp_path, tokenizer=None, max_shard_bytes=5000)
    assert bytes_in(tmp_path) == before


class Killed(BaseException):
    pass


# Ways to write the first model and the second: layers and largest file.
CHANGES = {
    "other weights": ((2, None), (2, None)),
    "other shape": ((2, None), (3, None)),
    "shards": ((2, 5000), (2, 5000)),
    "into shards": ((2, None), (2, 5000)),
    "into one file": ((3, 5000), (2, None)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_leaves_the_old_model_the_new_one_or_none(change, tmp_path, monkeypatch):
    """A kill before each change of the folder, of which none is repaired."""
    (layers, size), (new_layers, new_size) = CHANGES[change]
    old, new = model_of(0, layers), model_of(1, new_layers)
    pl.save_pretrained(old, tmp_path / "old", tokenizer=None, max_shard_bytes=size)
    found = []
    for survived in range(100):
        folder = tmp_path / str(survived)
        shutil.copytree(tmp_path / "old", folder)
        left = [survived]

        def count(function, left=left, folder=folder):
            def counted(path, *arguments, **options):
                if path.is_relative_to(folder):
                    if not left[0]:
                        raise Killed
                    left[0] -= 1
                return function(path, *arguments, **options)

            return counted

        with monkeypatch.context() as patch:
            for name in ("unlink", "replace", "rmdir"):
                patch.setattr(Path, name, count(getattr(Path, name)))
            try:
                pl.save_pretrained(new, folder, tokenizer=None, max_shard_bytes=new_size)
            except Killed:
                pass
            else:
                break
        if (folder / "config.json").exists():
            found.append("old" if is_model(folder, old) else "new")
            assert found[-1] == "old" or is_model(folder, new)
        else:
            found.append("none")
        pl.save_pretrained(new, folder, tokenizer=None, max_shard_bytes=new_size)
        assert is_model(folder, new)
        shutil.rmtree(folder)
    assert found[0] == "old" and found[-1] == "new" and found == sorted(found, key=ORDER.index)
    assert ("none" in found) == (change != "other weights")


ORDER = ["old", "none", "new"]
