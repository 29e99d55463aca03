"""Sources: the documents of files and folders, the embedded corpus, and clear refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.data import sources
from pretrain_lib.data.sources import open_source


def read_all(name, **options):
    source = open_source(str(name), **options)
    return [text for unit in source.units() for text in source.documents(unit)]


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1),
    ascii_only=st.booleans(),
    blank=st.sampled_from([b"\n", b"\n\n", b"\n  \n", b"\r\n"]),
    final=st.booleans(),
    size=st.integers(1, 60),
)
def test_jsonl_documents_do_not_depend_on_the_unit_size(
    tmp_path_factory, texts, ascii_only, blank, final, size
):
    lines = [json.dumps({"text": t}, ensure_ascii=ascii_only).encode() for t in texts]
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes(blank.join(lines) + (blank if final else b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", (size, size))
        source = open_source(str(path))
        units = source.units()
        assert len(units) == -(-path.stat().st_size // size)
        assert [text for unit in units for text in source.documents(unit)] == texts


def test_text_file_is_one_document_byte_for_byte(tmp_path):
    text = "first\r\n\n  zweite: äöü \u4f60\u597d\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_all(tmp_path / "a.txt") == [text]


def test_folder_gives_its_files_in_the_order_of_their_paths(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("from b")
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n\n{"text": "a2", "more": 1}')
    (tmp_path / "sub" / "c.txt").write_text("from c")
    (tmp_path / "skipped.md").write_text("not read")
    expected = ["a1", "a2", "from b", "from c"]
    assert read_all(tmp_path) == expected
    monkeypatch.setattr(sources, "UNIT_BYTES", (1, 1))
    assert read_all(tmp_path) == expected


def test_folder_whose_name_ends_like_a_file_is_entered_not_read(tmp_path):
    (tmp_path / "x.txt").mkdir()
    (tmp_path / "x.txt" / "a.txt").write_text("inside")
    assert read_all(tmp_path) == ["inside"]


def test_text_field_is_the_one_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "content": "yes"}\n')
    assert read_all(tmp_path / "a.jsonl", text_field="content") == ["yes"]


def test_units_hold_every_file_once_in_order(tmp_path, monkeypatch):
    for index in range(20):
        (tmp_path / f"{index:02d}.txt").write_text("x" * index)
    monkeypatch.setattr(sources, "UNIT_BYTES", (30, 30))
    units = open_source(str(tmp_path)).units()
    assert [piece.path.name for unit in units for piece in unit] == [
        f"{index:02d}.txt" for index in range(20)
    ]
    assert all(sum(p.stop for p in unit) >= 30 for unit in units[:-1])
    assert all(sum(p.stop for p in unit[:-1]) < 30 for unit in units)


def test_identity_follows_the_text_not_the_path(tmp_path):
    for folder, text in (("one", "same"), ("two", "same"), ("three", "diff")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    one, two, three = (
        open_source(str(tmp_path / folder / "a.txt")).identity()
        for folder in ("one", "two", "three")
    )
    assert one == two
    assert one != three


def test_embedded_corpus_is_the_standard_library_and_stays_the_same():
    first, second = open_source("python-stdlib"), open_source("python-stdlib")
    assert first == second
    assert first.identity() == second.identity()
    paths = [piece.path for unit in first.units() for piece in unit]
    assert paths == list(first.files)
    assert len(set(paths)) == len(paths) > 300
    assert Path(json.__file__).resolve() in {path.resolve() for path in paths}
    assert not any("site-packages" in path.parts or "test" in path.parts for path in paths)
    unit = first.units()[-1]
    texts = list(first.documents(unit))
    assert texts == [piece.path.read_bytes().decode() for piece in unit]
    assert first.estimated_bytes() == sum(path.stat().st_size for path in paths)


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("./owner/name", None, "no such file or folder"),
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("a.csv", b"text\n", "must end in .txt"),
        ("a.npy", b"text\n", "--data.path"),
    ],
)
def test_sources_that_cannot_be_opened_are_refused(tmp_path, name, content, rule):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rule) as error:
        open_source(str(path))
    assert name.removeprefix("./") in str(error.value)


def test_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text")
    with pytest.raises(ValueError, match=r"holds no .txt or .jsonl"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "cut',
        b'{"other": "field"}',
        b'["text"]',
        b'"text"',
        b"5",
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": ["a"]}',
    ],
)
def test_bad_json_line_is_named_with_its_place(tmp_path, line):
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + line + b"\n")
    with pytest.raises(ValueError, match=f"a.jsonl, line at byte {len(good)}.*'text'"):
        read_all(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b"abc\xff"), ("a.jsonl", b'{"text": "\xff"}'), ("s.jsonl", rb'{"text": "\ud800"}')],
)
def test_text_that_is_not_utf8_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*(UTF-8|surrogate)"):
        read_all(tmp_path / name)


def test_hub_dataset_without_a_network_is_refused_with_advice(tmp_path):
    script = """
from pretrain_lib.data.sources import open_source
source = open_source("nobody/no-such-dataset:config")
try:
    source.units()
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert "nobody/no-such-dataset:config could not be loaded" in result.stdout
    for advice in ("corpus.jsonl", "--data.path", "python-stdlib"):
        assert advice in result.stdout
