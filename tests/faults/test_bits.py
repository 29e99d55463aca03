"""Every flipped bit of a prepared folder and of a checkpoint is found, and its file named."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from pretrain_lib import Job, open_corpus, prepare
from pretrain_lib.checkpoint.folders import verify_checkpoint
from pretrain_lib.commands.cli import main
from pretrain_lib.data.tokens.arrays import open_split
from pretrain_lib.data.tokens.shards import read_manifest
from pretrain_lib.data.tokens.verify import verify_folder
from pretrain_lib.files.writes import write_json
from tests.checkpoint.test_checkpoint import GPT2_SHAPE, build, build_adamw, save, steps
from tests.conftest import change

pytestmark = pytest.mark.moderate
TINY = {"width": 2, "num_heads": 1, "num_layers": 1}
# A tokenizer of a few hundred bytes.
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {
        "type": "WordLevel",
        "vocab": {"<|endoftext|>": 0, "sun": 1, "moon": 2},
        "unk_token": "<|endoftext|>",
    },
}


@pytest.fixture
def folder(tmp_path):
    """A prepared folder of a few kilobytes, with both splits."""
    texts = [{"text": text} for text in ("sun moon", "moon moon sun", "sun", "moon sun sun")]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    job = Job(
        (str(tmp_path / "text.jsonl"),),
        tokenizer=str(tmp_path / "tokenizer.json"),
        validation="first:3",
    )
    prepare(job, tmp_path / "data", workers=1, quiet=True)
    return tmp_path / "data"


def ours(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def flips(path, *, all_bits=True):
    """Flip each bit of a file in turn, or one of each byte, in place; yield where it is flipped."""
    descriptor = os.open(path, os.O_RDWR)
    for position, byte in enumerate(path.read_bytes()):
        for bit in range(8) if all_bits else [position % 8]:
            os.pwrite(descriptor, bytes([byte ^ 1 << bit]), position)
            yield f"byte {position}, bit {bit}"
        os.pwrite(descriptor, bytes([byte]), position)
    os.close(descriptor)


def missed(path, verify):
    """Return the flips after which `verify` finds nothing, or does not name the file."""
    return [place for place in flips(path) if not any(str(path) in line for line in verify())]


def test_verify_finds_every_flipped_bit_of_a_prepared_folder(folder):
    kinds = {path.suffix for path in ours(folder)}
    assert kinds == {".json", ".bin", ".npy"} and len(ours(folder)) >= 11
    found = {path.name: missed(path, lambda: verify_folder(folder)) for path in ours(folder)}
    assert found == dict.fromkeys(found, [])
    assert verify_folder(folder) == []


def test_verify_finds_every_flipped_bit_of_a_checkpoint(tmp_path):
    model = build(replace(GPT2_SHAPE, **TINY))
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    for parameter in list(optimizer.state)[2:]:
        del optimizer.state[parameter]  # which leaves a file of two kilobytes
    path = save(tmp_path, 1, model, optimizer)
    # The list names the files that it misses, and is named itself where it cannot be read.
    found = {
        file.name: [place for place in flips(file) if not verify_checkpoint(path)]
        for file in ours(path)
    }
    assert found == dict.fromkeys(found, []) and len(found) >= 6
    assert verify_checkpoint(path) == []


def test_a_run_refuses_every_flipped_bit_of_the_manifest_and_the_tokenizer(folder, recipe):
    config = change(
        recipe,
        data={"path": str(folder), "validation": "none"},
        model={"vocabulary_size": 3, "context_length": 2},
        batch={"sequence_length": 2},
    )

    def refusal():
        with pytest.raises(ValueError, match=".") as refused:
            open_corpus(config)
        return [str(refused.value)]

    open_corpus(config)
    for path in (folder / "manifest.json", *ours(folder / "tokenizer")):
        assert missed(path, refusal) == []


def test_a_read_refuses_every_flipped_bit_of_tokens_and_of_what_says_where_they_are(folder):
    def refusal():
        with pytest.raises(ValueError, match=".") as refused:
            split = open_split(folder, "train")
            split.read(0, len(split))
            split.document_ends(0, len(split))
        return [str(refused.value)]

    for path in folder.glob("train-*"):
        assert missed(path, refusal) == []


def without_own_hash(folder):
    """Make the manifest what an earlier version wrote."""
    manifest = read_manifest(folder)
    del manifest["manifest_sha256"], manifest["files"]
    write_json(folder / "manifest.json", manifest)


def test_a_folder_of_an_earlier_version_is_verified_and_said_to_be_one(folder, capsys):
    def verify(path=folder):
        with pytest.raises(SystemExit) as end:
            main(["verify", str(path)])
        return end.value.code, capsys.readouterr().out

    code, said = verify()
    assert code == 0 and said == f"{folder}: every file is as it was written\n"
    old = shutil.copytree(folder, folder.with_name("old"))
    without_own_hash(old)
    code, said = verify(old)
    assert code == 0 and "was written by an earlier version and has no hash of itself" in said


def test_no_damage_to_a_manifest_of_an_earlier_version_ends_in_a_traceback(folder, recipe):
    without_own_hash(folder)
    config = change(recipe, data={"path": str(folder), "validation": "none"})
    names = {path.name for path in folder.iterdir()}
    for _ in flips(folder / "manifest.json", all_bits=False):
        try:
            verify_folder(folder)
            open_corpus(config)
        except ValueError as error:
            assert "\n" not in str(error)
            assert any(name in str(error) for name in names) or "run.dir" not in str(error)


@pytest.mark.parametrize("dtype", [">u2", ">u4", "u2", "<i8"])
def test_ids_of_another_byte_order_or_type_are_refused(folder, dtype):
    manifest = read_manifest(folder)
    del manifest["manifest_sha256"], manifest["files"]
    write_json(folder / "manifest.json", manifest | {"dtype": dtype})
    with pytest.raises(ValueError, match=rf"manifest.json is damaged: dtype={dtype} must be <u2"):
        open_split(folder, "train")
