"""The data of a run: prepared, foreign, or prepared now; and what is refused."""

import json
import shlex

import numpy as np
import pytest

from pretrain_lib import Job, open_corpus, open_foreign, prepare
from pretrain_lib.commands.cli import main
from pretrain_lib.corpus import autoprepare
from pretrain_lib.corpus.corpus import build_dataset
from pretrain_lib.data.inspection import inspect_data
from pretrain_lib.data.tokens.arrays import open_split
from pretrain_lib.data.tokens.shards import read_manifest
from tests.conftest import change


def from_source(recipe, source, folder, **options):
    data = {"path": str(folder), "source": str(source), "train_tokenizer": 300} | options
    return change(recipe, data=data)


def test_a_prepared_folder_is_opened_as_it_stands(recipe, prepared):
    found, manifest = open_corpus(recipe), read_manifest(prepared)
    assert found.fingerprint == manifest["fingerprint"]
    train = open_split(prepared, "train")
    assert np.array_equal(found.train[0].read(0, len(train)), train.read(0, len(train)))
    assert [text.rule for text in found.validation] == ["hash:0.1"]


def test_a_source_is_prepared_once(recipe, tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"The number {number} and its text. " * 9)
    config = from_source(recipe, tmp_path, tmp_path / "out", validation="hash:0.2")
    first = open_corpus(config)
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert open_corpus(config).fingerprint == first.fingerprint
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="prepared differently .*tokenizer"):
        open_corpus(from_source(recipe, tmp_path, tmp_path / "out", train_tokenizer=310))


def test_a_large_source_is_left_to_the_command_that_prepares_the_same(
    recipe, tmp_path, monkeypatch
):
    texts, out = tmp_path / "my texts", tmp_path / "an out"
    texts.mkdir()
    lines = [json.dumps({"content": f"the text of number {number}"}) for number in range(300)]
    (texts / "a.jsonl").write_text("\n".join([*lines, "no JSON"]))
    options = {"text_field": "content", "max_rejected": 1, "validation": "hash:0.2"}
    expected = open_corpus(from_source(recipe, texts, tmp_path / "expected", **options))
    monkeypatch.setattr(autoprepare, "PREPARE_LIMIT_TOKENS", 10)
    config = from_source(recipe, texts, out, **options)
    with pytest.raises(ValueError, match="Prepare it once with\n") as error:
        open_corpus(config)
    assert not out.exists()
    program, *words = shlex.split(str(error.value).splitlines()[1])
    assert program == "pretrain"
    with pytest.raises(SystemExit, match="0"):
        main(words)
    assert open_corpus(config).fingerprint == expected.fingerprint


@pytest.mark.parametrize("dtype", ["int64", "uint16", "int32", "uint8"])
def test_an_array_is_read_and_validated_on_another(recipe, tmp_path, dtype):
    ids = np.random.default_rng(0).integers(250, size=500).astype(dtype)
    np.save(tmp_path / "train.npy", ids)
    ids[:100].astype("uint16").tofile(tmp_path / "validation.bin")
    data = {"path": f"{tmp_path}/train.npy", "validation": f"{tmp_path}/validation.bin"}
    found = open_corpus(change(recipe, data=data))
    assert np.array_equal(found.train[0].read(0, 500), ids)
    assert np.array_equal(found.validation[0].tokens.read(0, 100), ids[:100])
    assert found.dtype == dtype
    too_small = change(recipe, data=data, model={"vocabulary_size": int(ids.max())})
    with pytest.raises(ValueError, match=f"train.npy: its ids go up to {ids.max()}; "):
        open_corpus(too_small)
    assert (found.tokenizer, found.validation[0].rule) == (None, f"{tmp_path}/validation.bin")


def test_a_prepared_folder_can_be_validated_on_an_array(recipe, prepared, tmp_path):
    np.save(tmp_path / "validation.npy", np.arange(100))
    found = open_corpus(change(recipe, data={"validation": f"{tmp_path}/validation.npy"}))
    assert len(found.validation[0].tokens) == 100
    assert found.validation[0].rule.endswith("validation.npy")


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({"path": "{dir}/none.npy"}, {}, "there is no such file"),
        ({"path": "{dir}/ids.npy"}, {}, "is a token array: set data.validation=PATH"),
        ({"path": "{dir}/ids.npy", "validation": "{dir}/no.bin"}, {}, "no such file"),
        (
            {"path": "{dir}/ids.npy", "validation": "none"},
            {"vocabulary_size": 50},
            "set model.vocabulary_size=100 or more",
        ),
        (
            {"path": "{dir}/negative.npy", "validation": "none"},
            {},
            "go down to -1",
        ),
        ({}, {"vocabulary_size": 100}, "set model.vocabulary_size=512 or more"),
        ({"path": "{dir}"}, {}, "holds no manifest.json"),
        ({"path": None}, {}, "data.source or data.path must be given"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(recipe, tmp_path, data, model, message):
    np.save(tmp_path / "ids.npy", np.arange(100))
    np.save(tmp_path / "negative.npy", np.arange(-1, 99))
    named = {k: v and v.format(dir=tmp_path) for k, v in data.items()}
    with pytest.raises(ValueError, match=message):
        open_corpus(change(recipe, data=named, model=model))


@pytest.mark.parametrize(
    ("written", "dtype", "message"),
    [
        ("<u2", None, "assumed: .* give it by data.dtype, .* write them as little-endian; other"),
        ("<u2", "uint16", "if data.dtype=uint16 is not their type, give the one that is; other"),
        ("<u2", "int16", "go down to -255, .* if data.dtype=int16 is not their type, give the one"),
        ("<i4", "int32", "up to 65534; if data.dtype=int32 is not their type"),
    ],
)
def test_ids_beyond_the_vocabulary_may_be_of_another_type(
    recipe, tmp_path, written, dtype, message
):
    np.array([9, 65534, 70, 3, 2000, 65281] * 9).astype(written).tofile(tmp_path / "ids.bin")
    data = {"path": f"{tmp_path}/ids.bin", "validation": "none", "dtype": dtype}
    with pytest.raises(ValueError, match=f"ids.bin: its ids .*{message}") as error:
        open_corpus(change(recipe, data=data))
    assert ("set model.vocabulary_size=65535 or more" in str(error.value)) == (dtype != "int16")
    tokens = open_foreign(tmp_path / "ids.bin", vocabulary_size=300, dtype=dtype)
    with pytest.raises(ValueError, match="token id -?[0-9]+ in") as error:
        tokens.read(0, 9)
    assert ("data.dtype" in str(error.value)) == (dtype is None)


def test_ids_below_0_are_never_answered_by_a_size_of_the_vocabulary(recipe, tmp_path):
    np.save(tmp_path / "ids.npy", np.array([5, -100, 3] * 99))
    data = {"path": f"{tmp_path}/ids.npy", "validation": "none"}
    message = "ids.npy: its ids go down to -100, but no id is below 0; write them again, without"
    with pytest.raises(ValueError, match=message) as error:
        open_corpus(change(recipe, data=data))
    assert "model.vocabulary_size" not in str(error.value)


def test_a_folder_without_validation_text_says_what_to_do(recipe, tmp_path):
    (tmp_path / "text.txt").write_text("some words that are text " * 50)
    with pytest.raises(ValueError, match="first:TOKENS of the source"):
        open_corpus(from_source(recipe, tmp_path / "text.txt", tmp_path / "a"))
    found = open_corpus(
        from_source(recipe, tmp_path / "text.txt", tmp_path / "b", validation="first:40")
    )
    assert len(found.validation[0].tokens) == 40


def test_a_prepared_folder_can_be_what_another_is_validated_on(recipe, prepared, tmp_path):
    (tmp_path / "text.txt").write_text("def a(): return 1\n" * 40)
    flags = {"tokenizer": str(prepared / "tokenizer"), "validation": "none"}
    prepare(Job((str(tmp_path / "text.txt"),), **flags), tmp_path / "held_out")
    config = change(recipe, data={"validation": str(tmp_path / "held_out")})
    found = open_corpus(change(config, validation={"tokens": 64}))
    train = open_split(tmp_path / "held_out", "train")
    assert np.array_equal(found.validation[0].tokens.read(0, len(train)), train.read(0, len(train)))
    flags = {"train_tokenizer": 300, "validation": "none"}
    prepare(Job((str(tmp_path / "text.txt"),), **flags), tmp_path / "other")
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        open_corpus(change(recipe, data={"validation": str(tmp_path / "other")}))


def test_a_job_that_failed_does_not_stand_in_the_way_of_the_next(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"body": "some words"}\n')
    with pytest.raises(ValueError, match="text_field"):
        prepare(Job((str(tmp_path / "text.jsonl"),), train_tokenizer=300), tmp_path / "out")
    right = Job(
        (str(tmp_path / "text.jsonl"),), train_tokenizer=300, text_field="body", validation="none"
    )
    assert prepare(right, tmp_path / "out")["splits"]["train"]["documents"] == 1


@pytest.mark.parametrize("changes", [{"validation": {"tokens": 10}}, {"data": {"path": "{a}"}}])
def test_lengths_are_checked_before_anything_starts(recipe, tmp_path, changes):
    np.save(tmp_path / "short.npy", np.arange(20))
    if "data" in changes:
        changes = {"data": {"path": f"{tmp_path}/short.npy", "validation": "none"}}
    with pytest.raises(ValueError, match=r"validation\.tokens=10|20 tokens is too short"):
        open_corpus(change(recipe, **changes))


def test_a_source_of_a_mixture_that_gives_no_window_is_named(recipe, prepared, tmp_path):
    (np.arange(2_000_000) % 300).astype("<u2").tofile(tmp_path / "big.bin")
    for size, message in (
        (20, "tiny.bin: a source of 20 tokens is too short.*leave it out"),
        (40, "tiny.bin: its 40 of 2,000,040 tokens are less .* leave it out, or give data.weights"),
    ):
        (np.arange(size) % 300).astype("<u2").tofile(tmp_path / "tiny.bin")
        paths = [f"{tmp_path}/big.bin", f"{tmp_path}/tiny.bin"]
        config = change(recipe, data={"path": paths, "validation": "none"})
        with pytest.raises(ValueError, match=f"^data.path={tmp_path}/{message}"):
            open_corpus(config)
        with pytest.raises(ValueError, match=f"^data.path={tmp_path}/{message}"):
            list(inspect_data(paths, sequence_length=32, window=0))
    assert open_corpus(change(config, data={"weights": [0.9, 0.1]})).train


def test_a_mistyped_folder_of_held_out_text_is_not_there(recipe, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(3000) % 300)
    for path in (recipe.data.path, f"{tmp_path}/ids.npy"):
        data = {"path": path, "validation": "no/such"}
        with pytest.raises(ValueError, match="data.validation=no/such must .* no folder no/such"):
            open_corpus(change(recipe, data=data))


def test_best_fit_packs_a_text_shorter_than_a_window(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (np.arange(20) % 300).astype("<u2").tofile(tmp_path / "a.ds")
    np.array([7, 20], "<u8").tofile(tmp_path / "a.ds.index")
    data = {"path": f"{tmp_path}/a.ds", "validation": "none", "dtype": "uint16"}
    config = change(recipe, data=data | {"packing": "best_fit"})
    corpus = open_corpus(config)
    window = build_dataset(config, corpus)[0]
    assert window["input_ids"].tolist() == [*range(20), *[0] * 12]
    options = {"sequence_length": 32, "window": 0, "dtype": "uint16"}
    assert any(
        "1 window" in line for line in inspect_data([data["path"]], packing="best_fit", **options)
    )


@pytest.fixture
def mixture(recipe, prepared, tmp_path):
    """A second folder under the first one's tokenizer, and the recipe that mixes them."""
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"The number {number} and its text. " * 9)
    other = tmp_path / "other"
    job = Job((str(tmp_path),), tokenizer=str(prepared / "tokenizer"), validation="hash:0.2")
    prepare(job, other, quiet=True)
    data = {"path": [str(prepared), str(other)], "weights": [1.0, 3.0]}
    return change(recipe, data=data), [prepared, other]


def test_a_mixture_reads_and_validates_on_all_its_folders(mixture):
    config, folders = mixture
    found = open_corpus(config)
    held_out = [text.tokens for text in found.validation]
    for split, arrays in (("train", found.train), ("validation", held_out)):
        parts = [open_split(folder, split) for folder in folders]
        ids = np.concatenate([part.read(0, len(part)) for part in parts])
        read = np.concatenate([array.read(0, len(array)) for array in arrays])
        assert np.array_equal(read, ids)
    assert [text.name for text in found.validation] == ["prepared", "other"]
    assert [text.weight for text in found.validation] == [1.0, 3.0]
    alone = [open_corpus(change(config, data={"path": str(f), "weights": None})) for f in folders]
    assert len({found.fingerprint, *(part.fingerprint for part in alone)}) == 3
    assert found.name == " + ".join(part.name for part in alone)
    source = build_dataset(config, found).order.locate(np.arange(4096))[0]
    assert np.bincount(source).tolist() == [1024, 3072]


def test_a_mixture_under_different_tokenizers_is_refused(mixture, recipe, tmp_path):
    config, (prepared, _) = mixture
    third = tmp_path / "third"
    prepare(Job((str(tmp_path / "1.txt"),), train_tokenizer=300, validation="none"), third)
    data = {"path": [str(prepared), str(third)], "weights": None, "validation": "none"}
    with pytest.raises(ValueError, match="were prepared with different tokenizers"):
        open_corpus(change(config, data=data))


def test_best_fit_plans_are_made_once_beside_each_folder(mixture):
    config, folders = mixture
    config = change(config, data={"packing": "best_fit"})
    found = open_corpus(config)
    plans = [sorted((folder / "packing").glob("best_fit-T32-*")) for folder in folders]
    assert all(len(files) == 3 for files in plans)
    stamps = [file.stat().st_mtime_ns for files in plans for file in files]
    again = open_corpus(config)
    assert [file.stat().st_mtime_ns for files in plans for file in files] == stamps
    windows = sum(plan.num_windows for plan in found.plans)
    assert len(build_dataset(config, again)) == windows
    total = sum(len(array) for array in found.train)
    assert sum(plan.report.tokens for plan in found.plans) == total


def test_best_fit_needs_to_know_the_documents(recipe, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(400) % 100)
    data = {"path": f"{tmp_path}/ids.npy", "validation": "none", "packing": "best_fit"}
    with pytest.raises(ValueError, match="data.packing=best_fit needs document ends"):
        open_corpus(change(recipe, data=data))


def test_files_that_a_pattern_matches_are_one_array(recipe, tmp_path):
    for number in (2, 0, 1):
        ids = np.arange(number * 100, number * 100 + 100, dtype=np.uint16)
        ids.tofile(tmp_path / f"train_{number}.bin")
    data = {"path": f"{tmp_path}/train_*.bin", "validation": "none"}
    found = open_corpus(change(recipe, data=data))
    assert found.train[0].read(0, 300).tolist() == list(range(300))
    with pytest.raises(ValueError, match="its ids go up to 299; "):
        open_corpus(change(recipe, data=data, model={"vocabulary_size": 299}))
    before = found.fingerprint
    np.arange(1, 101, dtype=np.uint16).tofile(tmp_path / "train_1.bin")
    assert open_corpus(change(recipe, data=data)).fingerprint != before


@pytest.mark.parametrize(
    "data",
    [{"packing": "best_fit"}, {"document_masking": True}, {"shuffle": "documents"}, {}],
)
def test_documents_that_end_elsewhere_are_other_data(recipe, tmp_path, data):
    np.arange(200, dtype="<u2").tofile(tmp_path / "a.ds")
    data = {"path": f"{tmp_path}/a.ds", "validation": "none"} | data
    windows, fingerprints = [], []
    for ends in ([100, 200], [*range(10, 201, 10)], [100, 200]):
        np.array(ends, "<u8").tofile(tmp_path / "a.ds.index")
        config = change(recipe, data=data)
        corpus = open_corpus(config)
        fingerprints.append(corpus.fingerprint)
        windows.append(build_dataset(config, corpus).batch(range(2)))
    others = [
        [(window[name].shape, window[name].tolist()) for name in window] for window in windows
    ]
    assert others[0] == others[2] and fingerprints[0] == fingerprints[2]
    assert (others[0] == others[1]) == (fingerprints[0] == fingerprints[1]) == (len(data) == 2)


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ({"source": None}, "data.streaming=true needs a data.source"),
        ({"weights": [1.0]}, "and no data.weights"),
        ({"packing": "best_fit"}, ", data.packing=concat"),
        ({"shuffle": "documents"}, ", data.shuffle=windows"),
        ({"spool_tokens": 1000}, "data.spool_tokens=1000 must be at least 4 x batch.tokens=256"),
        ({"validation": "hash"}, "data.validation=hash needs the whole source"),
    ],
)
def test_streams_that_cannot_be_are_refused(recipe, tmp_path, data, rule):
    (tmp_path / "text.txt").write_text("some words that are text " * 500)
    source = {"path": None, "source": f"{tmp_path}/text.txt", "train_tokenizer": 300}
    stream = {"streaming": True, "validation": "first:100", "spool_tokens": 1024}
    with pytest.raises(ValueError, match=rule):
        open_corpus(change(recipe, data=source | stream | data))


def test_documents_are_permuted_if_asked_for(recipe):
    batches = []
    for shuffle in ("windows", "documents"):
        config = change(recipe, data={"shuffle": shuffle})
        batches.append(build_dataset(config, open_corpus(config)).batch(range(4))["input_ids"])
    assert batches[0].shape == batches[1].shape
    assert not batches[0].equal(batches[1])


def test_the_type_of_bare_ids_is_that_of_the_setting(recipe, tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, 4000)
    for name in ("train.bin", "held_out.npy"):
        ids.astype("<u4").tofile(tmp_path / name)
    paths = {"path": str(tmp_path / "train.bin"), "validation": str(tmp_path / "held_out.npy")}
    with pytest.raises(ValueError, match="train.bin has no header, .*data.dtype=uint32"):
        open_corpus(change(recipe, data=paths))
    corpus = open_corpus(change(recipe, data=paths | {"dtype": "uint32"}))
    assert corpus.dtype == "uint32"
    for tokens in (corpus.train[0], corpus.validation[0].tokens):
        assert tokens.read(0, 4000).tolist() == ids.tolist()


def test_a_type_is_for_the_files_that_do_not_state_theirs(recipe, tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, (3, 4000))
    ids[0].astype("<u2").tofile(tmp_path / "bare.npy")
    for name, own in zip(("train", "held_out"), ids[1:], strict=True):
        np.save(tmp_path / f"{name}.npy", own.astype("<u4"))
    bare, train, held_out = (f"{tmp_path}/{name}.npy" for name in ("bare", "train", "held_out"))
    data = {"path": [bare, train], "validation": held_out, "dtype": "uint16"}
    corpus = open_corpus(change(recipe, data=data))
    found = [*corpus.train, corpus.validation[0].tokens]
    assert [tokens.read(0, 4000).tolist() for tokens in found] == ids.tolist()
    assert open_corpus(change(recipe, data=data | {"path": held_out, "validation": bare})).train
    with pytest.raises(ValueError, match=r"dtype=uint16, but .*train.npy holds uint32 .*leave"):
        open_corpus(change(recipe, data=data | {"path": train}))


def test_the_text_that_is_trained_on_is_known_by_any_name(recipe, tmp_path, monkeypatch):
    for name in ("big", "big_val", "other"):
        np.save(tmp_path / f"{name}.npy", np.arange(3000, dtype=np.uint16) % 300)
    (tmp_path / "link.npy").symlink_to("big.npy")
    (tmp_path / "text.txt").write_text("some text of a folder that holds out none " * 50)
    job = Job((str(tmp_path / "text.txt"),), train_tokenizer=300, validation="none")
    prepare(job, tmp_path / "all", quiet=True)
    monkeypatch.chdir(tmp_path)
    for path, validation, name in (
        ("all", str(tmp_path / "all"), "all"),
        (f"{tmp_path}/all/", "./all", "all"),
        ("big.npy", str(tmp_path / "big.npy"), "big.npy"),
        ("big.npy", "link.npy", "link.npy"),
        ("big*.npy", "big_val.npy", "big_val.npy"),
        (["other.npy", "big_val.npy"], "*_val.npy", "big_val.npy"),
    ):
        with pytest.raises(ValueError, match=rf"data.validation: \S*{name} is the text that is t"):
            open_corpus(change(recipe, data={"path": path, "validation": validation}))
    data = {"path": "big*.npy", "validation": "other.npy"}
    assert open_corpus(change(recipe, data=data)).validation


def test_the_text_that_is_trained_on_validates_nothing(recipe, tmp_path):
    array = tmp_path / "ids.npy"
    np.save(array, np.arange(3000, dtype=np.uint16) % 300)
    data = {"path": [str(array), recipe.data.path], "validation": str(array)}
    with pytest.raises(ValueError, match=r"ids\.npy is the text that is trained on"):
        open_corpus(change(recipe, data=data))
    (tmp_path / "text.txt").write_text("some text of a folder that holds out none " * 50)
    job = Job((str(tmp_path / "text.txt"),), train_tokenizer=300, validation="none")
    prepare(job, tmp_path / "all", quiet=True)
    whole = str(tmp_path / "all")
    with pytest.raises(ValueError, match=r"all is the text that is trained on"):
        open_corpus(change(recipe, data={"path": whole, "validation": whole}))
    held_out = {"path": recipe.data.path, "validation": recipe.data.path}
    assert open_corpus(change(recipe, data=held_out)).validation  # its held-out split
