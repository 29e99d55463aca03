"""Arrays of tokens that others wrote, by their own writers: what is read, and what is refused."""

import struct

import numpy as np
import pytest
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.data.tokens.foreign import open_foreign
from pretrain_lib.data.windows.batches import PackedDataset
from pretrain_lib.data.windows.packing import IGNORED_TARGET
from tests.shards import write_documents

INTEGERS = [f"{order}{kind}{size}" for order in "<>" for kind in "iu" for size in (1, 2, 4, 8)]
GPT2 = (20240520, 1, "H")  # magic, version and type of llm.c's files
LLAMA3 = (20240801, 7, "I")


def random_ids(size, *, below=50_257, seed=0):
    return np.random.default_rng(seed).integers(0, below, size)


def write_nanogpt(path, ids):
    """Write ids as nanoGPT's data/openwebtext/prepare.py does, batch after batch."""
    array = np.memmap(path, dtype=np.uint16, mode="w+", shape=(len(ids),))
    start = 0
    for batch in np.array_split(ids, 7):
        array[start : start + len(batch)] = batch
        start += len(batch)
    array.flush()


def write_llmc(path, ids, kind):
    magic, version, letter = kind
    header = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(ids)}{letter}", *ids))


def write_datatrove(folder, name, documents, token_size):
    file = TokenizedFile(str(folder), name, token_size=token_size)
    for document in documents:
        file.write(document, None)
    file.close()
    return file.doc_ends


@pytest.mark.parametrize("dtype", INTEGERS)
def test_npy_of_any_integer_type_reads_as_numpy_reads_it(tmp_path, dtype):
    ids = (np.arange(1000) * 7 % 128).astype(dtype)
    np.save(tmp_path / "ids.npy", ids)
    split = open_foreign(tmp_path / "ids.npy", vocabulary_size=128)
    assert len(split) == 1000
    assert not split.has_documents
    assert split.read(0, 1000).tolist() == np.load(tmp_path / "ids.npy").tolist()
    assert split.read(123, 45).tolist() == ids[123:168].tolist()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_of_any_version_is_read(tmp_path, version):
    with (tmp_path / "ids.npy").open("wb") as file:
        np.lib.format.write_array(file, np.arange(100), version=version)
    split = open_foreign(tmp_path / "ids.npy", vocabulary_size=100)
    assert split.read(0, 100).tolist() == list(range(100))


def test_nanogpt_bin_reads_as_written(tmp_path):
    ids = random_ids(5001)
    write_nanogpt(tmp_path / "train.bin", ids)
    split = open_foreign(tmp_path / "train.bin", vocabulary_size=50_257)
    assert len(split) == 5001
    assert not split.has_documents
    assert split.read(0, 5001).tolist() == ids.tolist()
    assert split.read(17, 3000).tolist() == ids[17:3017].tolist()


@pytest.mark.parametrize(("kind", "vocabulary"), [(GPT2, 50_257), (LLAMA3, 128_256)])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_llmc_bin_reads_as_written(tmp_path_factory, kind, vocabulary, data):
    ids = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=50))
    path = tmp_path_factory.mktemp("llmc") / "train.bin"
    write_llmc(path, ids, kind)
    split = open_foreign(path, vocabulary_size=vocabulary)
    assert len(split) == len(ids)
    assert split.read(0, len(ids)).tolist() == ids
    start = data.draw(st.integers(0, len(ids) - 1))
    assert split.read(start, len(ids) - start).tolist() == ids[start:]


@pytest.mark.parametrize("token_size", [2, 4])
@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    window=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_datatrove_files_read_with_their_documents(
    tmp_path_factory, token_size, lengths, window, seed
):
    folder = tmp_path_factory.mktemp("ds")
    vocabulary = 2**15 if token_size == 2 else 2**20
    documents = [random_ids(n, below=vocabulary, seed=seed).tolist() for n in lengths]
    ids = [i for document in documents for i in document]
    ends = write_datatrove(folder, "00000.ds", documents, token_size)
    split = open_foreign(folder / "00000.ds", vocabulary_size=vocabulary)
    assert split.has_documents
    assert len(split) == len(ids)
    assert split.read(0, len(ids)).tolist() == ids
    assert ends == np.cumsum(lengths).tolist()
    assert split.document_ends(0, len(ids)).tolist() == ends[:-1]
    for start in range(0, len(ids), window):
        count = min(window, len(ids) - start)
        inside = [end - start for end in ends if start < end < start + count]
        assert split.document_ends(start, count).tolist() == inside


def test_datatrove_files_can_be_trained_on_with_masked_documents(tmp_path):
    parts = np.split(np.arange(1000), np.cumsum(random_ids(60, below=30)).clip(max=1000))
    documents = [part.tolist() for part in parts if len(part)]
    begins = {document[0] for document in documents}
    write_datatrove(tmp_path, "0.ds", documents[:20], 2)
    write_datatrove(tmp_path, "1.ds", documents[20:], 2)
    tokens = open_foreign(tmp_path / "*.ds", vocabulary_size=1000)
    dataset = PackedDataset(tokens, sequence_length=64, document_masking=True)
    assert len(dataset) >= 14
    for window in (dataset[i] for i in range(len(dataset))):
        start = int(window["input_ids"][0])  # ids are places
        assert window["input_ids"].tolist() == list(range(start, start + 64))
        # The label that crosses from a document to the next is left out.
        own = [IGNORED_TARGET if i in begins else i for i in range(start + 1, start + 65)]
        assert window["targets"].tolist() == own
        inside = [i - start for i in range(start + 1, start + 64) if i in begins]
        assert window["document_ends"].tolist() == inside + [64] * (64 - len(inside))


def test_files_that_a_pattern_matches_are_one_array_in_the_order_of_their_names(tmp_path):
    for name in ("val_0", "train_2", "train_1", "train_10"):
        write_nanogpt(tmp_path / f"{name}.bin", random_ids(100, seed=len(name)))
    parts = [np.fromfile(tmp_path / f"train_{i}.bin", dtype="<u2") for i in ("1", "10", "2")]
    split = open_foreign(tmp_path / "train_*.bin", vocabulary_size=50_257)
    assert len(split) == 300
    assert split.read(0, 300).tolist() == np.concatenate(parts).tolist()
    assert split.read(90, 150).tolist() == np.concatenate(parts)[90:240].tolist()
    write_nanogpt(tmp_path / "[x].bin", random_ids(7))
    assert len(open_foreign(tmp_path / "[x].bin", vocabulary_size=50_257)) == 7


def test_one_bad_file_of_many_is_named(tmp_path):
    for number in range(3):
        write_nanogpt(tmp_path / f"{number}.bin", random_ids(100))
    (tmp_path / "1.bin").write_bytes(b"odd")
    with pytest.raises(ValueError, match="1.bin: 3 bytes are not a whole number of uint16 ids"):
        open_foreign(tmp_path / "*.bin", vocabulary_size=50_257)


@pytest.mark.parametrize(("dtype", "bad"), [("<u2", 100), ("<i4", -1), (">i8", 2**40)])
def test_id_outside_the_vocabulary_is_named_at_the_read_that_meets_it(tmp_path, dtype, bad):
    ids = np.arange(100, dtype=dtype)
    ids[50] = bad
    np.save(tmp_path / "ids.npy", ids)
    split = open_foreign(tmp_path / "ids.npy", vocabulary_size=100)
    assert split.read(0, 50).tolist() == list(range(50))
    with pytest.raises(ValueError, match=f"token id {bad} in .*ids.npy .*vocabulary of 100"):
        split.read(40, 20)


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 3), int), np.zeros(5), np.array(3), np.zeros(5, bool), np.zeros(0, int)]
)
def test_arrays_that_are_no_tokens_are_refused(tmp_path, wrong):
    np.save(tmp_path / "ids.npy", wrong)
    with pytest.raises(ValueError, match="ids.npy"):
        open_foreign(tmp_path / "ids.npy", vocabulary_size=10)


@pytest.mark.parametrize("shape", [(100,), (10, 10), (1, 100)])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i8"])
def test_the_remedy_for_an_array_of_another_shape_or_type_works(tmp_path, shape, dtype):
    ids = random_ids(100).astype(dtype)
    np.save(tmp_path / "ids.npy", ids.reshape(shape))
    if len(shape) > 1 or dtype != "i8":
        with pytest.raises(
            ValueError, match="ids.npy: must be a one-dim.*if it holds ids"
        ) as error:
            open_foreign(tmp_path / "ids.npy", vocabulary_size=None)
        remedy = str(error.value).split("if it holds ids, ")[1]
        paths = {"FILE": str(tmp_path / "ids.npy"), "NEW": str(tmp_path / "ids.npy")}
        eval(remedy, {"numpy": np, **paths})
    split = open_foreign(tmp_path / "ids.npy", vocabulary_size=None)
    assert split.read(0, 100).tolist() == ids.tolist()


def test_an_npz_that_was_renamed_is_no_array_of_bare_ids(tmp_path):
    np.savez(tmp_path / "a.npz", ids=random_ids(100))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="a.npy holds a ZIP archive, .*numpy.savez"):
        open_foreign(tmp_path / "a.npy", vocabulary_size=None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", None, "there is no such file"),
        ("a*.bin", None, "there is no such file"),
        ("a.npy", b"", "has no .npy header"),
        ("a.npy", b"\x93NUMPY\1\0", "is not a .npy array"),
        ("a.bin", b"", "holds no tokens; leave it out, or write it again"),
        ("a.bin", b"abc", "3 bytes are not a whole number of uint16 ids"),
        (
            "a.bin",
            struct.pack("<3i", 20240520, 2, 5),
            r"llm.c format .*\(20240520, 2\) is not",
        ),
        (
            "a.bin",
            struct.pack("<3i", 20240801, 1, 5),
            r"llm.c format .*\(20240801, 1\) is not",
        ),
        ("a.pt", b"abcd", "must end in .npy, .bin, .ds"),
        ("a.ds", b"abcd", "its index a.ds.index is missing"),
    ],
)
def test_files_that_are_missing_empty_or_unknown_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_foreign(tmp_path / name, vocabulary_size=10)
    assert str(tmp_path / name) in str(error.value)


def test_truncated_files_are_refused(tmp_path):
    ids = random_ids(5000).tolist()
    write_llmc(tmp_path / "llmc.bin", ids, GPT2)
    np.save(tmp_path / "ids.npy", np.array(ids))
    write_datatrove(tmp_path, "trove.ds", [ids[:3000], ids[3000:]], 2)
    for name, message in (
        ("llmc.bin", "11022 bytes, but its tokens need 11024"),
        ("ids.npy", "40126 bytes, but its tokens need 40128"),
        ("trove.ds", "9998 bytes do not fit the documents that trove.ds.index lists"),
    ):
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[:-2])
        with pytest.raises(ValueError, match=message):
            open_foreign(tmp_path / name, vocabulary_size=50_257)


def test_an_empty_shard_is_no_obstacle_and_nothing_but_empty_ones_are_refused(tmp_path):
    """A process of datatrove's without documents writes them."""
    (tmp_path / "0.ds").write_bytes(b"")
    (tmp_path / "0.ds.index").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\*\.ds holds no tokens$"):
        open_foreign(tmp_path / "*.ds", vocabulary_size=10)
    write_datatrove(tmp_path, "1.ds", [[1, 2, 3], [4]], 2)
    tokens = open_foreign(tmp_path / "*.ds", vocabulary_size=10)
    assert tokens.read(0, len(tokens)).tolist() == [1, 2, 3, 4]
    assert tokens.document_ends(0, 4).tolist() == [3]
    (tmp_path / "a.bin").write_bytes(b"")  # which says nothing of being empty
    np.save(tmp_path / "a.npy", np.empty(0, np.uint16))
    for name in ("a.bin", "a.npy"):
        with pytest.raises(ValueError, match=f"{name} holds no tokens; leave it out"):
            open_foreign(tmp_path / name, vocabulary_size=10)


def test_an_index_of_other_tokens_is_refused(tmp_path):
    write_datatrove(tmp_path, "a.ds", [[1, 2, 3]], 2)
    (tmp_path / "a.ds").write_bytes(bytes(7))
    with pytest.raises(ValueError, match="7 bytes do not fit"):
        open_foreign(tmp_path / "a.ds", vocabulary_size=10)


@pytest.mark.parametrize("length", [1, 3, 16])
def test_many_empty_documents_at_one_place_are_read(tmp_path, length):
    documents = [[1, 2, 3], *[[]] * 40, [4, 5], *[[]] * 40, list(range(6, 40)), [], []]
    write_datatrove(tmp_path, "a.ds", documents, 2)
    tokens = open_foreign(tmp_path / "a.ds", vocabulary_size=50)
    assert tokens.document_ends(0, 39).tolist() == [3, 5]
    dataset = PackedDataset(tokens, sequence_length=length, document_masking=True)
    for window in (dataset[i] for i in range(len(dataset))):
        first = tokens.read(0, 39).tolist().index(int(window["input_ids"][0]))
        inside = [end - first for end in (3, 5) if first < end < first + length]
        assert window["document_ends"].tolist() == inside + [length] * (length - len(inside))


def test_half_of_a_file_is_not_taken_for_shorter_ids(tmp_path):
    write_datatrove(tmp_path, "a.ds", [[1, 2, 3], [70_000]], 4)
    (tmp_path / "a.ds.metadata").write_text("a tokenizer|4\n4\n4 tokens")  # as datatrove does
    assert open_foreign(tmp_path / "a.ds", vocabulary_size=None).read(3, 1).tolist() == [70_000]
    (tmp_path / "a.ds").write_bytes((tmp_path / "a.ds").read_bytes()[:8])
    with pytest.raises(ValueError, match="are 2 for each of the 4 .*a.ds.metadata says 4"):
        open_foreign(tmp_path / "a.ds", vocabulary_size=None)


@pytest.mark.parametrize("token_size", [2, 4])
@pytest.mark.parametrize("below", [300, 50_257, 65_536])
def test_an_index_that_lacks_documents_does_not_change_the_type_of_the_ids(
    tmp_path, token_size, below
):
    ids = random_ids(2000, below=below)
    write_datatrove(tmp_path, "a.ds", [ids[:1000], ids[1000:]], token_size)
    path, dtype = tmp_path / "a.ds", f"uint{8 * token_size}"
    assert open_foreign(path, vocabulary_size=below).read(0, 2000).tolist() == ids.tolist()
    index = np.array([1000] if token_size == 2 else [1000, 2000, 4000], "<u8")
    (tmp_path / "a.ds.index").write_bytes(index.tobytes())
    with pytest.raises(ValueError, match=f"the values are those of {token_size}-byte ids; copy"):
        open_foreign(path, vocabulary_size=None)
    other = open_foreign(path, vocabulary_size=None, dtype=f"uint{48 - 8 * token_size}")
    assert len(other) == index[-1]
    with pytest.raises(ValueError, match=f"the values are those of {token_size}-byte ids; copy"):
        open_foreign(path, vocabulary_size=None, dtype=dtype)


def test_an_index_that_falls_is_refused(tmp_path):
    write_datatrove(tmp_path, "a.ds", [[1, 2, 3], [4], [5, 6]], 2)
    (tmp_path / "a.ds.index").write_bytes(struct.pack("<3Q", 4, 3, 6))
    with pytest.raises(ValueError, match="a.ds.index: document 1 ends at token 3, before document"):
        open_foreign(tmp_path / "a.ds", vocabulary_size=10)


def test_an_index_without_documents_is_refused(tmp_path):
    write_datatrove(tmp_path, "a.ds", [], 2)
    with pytest.raises(ValueError, match="a.ds holds no tokens"):
        open_foreign(tmp_path / "a.ds", vocabulary_size=10)


def test_a_shard_of_a_prepared_folder_is_not_taken_for_an_array(tmp_path):
    write_documents(tmp_path, "train-00000-000", [np.arange(9)])
    for name in ("train-00000-000.bin", "*.npy"):
        with pytest.raises(ValueError, match="is a shard of a prepared folder: give the folder"):
            open_foreign(tmp_path / name, vocabulary_size=9)
    (tmp_path / "val.json").write_text('{"note": "of somebody else"}')
    np.arange(20, 29, dtype="<u2").tofile(tmp_path / "val.bin")
    assert open_foreign(tmp_path / "val.bin", vocabulary_size=None).read(0, 1).tolist() == [20]
