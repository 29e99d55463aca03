"""Token files behind URLs: read as local ones are, from a real S3 server on loopback."""

import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pretrain_lib.corpus import autoprepare
from pretrain_lib.corpus.corpus import open_corpus
from pretrain_lib.data import remote
from pretrain_lib.data.block_cache import BlockCache
from pretrain_lib.data.inspection import inspect_data
from pretrain_lib.data.tokens import places
from pretrain_lib.data.tokens.arrays import open_split
from pretrain_lib.data.tokens.foreign import open_foreign
from pretrain_lib.data.tokens.places import open_place
from pretrain_lib.errors import FAILED
from tests.conftest import change, launch, read_rows, tiny_flags
from tests.data.s3 import SECRETS, upload
from tests.data.test_loss_masks import write_masked

pytestmark = pytest.mark.moderate


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the blocks, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pretrain_lib" / "blocks"


@pytest.fixture(scope="module")
def bucket(s3, prepared, tmp_path_factory):
    """`s3://corpus/prepared`, and arrays of every kind in `s3://corpus/arrays` and a folder."""
    upload(prepared, "prepared")
    folder, rng = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    ids = rng.integers(0, 400, 70_000)
    ids.astype("<u2").tofile(folder / "plain.bin")
    for number in range(2):
        np.save(folder / f"part_{number}.npy", ids[number * 30_000 :])
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    (folder / "llmc.bin").write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    write_masked(folder / "trove.ds", [500] * 20, below=400)
    upload(folder, "arrays")
    return folder


@pytest.mark.parametrize("name", ["plain.bin", "part_*.npy", "part_1.npy", "llmc.bin", "trove.ds"])
def test_arrays_behind_a_url_are_those_of_the_files(bucket, name, monkeypatch):
    monkeypatch.setattr(places, "CACHED_BYTES", 2**15)
    local = open_foreign(bucket / name, vocabulary_size=400)
    there = open_foreign(f"s3://corpus/arrays/{name}", vocabulary_size=400)
    assert len(there) == len(local) > 9000
    for start, count in ((0, len(local)), (4090, 20), (len(local) - 3000, 3000), (77, 1)):
        for _ in range(2):  # from the storage, then from the cache
            assert np.array_equal(there.read(start, count), local.read(start, count))
            if local.has_documents:
                ours, other = (t.document_ends(start, count) for t in (there, local))
                assert np.array_equal(ours, other)
            if local.has_mask:
                assert np.array_equal(there.counts(start, count), local.counts(start, count))


def test_only_the_blocks_that_are_read_are_fetched(s3, bucket, cache, monkeypatch):
    monkeypatch.setattr(places, "CACHED_BYTES", 2**12)
    tokens = open_foreign("s3://corpus/arrays/llmc.bin", vocabulary_size=400)
    tokens.read(2000, 2)  # bytes 1024 + 4000 on
    (folder,) = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["00000000", "00000001"]
    # A file that has changed since is another one, and is not read half from the cache.
    fsspec.filesystem("s3").pipe_file("corpus/changing.bin", bytes(2**14))
    old = open_foreign("s3://corpus/changing.bin", vocabulary_size=400, dtype="uint16")
    assert not old.read(0, 100).any()
    fsspec.filesystem("s3").pipe_file("corpus/changing.bin", b"\1\0" * 2**13)
    new = open_foreign("s3://corpus/changing.bin", vocabulary_size=400, dtype="uint16")
    assert new.read(0, 100).all()


def test_a_prepared_folder_behind_a_url_is_opened_like_a_local_one(bucket, prepared, recipe):
    local = open_corpus(change(recipe, data={"path": str(prepared)}))
    there = open_corpus(change(recipe, data={"path": "s3://corpus/prepared"}))
    assert there.fingerprint == local.fingerprint
    assert there.tokenizer.sha256 == local.tokenizer.sha256
    for own, other in zip(there.train, local.train, strict=True):
        assert np.array_equal(own.read(0, len(own)), other.read(0, len(other)))
    ours, other = (
        list(inspect_data([path], sequence_length=32, window=3))
        for path in ("s3://corpus/prepared", str(prepared))
    )
    assert [line.replace("s3://corpus/prepared", str(prepared)) for line in ours] == other
    mixture = ["s3://corpus/prepared", str(prepared)]
    assert len(open_corpus(change(recipe, data={"path": mixture})).train) == 2


def test_best_fit_plans_of_a_remote_folder_are_kept_in_the_cache(bucket, recipe, cache):
    data = {"path": "s3://corpus/prepared", "packing": "best_fit"}
    assert open_corpus(change(recipe, data=data)).plans
    assert list((cache.parent / "packing").iterdir())


def test_each_machine_makes_the_plans_that_are_kept_in_its_cache(
    bucket, recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(autoprepare, "PATIENCE_SECONDS", 0)
    config = change(recipe, data={"path": "s3://corpus/prepared", "packing": "best_fit"})
    plans = []
    for rank, local in ((0, 0), (8, 0), (9, 1)):  # the last two are on one machine
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine_{rank // 8}"))
        plans += open_corpus(config).plans
    contents = {plan.pieces_file.path.read_bytes() for plan in plans}
    paths = {plan.pieces_file.path for plan in plans}
    assert (len(contents), len(paths)) == (1, 2)


def test_a_damaged_block_of_the_cache_is_fetched_again(bucket, prepared, cache):
    for url, local, read in (
        ("s3://corpus/prepared", prepared, lambda place: open_split(place, "train")),
        ("s3://corpus/arrays/plain.bin", bucket / "plain.bin", open_array),
        ("s3://corpus/arrays/trove.ds", bucket / "trove.ds", open_array),
    ):
        expected = read(local).read(0, 1000)
        for damage in (lambda raw: raw[:7] + b"#" + raw[8:], lambda raw: raw[:-16], lambda _: b""):
            assert np.array_equal(read(open_place(url)).read(0, 1000), expected)
            for block in cache.glob("*/*"):
                block.write_bytes(damage(block.read_bytes()))


def open_array(place):
    return open_foreign(place, vocabulary_size=400)


def test_damage_in_the_storage_is_found(s3, prepared):
    upload(prepared, "damaged")
    storage, name = fsspec.filesystem("s3"), next(prepared.glob("train-*.bin")).name
    raw = bytearray(storage.cat_file(f"corpus/damaged/{name}"))
    raw[7] ^= 1
    storage.pipe_file(f"corpus/damaged/{name}", bytes(raw))
    tokens = open_split(open_place("s3://corpus/damaged"), "train")
    with pytest.raises(ValueError, match=r"s3://corpus/damaged/.*bin, block 0 .* differ from"):
        tokens.read(0, 1000)


@pytest.mark.parametrize("name", ["changing.bin", "chang*.bin"])
def test_a_file_that_changes_while_it_is_read_is_refused_and_not_kept(s3, monkeypatch, name):
    monkeypatch.setattr(places, "CACHED_BYTES", 2**12)
    storage, content = fsspec.filesystem("s3"), {7: b"\7\0" * 2**13, 9: b"\t\0" * 2**13}
    storage.pipe_file("corpus/changing.bin", content[7])
    tokens = open_foreign(f"s3://corpus/{name}", vocabulary_size=400, dtype="uint16")
    assert tokens.read(0, 2).tolist() == [7, 7]
    storage.pipe_file("corpus/changing.bin", content[9])
    assert tokens.read(0, 2).tolist() == [7, 7]  # what was read before is of one file
    with pytest.raises(ValueError, match="changing.bin has changed .*; start again with what is"):
        tokens.read(2**13 - 2, 2)
    storage.pipe_file("corpus/changing.bin", content[7])  # of the same etag as before
    again = open_foreign(f"s3://corpus/{name}", vocabulary_size=400, dtype="uint16")
    for one in (tokens, again):
        assert (one.read(0, 2**13) == 7).all()


def test_a_block_that_another_deletes_while_it_is_written_is_not_kept(tmp_path, monkeypatch):
    cache, write = BlockCache(tmp_path, 64_000), Path.write_bytes

    def write_and_lose(path, block):
        write(path, block)
        path.unlink()  # as what makes room does

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_and_lose)
        cache.write("a", 0, b"block")
    assert cache.read("a", 0, 0, 5) is None
    cache.write("a", 0, b"block")
    assert cache.read("a", 0, 0, 5) == b"block"


def test_the_cache_stays_below_its_limit_and_drops_what_was_read_longest_ago(tmp_path):
    cache, limit = BlockCache(tmp_path, 64_000), 64_000
    draw, content = np.random.default_rng(0), {}
    for number in range(150):
        content[number] = draw.bytes(1000)
        cache.write("a", number, content[number])
        assert cache.read("a", 0, 0, 1000) == content[0]  # the one that is always read
        found = {int(path.name): path.read_bytes()[:1000] for path in tmp_path.glob("a/*")}
        assert sum(path.stat().st_size for path in tmp_path.glob("a/*")) <= limit
        assert all(content[key] == value for key, value in found.items())
        assert number in found
    threads = [
        threading.Thread(
            target=lambda k=k: [cache.write(f"{k}", n, bytes(1000)) for n in range(99)]
        )
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= limit
    assert not list(tmp_path.glob("*/*.tmp"))


def test_a_server_that_fails_for_a_while_is_asked_again(s3, bucket, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(places, "CACHED_BYTES", 2**15)
    there = open_foreign("s3://corpus/arrays/llmc.bin", vocabulary_size=400)
    local = open_foreign(bucket / "llmc.bin", vocabulary_size=400)
    s3.failures, s3.failed, s3.failing = 2, 0, "llmc.bin"
    assert np.array_equal(there.read(0, 70_000), local.read(0, 70_000))
    assert s3.failed == 2


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://corpus/nothing", "data.path=s3://corpus/nothing holds no manifest.json"),
        ("s3://corpus/nothing.bin", "s3://corpus/nothing.bin: there is no such file"),
        ("s3://key:secret@corpus/a.bin", "data.path=s3://corpus/a.bin: the URL holds credentials"),
        ("nowhere://corpus/a.bin", "data.path=nowhere://corpus/a.bin: no storage of this protocol"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(s3, recipe, url, reason):
    with pytest.raises(ValueError, match=reason) as error:
        open_corpus(change(recipe, data={"path": url, "validation": "none"}))
    assert "secret" not in str(error.value)


@pytest.mark.slow
def test_a_run_on_tokens_behind_a_url_survives_the_server_and_is_bit_equal(
    s3, bucket, prepared, tmp_path
):
    def train(path, name, *flags):
        flags = [*tiny_flags(path, tmp_path / name), "--checkpoint.every", "2", *flags]
        return launch(*flags, environment={"AWS_MAX_ATTEMPTS": "1"})

    assert train(prepared, "local").returncode == 0
    expected = read_rows(tmp_path / "local")
    # A cache that holds nothing: every window is asked for. The server goes away after some.
    remotely = ("s3://corpus/prepared", "there", "--data.remote_cache_gib", "1e-6")
    s3.failing, s3.passing, s3.failures = "/train-", 40, 10**9
    broken = train(*remotely)
    s3.failures = s3.passing = 0
    # The launcher shows its own traceback behind the line of the run.
    assert broken.stderr.count("Traceback") == 1, broken.stderr
    assert f"returned non-zero exit status {FAILED}" in broken.stderr
    line = broken.stderr.splitlines()[0]
    assert line.startswith("error: data.path: s3://corpus/prepared/train-"), line
    assert "cannot be read" in line and "once it can, start the same command again" in line
    assert 0 < len(read_rows(tmp_path / "there")) < len(expected)
    resumed = train(*remotely)
    assert resumed.returncode == 0, resumed.stderr
    assert "resum" in resumed.stdout + resumed.stderr
    assert read_rows(tmp_path / "there") == expected
    shown = broken.stdout + broken.stderr + resumed.stdout + resumed.stderr
    written = [path.read_bytes() for path in (tmp_path / "there").rglob("*") if path.is_file()]
    for secret in SECRETS.values():
        assert secret not in shown
        assert not any(secret.encode() in content for content in written)
