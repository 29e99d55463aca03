"""Formats of text: the documents that other readers find, wherever a file is cut."""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import re
import tarfile
import zipfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pretrain_lib.data.text import documents, formats, separators
from pretrain_lib.data.text.documents import Fields, FileSlice
from pretrain_lib.data.text.formats import Document, Rejected, cut_file, read_documents
from pretrain_lib.data.text.opening import open_source
from pretrain_lib.data.text.other_formats import refuse_other_format

SIZES = (1, 7, 500, 2**62)
DRAW = random.Random(0)
COMPRESSORS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
TEXTS = ["", " ", "Größe\n\u2028\x85大きさ 😀", *("a b\r\n" * (i % 7) for i in range(60))]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
# Letters, places to cut, and characters of one to four bytes that are none.
cut_text = st.lists(st.sampled_from("a7 \n\t.é你😀\u3000\ufeff"), max_size=60).map("".join)


def read(path, size=2**62, *, text_field="text", cut_text=True):
    pieces = cut_file(path, size, text_field=text_field, cut_text=cut_text)
    return [document for piece in pieces for document in read_documents(piece, Fields(text_field))]


def lines(texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def in_members(texts, compress):
    """Compress every ten lines, and a blank one, on their own, as parallel compressors do."""
    parts = (texts[i : i + 10] for i in range(0, len(texts), 10))
    return b"".join(compress(lines(part) + b" \n") for part in parts)


def write_parquet(path, texts, *, kind=None, **options):
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, kind or pa.string())})
    parquet.write_table(table, path, **options)


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(unicode_text, min_size=1),
    ascii_only=st.booleans(),
    blank=st.sampled_from([b"\n", b"\n\n", b"\n  \n", b"\r\n"]),
    final=st.booleans(),
    size=st.integers(1, 60),
    part=st.sampled_from([1, 5, 2**20]),
)
def test_lines_do_not_depend_on_where_the_file_is_cut(
    tmp_path_factory, texts, ascii_only, blank, final, size, part
):
    written = [json.dumps({"text": t}, ensure_ascii=ascii_only).encode() for t in texts]
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(blank.join(written) + (blank if final else b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "LINE_PART_BYTES", part)
        assert read(path, size) == [Document(text) for text in texts]


def test_a_long_line_is_skipped_without_being_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LINE_PART_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["x" * 100_000, "last"]))
    pieces = cut_file(path, 1000, text_field="text", cut_text=True)
    with path.open("rb", buffering=0) as file:
        assert list(formats._lines_of_slice(file, pieces[1])) == []
        assert file.tell() <= pieces[1].stop + 100


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.jsonl.gz", gzip.compress),
        ("a.json.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
        ("a.json.zst", zstandard.ZstdCompressor(write_checksum=True).compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor(write_content_size=False).compress),
    ],
)
def test_compressed_lines_are_the_lines_that_were_compressed(tmp_path, name, compress, size):
    (tmp_path / name).write_bytes(compress(lines(TEXTS)))
    expected = [Document(text) for text in TEXTS]
    assert read(tmp_path / name, size) == expected
    (tmp_path / name).write_bytes(in_members(TEXTS, compress))
    assert read(tmp_path / name, size) == expected


def test_frames_that_readers_of_zstd_skip_are_skipped(tmp_path):
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"
    frame = zstandard.ZstdCompressor().compress(lines(TEXTS))
    (tmp_path / "a.jsonl.zst").write_bytes(skipped + frame + skipped)
    assert read(tmp_path / "a.jsonl.zst") == [Document(text) for text in TEXTS]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_parquet_rows_are_those_that_pyarrow_reads(tmp_path, kind, compression, size):
    path, texts = tmp_path / "a.parquet", [*TEXTS, None, "after a null"]
    write_parquet(path, texts, kind=kind, compression=compression, row_group_size=9)
    expected = parquet.read_table(path)["text"].to_pylist()
    assert expected == texts
    assert read(path, size) == [Document(text or "") for text in expected]
    slices = cut_file(path, size, text_field="text", cut_text=True)
    assert len(slices) == {1: -(-len(texts) // 9), 2**62: 1}.get(size, len(slices))


def test_parquet_slices_are_of_about_the_size_asked_for(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["x" * 90 + f"{i:05d}" for i in range(40)], row_group_size=1)
    pieces = cut_file(path, 1000, text_field="text", cut_text=True)
    assert all(1000 <= piece.text_bytes < 1200 for piece in pieces[:-1])
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert (pieces[0].start, pieces[-1].stop) == (0, 40)


def test_parquet_is_cut_by_the_size_of_its_text_alone(tmp_path):
    path = tmp_path / "a.parquet"
    within = [{"text": str(i) * 10_000} for i in range(20)]  # a field of the same name
    table = pa.table({"meta": within, "text": ["some text"] * 20})
    parquet.write_table(table, path, row_group_size=2, compression="none")
    (piece,) = cut_file(path, 2000, text_field="text", cut_text=True)
    assert 20 * 9 <= piece.text_bytes < 2000
    assert read(path) == [Document("some text")] * 20


def test_a_folder_of_all_formats_gives_every_document_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["in lines"]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(["in gzip"])))
    (tmp_path / "c.json.zst").write_bytes(zstandard.compress(lines(["in zstd"])))
    write_parquet(tmp_path / "d.parquet", ["in parquet"])
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "e.txt").write_text("in text")
    (tmp_path / "f.json").write_bytes(lines(["of a kind that is not read"]))
    source = open_source(str(tmp_path))
    found = [document for unit in source.units() for document in source.documents(unit)]
    kinds = ("lines", "gzip", "zstd", "parquet", "text")
    assert found == [Document(f"in {kind}") for kind in kinds]


@settings(deadline=None, max_examples=200)
@given(text=cut_text, size=st.integers(1, 40), window=st.sampled_from([3, 5, 2**16]))
def test_parts_of_a_text_together_are_the_file(tmp_path_factory, text, size, window):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CUT_SEARCH_BYTES", window)
        parts = read(path, size)
    assert parts == read(path, size)  # a file as small as this is searched at once
    assert "".join(part.text for part in parts) == text.removeprefix("\ufeff")
    assert [part.begins for part in parts] == [i == 0 for i in range(len(parts))]
    assert [part.ends for part in parts][::-1] == [i == 0 for i in range(len(parts))]
    for before, after in zip(parts, parts[1:], strict=False):
        assert before.text[-1] in "a7"
        assert after.text[0] in " \n"
    digests = {part.digest for part in parts}
    assert digests == {None} if len(parts) == 1 else len(digests) <= 1 and None not in digests
    whole = read(path, size, cut_text=False)
    assert whole == [Document(text.removeprefix("\ufeff"))]


def test_a_text_is_cut_wherever_it_can_be_behind_each_size(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 100)
    assert [part.text for part in read(tmp_path / "a.txt", 50)] == [
        "word " * 10 + "word",
        *[" word" * 10] * 8,
        " word" * 9 + " ",
    ]


@pytest.mark.parametrize("text", ["x" * 999, "你好。\n" * 99, "." * 50 + "\n" * 50, "a.b.c. " * 50])
def test_a_text_without_a_place_to_cut_is_one_part(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    for size in (1, 10, 100):
        assert read(tmp_path / "a.txt", size) == [Document(text)]


def test_parts_of_different_files_are_told_apart(tmp_path, monkeypatch):
    digests = set()
    monkeypatch.setattr(formats, "DIGEST_BYTES", 9)
    for text in ("word one " * 9, "word two " * 9, "word two " * 10):
        (tmp_path / "a.txt").write_text(text)
        (digest,) = {part.digest for part in read(tmp_path / "a.txt", 10)}
        digests.add(digest)
    assert len(digests) == 3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_truncated_file_of_lines_is_refused_behind_what_can_be_read(tmp_path, compress, share):
    texts = [f"{i} {DRAW.random()}" for i in range(20_000)]
    raw = compress(lines(texts))
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
    path.write_bytes(raw[: int(len(raw) * share)])
    found = []
    with pytest.raises(ValueError, match="restore the file, or move it away") as error:
        for piece in cut_file(path, 2**62, text_field="text", cut_text=True):
            found.extend(read_documents(piece, Fields("text")))
    assert found == [Document(text) for text in texts[: len(found)]]
    place = f"{path} cannot be read behind document {len(found):,}"
    assert f"{place} (the compressed data is truncated)" in str(error.value)
    assert len(found) >= (share - 0.2) * len(texts)


@pytest.mark.parametrize("share", [0, 0.3, 0.8, 0.99])
@pytest.mark.parametrize(
    ("name", "separator"), [("a.jsonl", None), ("a.txt", None), ("a.txt", "-")]
)
def test_a_file_that_becomes_shorter_is_refused_in_every_slice_that_it_lost(
    tmp_path, name, separator, share
):
    path = tmp_path / name
    texts = [f"text {i}" for i in range(100)]
    raw = lines(texts) if name == "a.jsonl" else "\n-\n".join(texts).encode()
    path.write_bytes(raw)
    pieces = cut_file(path, 150, text_field="text", cut_text=True, separator=separator)
    path.write_bytes(raw[: int(share * len(raw))])
    lost = [piece for piece in pieces if piece.stop > path.stat().st_size]
    assert lost
    for piece in lost:
        with pytest.raises(ValueError, match=f"{name} has changed .* prepare it again") as error:
            list(read_documents(piece, Fields(), separator=separator))
        assert "\n" not in str(error.value)
    for piece in set(pieces) - set(lost):
        assert list(read_documents(piece, Fields(), separator=separator))


def test_a_compressed_file_that_loses_a_member_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(in_members(TEXTS, gzip.compress))
    (piece,) = cut_file(path, 2**62, text_field="text", cut_text=True)
    path.write_bytes(in_members(TEXTS[:30], gzip.compress))
    with pytest.raises(ValueError, match="a.jsonl.gz has changed while it was read"):
        list(read_documents(piece, Fields()))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.xz", "a.ndjson.bz2"])
def test_a_file_that_is_not_compressed_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(lines(TEXTS))
    with pytest.raises(
        ValueError, match=r"\(it does not begin like .* rename it if it was"
    ) as error:
        read(tmp_path / name)
    assert "read behind document 0" in str(error.value)


def test_a_dictionary_that_is_missing_is_named(tmp_path):
    texts = [f"{{'text': 'sample number {i} of a dictionary'}}".encode() for i in range(3000)]
    dictionary = zstandard.train_dictionary(4096, texts)
    compress = zstandard.ZstdCompressor(dict_data=dictionary).compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(lines(TEXTS)))
    with pytest.raises(
        ValueError, match=r"with a dictionary.*; decompress it with that dictionary"
    ):
        read(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_nul_bytes_behind_the_last_line_are_blank(tmp_path, compress):
    path = tmp_path / ("a.jsonl" if compress is bytes else "a.jsonl.gz")
    for padding in (b"\0" * 50, b"\0" * 50 + b"\n", b" \0\n\0"):
        path.write_bytes(compress(lines(["a", "b"]) + padding))
        assert read(path) == [Document("a"), Document("b")]


@pytest.mark.parametrize(("kind", "compress"), COMPRESSORS.items())
def test_a_flipped_byte_of_a_compressed_file_is_refused(tmp_path, kind, compress):
    raw = bytearray(compress(lines([str(DRAW.random()) for _ in range(900)])))
    raw[len(raw) // 2] ^= 255
    (tmp_path / f"a.jsonl{kind}").write_bytes(raw)
    message = f"a.jsonl{kind} cannot be read behind document"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / f"a.jsonl{kind}")
    (tmp_path / f"a.jsonl{kind}").write_bytes(compress(lines(TEXTS))[:-5])
    with pytest.raises(ValueError, match=f"{message} .*truncated"):
        read(tmp_path / f"a.jsonl{kind}")


def long_window(log):
    """Compress like `zstd --long=LOG`."""
    options = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=log, enable_ldm=True, write_content_size=False
    )
    return zstandard.ZstdCompressor(compression_params=options).compressobj()


def test_a_zstd_file_with_a_long_window_is_read(tmp_path):
    compressor = long_window(30)
    raw = compressor.compress(lines(TEXTS)) + compressor.flush()
    assert zstandard.get_frame_parameters(raw).window_size == 2**30
    (tmp_path / "a.jsonl.zst").write_bytes(raw)
    assert read(tmp_path / "a.jsonl.zst") == [Document(text) for text in TEXTS]


def test_a_zstd_window_over_the_memory_limit_is_refused_with_a_remedy(tmp_path):
    # A frame header without content size, whose window descriptor says 2**35 bytes (RFC 8878).
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, (35 - 10) << 3]) + b"\1\0\0"
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    with pytest.raises(ValueError, match=r"a.jsonl.zst.*window is larger than 2048 MiB.*--long=31"):
        read(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize(("kind", "compress"), COMPRESSORS.items())
def test_padding_is_read_over_and_other_bytes_are_counted(tmp_path, kind, compress):
    expected, path = [Document(text) for text in TEXTS], tmp_path / f"a.jsonl{kind}"
    members = in_members(TEXTS, compress)
    path.write_bytes(members + b"\0" * 40_000)
    assert read(path) == expected
    path.write_bytes(members + b"\0" * 7 + compress(lines(["more"])))
    assert read(path) == [*expected, Document("more")]
    for garbage in (b"x", b"some other bytes" * 99, b"\0\0x"):
        path.write_bytes(members + garbage)
        *found, warning = read(path)
        assert found == expected
        assert (warning.where, warning.documents) == (str(path), 0)
        assert "are ignored" in warning.reason
    path.write_bytes(compress(b""))
    assert read(path) == []


@pytest.mark.parametrize(("kind", "compress"), [*COMPRESSORS.items(), ("", bytes)])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".ndjson", ".JSONL"])
def test_every_ending_is_read_with_every_compression_in_any_case(tmp_path, ending, kind, compress):
    content = "one\ntext" if ending == ".txt" else '{"text": "one\\ntext"}\n'
    for name in (ending + kind, ending + kind.upper()):
        path = tmp_path / f"a{name}"
        path.write_bytes(compress(content.encode()))
        assert read(path) == [Document("one\ntext")]


def separated(raw, line="<|sep|>"):
    """Split a text at lines as `splitlines` gives them."""
    documents = [[]]
    content = raw.decode("utf-8-sig")
    for part in io.StringIO(content, newline="\n"):
        if part.rstrip("\r\n") == line and part in (line, f"{line}\n", f"{line}\r\n", f"{line}\r"):
            documents.append([])
        else:
            documents[-1].append(part)
    texts = ["".join(parts) for parts in documents]
    texts = [re.sub(r"\r?\n\Z", "", text) for text in texts[:-1]] + texts[-1:]
    edges = [content.startswith(line) and not documents[0], not documents[-1]]
    return texts[edges[0] : len(texts) - edges[1]]


@settings(deadline=None, max_examples=300)
@given(
    parts=st.lists(
        st.sampled_from(["<|sep|>", "<|sep|>\n", "\n", "a", "é b\n", "\r\n", "<|sep", "|>", " "]),
        max_size=30,
    ),
    size=st.integers(1, 30),
    part=st.sampled_from([6, 9, 2**20]),
    mark=st.sampled_from([b"", codecs.BOM_UTF8]),
)
def test_documents_between_separator_lines_do_not_depend_on_where_the_file_is_cut(
    tmp_path_factory, parts, size, part, mark
):
    raw = mark + "".join(parts).encode()
    path = tmp_path_factory.mktemp("separated") / "a.txt"
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "LINE_PART_BYTES", part)
        patch.setattr(separators, "LINE_PART_BYTES", part)
        pieces = cut_file(path, size, text_field="", cut_text=False, separator="<|sep|>")
        found = [d for p in pieces for d in read_documents(p, Fields(), separator="<|sep|>")]
        assert found == [Document(text) for text in separated(raw)]
    packed = path.with_name("a.txt.gz")
    packed.write_bytes(gzip.compress(raw))
    (piece,) = cut_file(packed, size, text_field="", cut_text=False, separator="<|sep|>")
    assert list(read_documents(piece, Fields(), separator="<|sep|>")) == found


def test_a_long_line_before_any_separator_of_a_slice_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(separators, "LINE_PART_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_text("a line\n" + "x" * 100_000 + "\n<|sep|>\nlast\n")
    with path.open("rb", buffering=0) as file:
        piece = FileSlice(path, 1, 1000, 999)
        assert list(separators.read_separated(file, piece, "<|sep|>", to_end=False)) == []
        assert file.tell() <= 1000 + 100 + len("<|sep|>")


@pytest.mark.parametrize("separator", ["<|a|>\n", "<|a|>\r", "a\u2028", "a\x85", "\n", " ", ""])
def test_a_separator_is_a_line_without_its_break(separator):
    with pytest.raises(ValueError, match=r"document_separator=.* without its line break"):
        separators.check_separator(separator)


def test_a_separator_line_is_hinted_at(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n<|endoftext|>\ntwo\n")
    hint = separators.hint_at_separator([path])
    assert str(path) in hint
    assert "data.document_separator='<|endoftext|>'" in hint
    path.write_text("one\n<end>\ntwo\n<end>")
    assert "lines of <end>" in separators.hint_at_separator([path], "<end>")
    path.write_text("one <|endoftext|>\n<|endoftext|> two\n")
    assert separators.hint_at_separator([path]) is None


@pytest.mark.parametrize(("kind", "compress"), [*COMPRESSORS.items(), ("", bytes)])
def test_a_separator_that_is_no_line_of_its_own_is_hinted_at(tmp_path, monkeypatch, kind, compress):
    monkeypatch.setattr(separators, "HINT_BYTES", 40)
    path = tmp_path / f"a.txt{kind}"
    hint = f"hint: {path} has <|sep|> within lines, but no line"

    def hinted(raw):
        path.write_bytes(compress(raw))
        return separators.hint_at_missed_separator([path], "<|sep|>")

    for raw in (b"a<|sep|>b", b"a\r<|sep|>\rb", b"a\n<|sep|> \nb", b"a\n <|sep|>\nb", b"<|sep|>b"):
        assert hinted(raw).startswith(f"{hint} equals it")
        (piece,) = cut_file(path, 2**62, text_field="", cut_text=False, separator="<|sep|>")
        assert len(list(read_documents(piece, Fields(), separator="<|sep|>"))) == 1
        assert hinted(raw + b" " * 40).startswith(f"{hint} of its first 40 bytes equals it")
    for mark in (b"", codecs.BOM_UTF8):
        for raw in (b"one document", b"<|sep|>\na <|sep|>", b"a <|sep|>\n<|sep|>", b""):
            assert hinted(mark + raw) is None
        for size in range(20, 50):  # whose line is cut off, or behind what is searched
            assert hinted(mark + b"." * size + b"\n<|sep|>\nend of the text") is None
    if kind:
        path.write_bytes(compress(b"a<|sep|>b")[:-9])
        assert separators.hint_at_missed_separator([path], "<|sep|>") is None
        assert separators.hint_at_separator([path], "<|sep|>") is None
        path.write_bytes(compress(b"a\n<|sep|>\nb"))
        assert "lines of <|sep|>" in separators.hint_at_separator([path], "<|sep|>")


@pytest.mark.parametrize("line", [b"NaN", b"Infinity", b"-Infinity", b"9" * 5000, rb'"\ud800"'])
def test_a_line_that_python_writes_is_read_whatever_other_fields_hold(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"score": ' + line + b', "text": "good"}\n')
    assert read(tmp_path / "a.jsonl") == [Document("good")]


def test_a_null_is_an_empty_document_in_every_format(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["a", None, "b"]))
    write_parquet(tmp_path / "b.parquet", ["a", None, "b"])
    write_parquet(tmp_path / "c.parquet", [None, None, None], kind=pa.null())
    expected = [Document("a"), Document(""), Document("b")]
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.parquet") == expected
    assert read(tmp_path / "c.parquet") == [Document("")] * 3


@pytest.mark.parametrize("inner", [pa.string(), pa.large_string(), pa.binary()])
def test_columns_of_categories_and_of_bytes_are_text(tmp_path, inner):
    texts = ["Größe", None, "b", "Größe"]
    raw = [t.encode() if t and inner == pa.binary() else t for t in texts]
    plain = pa.array(raw, inner)
    for column in (plain, plain.dictionary_encode()):
        parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == [Document(text or "") for text in texts]
    raw = pa.array([b"good", b"\xff"], pa.binary())
    parquet.write_table(pa.table({"text": raw}), tmp_path / "b.parquet")
    good, bad = read(tmp_path / "b.parquet")
    assert (good, bad.reason) == (Document("good"), "the text is not UTF-8")


@pytest.mark.parametrize("name", [b"a\xff.jsonl", b"a\xff.txt", b"a\xff.parquet", b"a\xff.txt.gz"])
def test_a_file_name_that_is_not_utf8_is_read(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    if path.suffix == ".parquet":
        write_parquet(tmp_path / "b.parquet", ["text"])
        Path(tmp_path / "b.parquet").rename(path)
    else:
        raw = lines(["text"]) if path.suffix == ".jsonl" else b"text"
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    assert read(path) == [Document("text")]
    source = open_source(str(tmp_path))
    assert source.identity()["files"] == 1
    path.write_bytes(b"\xff\n")
    with contextlib.suppress(ValueError):
        assert "a\\xff" in read(path)[0].where


@pytest.mark.parametrize("size", [0, 3, 100, -1])
def test_a_truncated_parquet_file_is_refused_before_any_work(tmp_path, size):
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="a.parquet cannot be read as .parquet"):
        read(path)


@pytest.mark.parametrize(
    ("options", "damaged"),
    [
        ({"compression": "zstd", "use_dictionary": False}, slice(None)),
        ({"compression": "none"}, slice(-6, None)),  # numbers that the dictionary does not have
    ],
)
def test_a_damaged_row_group_is_refused_and_named(tmp_path, options, damaged):
    path, texts = tmp_path / "a.parquet", [f"text {i}" for i in range(30)]
    write_parquet(path, texts, row_group_size=10, **options)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    raw, places = bytearray(path.read_bytes()), range(start, start + column.total_compressed_size)
    for place in places[damaged]:
        raw[place] = 255
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="read in row groups 1 to 2, after row 0") as error:
        read(path, 1)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        *(
            ("not a JSON object in UTF-8", line)
            for line in (b'{"text": "cut', b'["text"]', b'"text"', b"5", b'{"text": "\xff"}')
        ),
        *(
            ("not a JSON object in UTF-8", line)
            for line in (b'{"text": "a"},', b'{"text": "a"} x', b'{"text": "a", "b": "\xff"}')
        ),
        *(("not a JSON object in UTF-8", line) for line in (b"[" * 9**5, b"\0x\0", b"NaN")),
        ("no field data.text_field='text'", b'{"other": "field"}'),
        *(
            ("no text in data.text_field='text'", line)
            for line in (b'{"text": 5}', b'{"text": ["a"]}')
        ),
        ("no text in data.text_field='text'", b'{"text": ' + b"9" * 5000 + b"}"),
        (
            "a lone surrogate, which is no character, in data.text_field='text'",
            rb'{"text": "a \ud800"}',
        ),
    ],
)
def test_a_bad_line_is_named_with_its_place_and_the_others_are_read(tmp_path, reason, line):
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + line + b"\n" + good)
    before, bad, after = read(tmp_path / "a.jsonl", 40)
    assert before == after == Document("good")
    assert bad.where == f"{tmp_path}/a.jsonl, line at byte {len(good)}"
    assert (bad.reason, bad.detail) == (reason, f"{line[:60]!r}")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(good + line + b"\n" + good))
    assert read(tmp_path / "a.jsonl.gz")[1] == Rejected(
        f"{tmp_path}/a.jsonl.gz, line 2", reason, bad.detail
    )


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xffdef")
    reason = ("the text is not UTF-8", "invalid start byte at byte 3")
    assert read(tmp_path / "a.txt") == [Rejected(f"{tmp_path}/a.txt", *reason)]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"abc\xffdef"))
    assert read(tmp_path / "b.txt.gz") == [Rejected(f"{tmp_path}/b.txt.gz", *reason)]


def test_of_a_cut_text_only_the_part_that_is_not_utf8_is_left_out(tmp_path):
    raw = b"word " * 10 + b"\xff " + b"word " * 10
    (tmp_path / "a.txt").write_bytes(raw)
    parts = read(tmp_path / "a.txt", 25)
    (place,) = [i for i, part in enumerate(parts) if isinstance(part, Rejected)]
    assert parts[place].where == f"{tmp_path}/a.txt, bytes 29 to 56"
    kept = b"".join(part.text.encode() for part in parts if isinstance(part, Document))
    assert kept == raw[:29] + raw[56:]
    assert parts[place + 1] == Document("", True, False, parts[0].digest)  # begins with the id
    assert all(part.begins == (i in (0, place + 1)) for i, part in enumerate(parts) if i != place)


@pytest.mark.parametrize("bad", [set(c) for n in range(6) for c in combinations(range(5), n)])
def test_a_document_of_a_cut_text_ends_before_each_part_that_is_left_out(tmp_path, bad):
    words = [b"wor\xff " if i in bad else b"word " for i in range(5)]
    (tmp_path / "a.txt").write_bytes(b"".join(b"word " * 4 + word * 4 for word in words))
    found = read(tmp_path / "a.txt", 40)
    kept = [part for part in found if isinstance(part, Document)]
    assert len(found) - len(kept) == len(bad)
    runs = "".join(" " if i in bad else "x" for i in range(5)).split()
    assert [part.begins for part in kept].count(True) == len(runs)
    assert [part.ends for part in kept] == [part.begins for part in kept[1:]] + [True] * bool(kept)


def test_a_parquet_row_that_is_not_utf8_is_named_and_the_others_are_read(tmp_path):
    offsets, data = np.array([0, 2, 3], dtype="i4"), b"ok\xff"
    column = pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(data))
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    good, bad = read(tmp_path / "a.parquet")
    assert good == Document("ok")
    assert bad.where == f"{tmp_path}/a.parquet, row 1 from row group 0 on"
    assert "the text is not UTF-8" in bad.reason


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"text"),
        ("a.jsonl", lines(["text"])),
        ("a.jsonl.gz", lines(["text"])),
        ("a.jsonl.zst", lines(["text"])),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    raw = b"\xef\xbb\xbf" + content
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(compress(raw))
    assert read(tmp_path / name) == [Document("text")]


@pytest.mark.parametrize(
    ("text_field", "message"),
    [
        (
            "content",
            "data.text_field='content' is not a column of .*a.parquet; its columns are id, text",
        ),
        ("id", "data.text_field='id': this column of .*a.parquet holds int64, not strings"),
    ],
)
def test_a_parquet_column_that_is_missing_or_no_text_is_refused(tmp_path, text_field, message):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.parquet", text_field=text_field)


def test_a_column_is_told_from_a_field_of_another_and_from_its_double(tmp_path):
    inner = [{"b": "in a"}, {"b": "in a too"}]
    table = pa.table({"a": inner, "a.b": ["x", "y"], "b": ["z", "z"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="a.b") == [Document("x"), Document("y")]
    parquet.write_table(table.rename_columns(["a", "text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has 2 columns of this name; rename one"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_compressed_file_is_refused_under_the_name_of_a_plain_one(tmp_path, name, kind):
    (tmp_path / name).write_bytes(COMPRESSORS[kind](lines(["text"] * 1000)))
    with pytest.raises(ValueError, match=rf"{name} is compressed as {kind} files are; rename it"):
        read(tmp_path / name)
    (tmp_path / "b.txt").write_text("BZh is how such a file begins.")
    assert read(tmp_path / "b.txt") == [Document("BZh is how such a file begins.")]


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("inner", COMPRESSORS)
def test_a_file_that_is_compressed_twice_is_refused(tmp_path, inner, kind):
    for name, content in (("a.txt", b"text"), ("a.jsonl", lines(["text"]))):
        (tmp_path / (name + kind)).write_bytes(COMPRESSORS[kind](COMPRESSORS[inner](content)))
        with pytest.raises(ValueError, match=rf"{name}{kind} is compressed twice .*a {inner} file"):
            read(tmp_path / (name + kind))


def archived(content, kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("inside.txt", content)
    else:
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
            member = tarfile.TarInfo("inside.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


EVERY_NAME = [
    (f"a{e}{k}", c) for e in (".txt", ".jsonl") for k, c in [*COMPRESSORS.items(), ("", bytes)]
]


@pytest.mark.parametrize(("name", "compress"), EVERY_NAME)
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, "zip"])
def test_an_archive_is_refused_under_the_name_of_a_text(tmp_path, name, compress, kind):
    (tmp_path / name).write_bytes(compress(archived(lines(["text"] * 100), kind)))
    shown = "zip" if kind == "zip" else "tar"
    with pytest.raises(ValueError, match=f"{name} is a {shown} archive, not text; unpack it"):
        read(tmp_path / name)


LATIN = "Ein Text, größer als vierzig Zeichen: “Zitat” – und mehr.\n"
HINDI = "यह एक लंबा पाठ है जो हिंदी में लिखा गया है, और इसे ठीक से पढ़ा जाना चाहिए।\n"
THAI = "นี่คือข้อความภาษาไทย ที่ยาวพอสมควร สำหรับการทดสอบ\n"
OTHERS = ["తెలుగు భాష చాలా అందంగా ఉంటుంది\n", "ਇਹ ਇੱਕ ਲੰਮਾ ਪਾਠ ਹੈ\n", "ഇത് ഒരു നീണ്ട വാചകമാണ്\n"]
OTHERS += ["ဒါဟာ စာသား တစ်ခုဖြစ်ပါတယ်\n", "འདི་ནི་ཡི་གེ་ཡིན། འདི་ནི་ཡི་གེ།\n"]
CYRILLIC = "Текст, который длиннее сорока знаков, и ещё немного.\n"
WIDE = ("UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE")


@pytest.mark.parametrize(("name", "compress"), EVERY_NAME)
@pytest.mark.parametrize("encoding", WIDE)
def test_text_of_two_or_four_bytes_a_character_is_refused_by_name(
    tmp_path, name, compress, encoding
):
    message = f"{name} is text in {encoding}, not UTF-8; .* iconv -f {encoding} -t UTF-8"
    texts = [LATIN, CYRILLIC, LATIN * 99, *(text * 9 for text in (HINDI, THAI, *OTHERS))]
    for mark, text in [*(("", text) for text in texts), ("\ufeff", "你好")]:
        content = json.dumps({"text": text}, ensure_ascii=False) if "jsonl" in name else text
        (tmp_path / name).write_bytes(compress((mark + content).encode(encoding)))
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\t\n\b")))
def test_no_text_in_utf8_is_taken_for_another_format(text):
    for each in (text, text * 20, f"\0{text}", "\0\0".join(text), "two\0".join(text)):
        refuse_other_format(Path("a.txt"), each.encode()[:512], is_unpacked=False)


@pytest.mark.parametrize(
    "raw",
    [
        *(b"a\0b", b"\0" * 999, b"word\0" * 200, b"abc\0" * 200, b"text" + b"\0" * 999),
        *(b"1\t2\t3\t4\n" * 100, b"\0" + b"\n" * 99, b"\0" + b"1\t2\t" * 99),
        *(b"\x0bab\t\r\n" * 100, b" " * 257 + b"ustar is a format" + b" " * 257, b"PK"),
    ],
)
def test_bytes_that_are_rare_in_text_are_text(tmp_path, raw):
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(raw))
    assert read(tmp_path / "a.txt") == read(tmp_path / "a.txt.gz") == [Document(raw.decode())]


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_an_empty_file_is_truncated_if_it_should_be_compressed(tmp_path, kind):
    path = tmp_path / f"a.jsonl{kind}"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.jsonl.* is truncated: the file is empty"):
        read(path)
    path.write_bytes(COMPRESSORS[kind](b""))
    assert read(path) == []


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_an_array_of_documents_is_refused_as_a_whole(tmp_path, compress):
    path = tmp_path / ("a.jsonl" if compress is bytes else "a.jsonl.gz")
    for content in (json.dumps([{"text": "a"}] * 1000), ' [\n{"text": "a"},\n{"text": "b"}\n]'):
        for mark in (b"", codecs.BOM_UTF8):
            path.write_bytes(compress(mark + content.encode()))
            with pytest.raises(ValueError, match=r"a.jsonl.* is a JSON array, .* jq -c '\.\[\]'"):
                read(path)
    path.write_bytes(compress(codecs.BOM_UTF8 + b"\n" + lines(["text"]) + b"[]\n"))
    text, rejected = read(path)
    assert text == Document("text")
    assert rejected.reason == "not a JSON object in UTF-8"


OBJECTS = [json.dumps({"text": f"document {i} {{}} ä"}, ensure_ascii=False) for i in range(500)]
SEVERAL = {
    "CR": "\r".join(OBJECTS),
    "none": "".join(OBJECTS),
    "space": "\n" + " ".join(OBJECTS) + "\n",
    "comma": ", ".join(OBJECTS),
    "two in the third": "\n".join([*OBJECTS[:2], OBJECTS[2] + OBJECTS[3], *OBJECTS[4:]]),
    "NUL": OBJECTS[0] + "\0" * 9 + OBJECTS[1] + "\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("between", SEVERAL)
def test_several_objects_in_a_line_are_refused_as_a_whole(tmp_path, between, compress, encoding):
    path = tmp_path / ("a.jsonl" if compress is bytes else "a.jsonl.gz")
    path.write_bytes(compress(SEVERAL[between].encode(encoding)))
    with pytest.raises(ValueError, match=r"a.jsonl.*, line .* several JSON objects; .* jq -c \."):
        read(path)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n", " \r\n\n", "\ufeff\n"])
def test_indented_json_and_arrays_are_refused_behind_blank_lines_too(tmp_path, before, compress):
    path = tmp_path / ("a.jsonl" if compress is bytes else "a.jsonl.gz")
    objects = [{"text": "a"}, {"text": "b"}]
    path.write_bytes(compress((before + json.dumps(objects)).encode()))
    with pytest.raises(ValueError, match=r"a.jsonl.* is a JSON array, .* jq -c '\.\[\]'"):
        read(path)
    indented = "\n".join(json.dumps(each, indent=2) for each in objects)
    path.write_bytes(compress((before + indented).encode()))
    with pytest.raises(ValueError, match=r"a.jsonl.* objects over several lines; .* jq -c \."):
        read(path)
    path.write_bytes(compress((before + '{"text": "a"}\n{\n').encode()))
    text, rejected = read(path)  # cut off by a crash: one line
    assert (text, rejected.detail) == (Document("a"), "b'{'")


@pytest.mark.parametrize("end", ["\0" * 1000, "\0\n", " \0\0\r\n"])
def test_nul_bytes_behind_a_line_leave_its_document(tmp_path, end):
    (tmp_path / "a.jsonl").write_bytes("\n".join(OBJECTS[:3]).encode() + end.encode())
    expected = [Document(json.loads(each)["text"]) for each in OBJECTS[:3]]
    assert read(tmp_path / "a.jsonl") == expected


def test_a_name_of_two_lines_is_shown_in_one(tmp_path):
    (tmp_path / "a\nb\x1b[1m.jsonl").write_text("{}\n")
    (rejected,) = read(tmp_path / "a\nb\x1b[1m.jsonl")
    assert rejected.where == f"{tmp_path}/a\\nb\\x1b[1m.jsonl, line at byte 0"


def test_the_text_field_is_the_one_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "content": "yes"}\n')
    assert read(tmp_path / "a.jsonl", text_field="content") == [Document("yes")]
    parquet.write_table(pa.table({"text": ["no"], "content": ["yes"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="content") == [Document("yes")]
