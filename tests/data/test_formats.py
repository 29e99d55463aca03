"""Formats of text: the documents that other readers find, wherever a file is cut."""

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pretrain_lib.data.text import formats
from pretrain_lib.data.text.formats import Document, Rejected, cut_file, read_documents
from pretrain_lib.data.text.sources import open_source

SIZES = (1, 7, 500, 2**62)
DRAW = random.Random(0)
TEXTS = ["", " ", "Größe\n\u2028\x85大きさ 😀", *("a b\r\n" * (i % 7) for i in range(60))]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
# Letters, places to cut, and characters of one to four bytes that are none.
cut_text = st.lists(st.sampled_from("a7 \n\t.é你😀\u3000\ufeff"), max_size=60).map("".join)


def read(path, size=2**62, *, text_field="text", cut_text=True):
    pieces = cut_file(path, size, text_field=text_field, cut_text=cut_text)
    return [document for piece in pieces for document in read_documents(piece, text_field)]


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
        patch.setattr(formats, "LINE_PART_BYTES", part)
        assert read(path, size) == [Document(text) for text in texts]


def test_a_long_line_is_skipped_without_being_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LINE_PART_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["x" * 100_000, "last"]))
    pieces = cut_file(path, 1000, text_field="text", cut_text=True)
    with path.open("rb", buffering=0) as file:
        assert list(formats._lines_of_slice(file, pieces[1], "text")) == []
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
def test_a_truncated_file_of_lines_gives_what_comes_before_and_is_named(tmp_path, compress, share):
    texts = [f"{i} {DRAW.random()}" for i in range(20_000)]
    raw = compress(lines(texts))
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
    path.write_bytes(raw[: int(len(raw) * share)])
    *found, last = read(path)
    assert found == [Document(text) for text in texts[: len(found)]]
    assert last.where == f"{path}, after line {len(found)}"
    assert "the file is damaged (Truncated compressed stream)" in last.reason
    assert len(found) >= (share - 0.2) * len(texts)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_not_compressed_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(lines(TEXTS))
    (found,) = read(tmp_path / name)
    assert found.where == f"{tmp_path / name}, after line 0"
    assert "the file is damaged" in found.reason


@pytest.mark.parametrize("size", [0, 3, 100, -1])
def test_a_truncated_parquet_file_is_refused_before_any_work(tmp_path, size):
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="a.parquet is not a .parquet file"):
        read(path)


@pytest.mark.parametrize(
    ("options", "damaged"),
    [
        ({"compression": "zstd", "use_dictionary": False}, slice(None)),
        ({"compression": "none"}, slice(-6, None)),  # numbers that the dictionary does not have
    ],
)
def test_a_damaged_row_group_is_named_and_the_others_are_read(tmp_path, options, damaged):
    path, texts = tmp_path / "a.parquet", [f"text {i}" for i in range(30)]
    write_parquet(path, texts, row_group_size=10, **options)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    raw, places = bytearray(path.read_bytes()), range(start, start + column.total_compressed_size)
    for place in places[damaged]:
        raw[place] = 255
    path.write_bytes(raw)
    found = read(path, 1)
    (bad,) = (document for document in found if isinstance(document, Rejected))
    assert bad.where == f"{path}, row groups 1 to 2, after row 0"
    assert "the file is damaged" in bad.reason
    expected = [Document(text) for text in texts]
    assert found == [*expected[:10], bad, *expected[20:]]


@pytest.mark.parametrize(
    "line",
    [b'{"text": "cut', b'{"other": "field"}', b'["text"]', b'"text"', b"5", b'{"text": null}']
    + [b'{"text": 5}', b'{"text": ["a"]}', b'{"text": "\xff"}', rb'{"text": "\ud800"}', b"[" * 9**5]
    + [b'{"text": ' + b"9" * 5000 + b"}", b"\0\0"],
)
def test_a_bad_line_is_named_with_its_place_and_the_others_are_read(tmp_path, line):
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + line + b"\n" + good)
    before, bad, after = read(tmp_path / "a.jsonl", 40)
    assert before == after == Document("good")
    assert bad.where == f"{tmp_path}/a.jsonl, line at byte {len(good)}"
    assert bad.reason.startswith("not a UTF-8 JSON object with text in data.text_field='text'")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(good + line + b"\n" + good))
    assert read(tmp_path / "a.jsonl.gz")[1] == Rejected(
        f"{tmp_path}/a.jsonl.gz, line 2", bad.reason
    )


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xffdef")
    reason = "the text is not UTF-8 (invalid start byte at byte 3)"
    assert read(tmp_path / "a.txt") == [Rejected(f"{tmp_path}/a.txt", reason)]


def test_of_a_cut_text_only_the_part_that_is_not_utf8_is_left_out(tmp_path):
    raw = b"word " * 10 + b"\xff " + b"word " * 10
    (tmp_path / "a.txt").write_bytes(raw)
    parts = read(tmp_path / "a.txt", 25)
    (place,) = [i for i, part in enumerate(parts) if isinstance(part, Rejected)]
    assert parts[place].where == f"{tmp_path}/a.txt, bytes 29 to 56"
    kept = b"".join(part.text.encode() for part in parts if isinstance(part, Document))
    assert kept == raw[:29] + raw[56:]


def test_a_parquet_row_that_is_not_utf8_is_named_and_the_others_are_read(tmp_path):
    offsets, data = np.array([0, 2, 3], dtype="i4"), b"ok\xff"
    column = pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(data))
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    good, bad = read(tmp_path / "a.parquet")
    assert good == Document("ok")
    assert bad.where == f"{tmp_path}/a.parquet, row 1 of row groups 0 on"
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


def test_the_text_field_is_the_one_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "content": "yes"}\n')
    assert read(tmp_path / "a.jsonl", text_field="content") == [Document("yes")]
    parquet.write_table(pa.table({"text": ["no"], "content": ["yes"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="content") == [Document("yes")]
