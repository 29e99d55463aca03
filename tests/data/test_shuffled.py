"""Documents in an order of their own every epoch: the same tokens, other neighbours."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.data.permutation import derive_keys, permute
from pretrain_lib.data.tokens.arrays import TokenArray, TokenFile
from pretrain_lib.data.tokens.foreign import open_foreign
from pretrain_lib.data.windows.batches import PackedDataset
from pretrain_lib.data.windows.best_fit import open_plan
from pretrain_lib.data.windows.packing import IGNORED_TARGET
from pretrain_lib.data.windows.shuffled import ShuffledDocuments
from tests.shards import write_documents

DTYPE = np.dtype("<u4")
SEED, SOURCE = 5, 1


def write(folder, shards, *, last_ends=()):
    """Write shards of documents of these lengths, all tokens distinct; return them as an array.

    The last document of each shard whose number is in `last_ends` goes on in the next.
    """
    files, first = [], 0
    for number, lengths in enumerate(shards):
        documents = []
        for length in lengths:
            documents.append(np.arange(first, first + length))
            first += length
        ends = number not in last_ends
        write_documents(folder, f"s{number}", documents, dtype=DTYPE, last_ends=ends)
        files.append(TokenFile(folder / f"s{number}.bin", sum(lengths), DTYPE, is_shard=True))
    return TokenArray(files)


def plain(shards, epoch, *, last_ends=()):
    """Return the documents of an epoch one by one, permuted in memory."""
    documents, first, goes_on = [], 0, False
    for number, lengths in enumerate(shards):
        for length in lengths:
            ids = list(range(first, first + length))
            documents = [*documents[:-1], documents[-1] + ids] if goes_on else [*documents, ids]
            goes_on, first = False, first + length
        goes_on = number in last_ends and bool(lengths)
    keys = derive_keys("document", SEED, SOURCE, epoch)
    places = permute(np.arange(len(documents)), size=len(documents), keys=keys)
    return [documents[i] for i in np.argsort(places)]


@given(size=st.integers(1, 5000), key=st.integers(0, 99), data=st.data())
def test_the_inverse_of_a_permutation_gives_the_indices_back(size, key, data):
    keys = derive_keys("test", key)
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50)))
    places = permute(indices, size=size, keys=keys)
    assert permute(places, size=size, keys=keys, inverse=True).tolist() == indices.tolist()


@given(
    shards=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=90), min_size=1, max_size=3),
    epoch=st.integers(0, 3),
    open_first=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_reads_like_the_documents_permuted_in_memory(
    shards, epoch, open_first, data, tmp_path_factory
):
    shards = [[*lengths, 3] for lengths in shards]
    last_ends = {0} if open_first else set()
    tokens = write(tmp_path_factory.mktemp("shards"), shards, last_ends=last_ends)
    documents = plain(shards, epoch, last_ends=last_ends)
    flat = [token for document in documents for token in document]
    ends = np.cumsum([len(document) for document in documents]).tolist()
    shuffled = ShuffledDocuments(tokens, seed=SEED, source=SOURCE, epoch=epoch)
    assert len(shuffled) == len(flat)
    start = data.draw(st.integers(0, len(flat) - 1))
    count = data.draw(st.integers(1, len(flat) - start))
    found = np.empty(count, dtype=np.int64)
    shuffled.read_into(start, found)
    assert found.tolist() == flat[start : start + count]
    inside = sorted({end - start for end in ends if 0 < end - start < count})
    assert shuffled.document_ends(start, count).tolist() == inside


@pytest.fixture
def tokens(tmp_path):
    lengths = [3 + i % 11 for i in range(128)]
    return write(tmp_path, [lengths[:50], lengths[50:]])


@pytest.mark.parametrize("masking", [False, True], ids=["plain", "document_masking"])
def test_an_epoch_holds_each_token_once_and_documents_whole(tokens, masking):
    options = {"sequence_length": 16, "seed": SEED, "document_masking": masking}
    dataset = PackedDataset(tokens, shuffle="documents", **options)
    rows = dataset.batch(range(len(dataset)))
    read = rows["input_ids"].flatten().tolist()
    assert len(set(read)) == len(read)  # all tokens are distinct
    begins = {0, *np.concatenate(list(tokens.iterate_ends())).tolist()}
    pairs = zip(read, rows["targets"].flatten().tolist(), strict=True)
    for token, target in pairs:
        ends_here = token + 1 in begins
        if not ends_here:
            assert target == token + 1
        elif masking:
            assert target == IGNORED_TARGET
        else:
            assert target in begins


def test_neighbours_differ_from_epoch_to_epoch(tokens):
    def neighbours(shuffle):
        dataset = PackedDataset(tokens, sequence_length=16, seed=SEED, shuffle=shuffle)
        epochs = [range(e * len(dataset), (e + 1) * len(dataset)) for e in range(2)]
        read = [dataset.batch(epoch) for epoch in epochs]
        joined = [
            {(a, b) for row in rows["input_ids"].tolist() for a, b in pairwise(row) if b != a + 1}
            for rows in read
        ]
        return joined[0] & joined[1]

    assert not neighbours("windows")  # side by side in the array: no pair but successors
    assert len(neighbours("documents")) < 5


def test_masked_tokens_are_ignored_wherever_they_stand(tmp_path):
    lengths = [3 + i % 11 for i in range(128)]
    total = sum(lengths)
    np.arange(total, dtype="<u2").tofile(tmp_path / "a.ds")
    np.cumsum(lengths, dtype="<u8").tofile(tmp_path / "a.ds.index")
    counted = np.random.default_rng(0).integers(0, 2, total).astype(np.uint8)
    counted.tofile(tmp_path / "a.ds.loss")
    options = {"sequence_length": 16, "seed": SEED, "shuffle": "documents"}
    masked = PackedDataset(open_foreign(tmp_path / "a.ds", vocabulary_size=None), **options)
    rows = masked.batch(range(len(masked)))
    (tmp_path / "a.ds.loss").unlink()
    plain = PackedDataset(open_foreign(tmp_path / "a.ds", vocabulary_size=None), **options)
    targets = plain.batch(range(len(plain)))["targets"].numpy()
    expected = np.where(counted[targets], targets, IGNORED_TARGET)
    assert rows["targets"].tolist() == expected.tolist()


def test_any_batch_is_the_same_whatever_was_read_before(tokens):
    options = {"sequence_length": 16, "seed": SEED, "shuffle": "documents"}
    whole, resumed = PackedDataset(tokens, **options), PackedDataset(tokens, **options)
    length = len(whole)
    positions = [0, length - 1, length, 2 * length, 3 * length + 5]
    one_by_one = [whole.batch([position])["input_ids"][0].tolist() for position in positions]
    assert resumed.batch(positions[::-1])["input_ids"].tolist() == one_by_one[::-1]


def test_orders_are_frozen(tokens):
    dataset = PackedDataset(tokens, sequence_length=8, seed=0, shuffle="documents")
    windows = dataset.batch([0, len(dataset), 2 * len(dataset)])["input_ids"].tolist()
    assert windows == [
        [556, 557, 558, 559, 560, 385, 386, 387],
        [237, 238, 528, 529, 530, 880, 881, 882],
        [365, 366, 367, 368, 369, 209, 210, 211],
    ]


def test_what_does_not_go_with_it_is_refused(tokens, tmp_path):
    ends = tokens.iterate_ends
    plan = open_plan(ends, len(tokens), tmp_path / "plan", fingerprint="f", sequence_length=16)
    with pytest.raises(ValueError, match="data.shuffle=documents does not go with data.packing"):
        PackedDataset(tokens, sequence_length=16, plans=[plan], shuffle="documents")
    np.save(tmp_path / "flat.npy", np.arange(100))
    flat = open_foreign(tmp_path / "flat.npy", vocabulary_size=None)
    with pytest.raises(ValueError, match="data.shuffle=documents needs document ends"):
        PackedDataset(flat, sequence_length=16, shuffle="documents")
