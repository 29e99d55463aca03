"""Arrays of Megatron-LM, by datatrove's writer and by the format: ids, documents, refusals."""

import struct

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.tokens.megatron_tokenizer import (
    MegatronDocumentTokenizer,
    MegatronTokenizedFile,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.data.tokens.foreign import open_foreign
from pretrain_lib.data.windows.batches import PackedDataset

CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}  # of the index, and of struct
NAMES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


def write_index(path, code, lengths, documents, *, version=1, starts=None, magic=b"MMIDIDX\0\0"):
    size, count = struct.calcsize(CODES.get(code, "i")), len(lengths)
    starts = starts or [size * sum(lengths[:i]) for i in range(count)]
    raw = magic + struct.pack("<QBQQ", version, code, count, len(documents))
    raw += struct.pack(f"<{count}i{count}q{len(documents)}q", *lengths, *starts, *documents)
    path.write_bytes(raw)


def write_ids(path, code, ids):
    path.write_bytes(struct.pack(f"<{len(ids)}{CODES[code]}", *ids))


@settings(deadline=None, max_examples=60)
@given(
    code=st.sampled_from(list(CODES)),
    documents=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=12).filter(
        lambda documents: any(any(lengths) for lengths in documents)
    ),
    window=st.integers(1, 9),
)
def test_every_integer_type_is_read_with_its_documents(tmp_path_factory, code, documents, window):
    folder = tmp_path_factory.mktemp("megatron")
    lengths = [length for sequences in documents for length in sequences]
    ids = [i % 128 for i in range(sum(lengths))]
    firsts = [0, *np.cumsum([len(sequences) for sequences in documents]).tolist()]
    write_ids(folder / "text_document.bin", code, ids)
    write_index(folder / "text_document.idx", code, lengths, firsts)
    tokens = open_foreign(folder / "text_document.bin", vocabulary_size=128)
    assert tokens.files[0].dtype.name == NAMES[code]
    assert tokens.has_documents
    assert tokens.read(0, len(tokens)).tolist() == ids
    ends = np.cumsum([sum(sequences) for sequences in documents]).tolist()
    assert np.concatenate(list(tokens.iterate_ends())).tolist() == ends
    for start in range(0, len(ids), window):
        count = min(window, len(ids) - start)
        inside = sorted({end - start for end in ends if start < end < start + count})
        assert tokens.document_ends(start, count).tolist() == inside


@pytest.mark.parametrize("token_size", [2, 4])
def test_files_of_datatrove_are_read_as_written(tmp_path, token_size):
    documents = [[7] * 5, [70_000 if token_size == 4 else 60_000, 1], [3]]
    file = MegatronTokenizedFile(str(tmp_path), "00000_tokens", token_size=token_size)
    for document in documents:
        file.write(document)
    file.close()
    tokens = open_foreign(tmp_path / "00000_tokens.bin", vocabulary_size=2**17)
    assert tokens.read(0, 8).tolist() == sum(documents, [])
    assert tokens.document_ends(0, 8).tolist() == [5, 7]


def test_text_that_datatrove_tokenized_trains_with_its_documents_apart(tmp_path, prepared):
    tokenizer, texts = prepared / "tokenizer" / "tokenizer.json", ["one text", "another", "third"]
    writer = MegatronDocumentTokenizer(str(tmp_path), "my", str(tokenizer), eos_token=None)
    writer.run(iter([Document(text=text, id=text) for text in texts]))
    tokens = open_foreign(tmp_path / "my_00000_tokens.bin", vocabulary_size=2**16)
    ids = [load_tokenizer(prepared / "tokenizer").encode(text) for text in texts]
    assert tokens.read(0, len(tokens)).tolist() == [int(i) for own in ids for i in own]
    dataset = PackedDataset(tokens, sequence_length=len(tokens) - 1, document_masking=True)
    ends = np.cumsum([len(own) for own in ids])[:-1].tolist()
    assert [e for e in dataset[0]["document_ends"].tolist() if e < len(tokens) - 1] == ends


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"magic": b"TNTIDX\0\0\0"}, "x.idx: not an index of Megatron-LM"),
        ({"version": 2}, "x.idx: version 2 of Megatron-LM's index; only 1"),
        ({"code": 6}, r"x.idx: type code 6 \(float64\) is not of ids"),
        ({"code": 9}, r"x.idx: type code 9 \(unknown\)"),
        ({"lengths": [3, -1, 4]}, "x.idx: a sequence has -1 tokens"),
        ({"starts": [0, 4, 2]}, "x.idx: its sequences do not begin where"),
        ({"documents": [0, 2, 1]}, "x.idx: its document indices do not ascend"),
        ({"documents": [1, 3]}, "x.idx: its document indices do not ascend from 0"),
        ({"documents": [0, 4]}, "x.idx: .* from 0 to 3 sequences"),
        ({"documents": [0, 1]}, "x.idx: .* from 0 to 3 sequences"),
        ({"documents": [0]}, "x.idx: .* from 0 to 3 sequences"),
        ({"documents": []}, "x.idx: .* from 0 to 3 sequences"),
        ({"lengths": [3, 1, 3]}, "x.bin: 12 bytes, but x.idx lists 7 ids of uint16, 14 bytes"),
        ({"lengths": [3, 1, 1]}, "x.bin: 12 bytes, but x.idx lists 5 ids"),
    ],
)
def test_an_index_that_is_wrong_or_of_other_ids_is_refused(tmp_path, options, message):
    options = {"code": 8, "lengths": [3, 1, 2], "documents": [0, 1, 3]} | options
    write_ids(tmp_path / "x.bin", 8, range(6))
    write_index(tmp_path / "x.idx", **options)
    with pytest.raises(ValueError, match=message):
        open_foreign(tmp_path / "x.bin", vocabulary_size=None)


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda _: b""])
def test_an_index_of_another_size_is_refused(tmp_path, change):
    write_ids(tmp_path / "x.bin", 8, range(6))
    write_index(tmp_path / "x.idx", 8, [6], [0, 1])
    assert len(open_foreign(tmp_path / "x.bin", vocabulary_size=6)) == 6
    (tmp_path / "x.idx").write_bytes(change((tmp_path / "x.idx").read_bytes()))
    with pytest.raises(ValueError, match="x.idx: (6[13] bytes, but|not an index)"):
        open_foreign(tmp_path / "x.bin", vocabulary_size=None)


def test_a_type_that_the_index_contradicts_is_refused(tmp_path):
    write_ids(tmp_path / "x.bin", 4, range(6))
    write_index(tmp_path / "x.idx", 4, [6], [0, 1])
    with pytest.raises(ValueError, match="data.dtype=uint32, but .*x.bin holds int32"):
        open_foreign(tmp_path / "x.bin", vocabulary_size=None, dtype="uint32")
