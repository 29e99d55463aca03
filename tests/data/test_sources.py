"""Sources: files and folders, the embedded corpus, datasets, and clear refusals."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from datasets.distributed import split_dataset_by_node

from pretrain_lib.data.prepare.job import Job
from pretrain_lib.data.prepare.prepare import prepare
from pretrain_lib.data.text import dataset_rows, sources
from pretrain_lib.data.text.dataset_rows import DatasetSource, HubSource
from pretrain_lib.data.text.formats import Document, FileSlice, Rejected
from pretrain_lib.data.text.opening import open_source

WORDS = [f"document {number}" for number in range(200)]


def read_all(source):
    return [document for unit in source.units() for document in source.documents(unit)]


def texts_of(source):
    return [document.text for document in read_all(source)]


def test_text_file_is_one_document_byte_for_byte(tmp_path):
    text = "first\r\n\n  zweite: äöü \u4f60\u597d\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_all(open_source(str(tmp_path / "a.txt"))) == [Document(text)]


def test_folder_gives_its_files_in_the_order_of_their_paths(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("from b")
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n\n{"text": "a2", "more": 1}')
    (tmp_path / "sub" / "c.txt").write_text("from c")
    (tmp_path / "skipped.md").write_text("not read")
    expected = ["a1", "a2", "from b", "from c"]
    assert texts_of(open_source(str(tmp_path))) == expected
    monkeypatch.setattr(sources, "UNIT_BYTES", (1, 1))
    source = open_source(str(tmp_path))
    found = [d.text for unit in source.units(cut_text=False) for d in source.documents(unit)]
    assert found == expected
    assert "".join(texts_of(source)) == "".join(expected)


def test_folder_whose_name_ends_like_a_file_is_entered_not_read(tmp_path):
    (tmp_path / "x.txt").mkdir()
    (tmp_path / "x.txt" / "a.txt").write_text("inside")
    assert texts_of(open_source(str(tmp_path))) == ["inside"]


def test_units_hold_every_file_once_in_order(tmp_path, monkeypatch):
    for index in range(20):
        (tmp_path / f"{index:02d}.txt").write_text("x" * index)
    monkeypatch.setattr(sources, "UNIT_BYTES", (30, 30))
    source = open_source(str(tmp_path))
    units = source.units()
    assert [piece for unit in units for piece in unit] == [
        FileSlice(tmp_path / f"{index:02d}.txt", 0, index, index) for index in range(1, 20)
    ]
    sizes = [source.unit_bytes(unit) for unit in units]
    assert sum(sizes) == source.estimated_bytes() == sum(range(20))
    assert all(size >= 30 for size in sizes[:-1])
    assert all(sum(p.stop for p in unit[:-1]) < 30 for unit in units)


def test_a_text_that_is_cut_shares_no_unit(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("small")
    (tmp_path / "b.txt").write_text("large " * 20)
    (tmp_path / "c.txt").write_text("small")
    (tmp_path / "d.txt").write_text("small")
    monkeypatch.setattr(sources, "UNIT_BYTES", (50, 50))
    units = open_source(str(tmp_path)).units()
    names = [[piece.path.name for piece in unit] for unit in units]
    assert names == [["a.txt"], ["b.txt"], ["b.txt"], ["b.txt"], ["c.txt", "d.txt"]]


@pytest.mark.parametrize(
    ("size", "unit"), [(100, 4), (256 * 4, 4), (256 * 7, 7), (256 * 64, 64), (2**20, 64)]
)
def test_units_grow_with_the_text_between_bounds(tmp_path, monkeypatch, size, unit):
    (tmp_path / "a.jsonl").write_bytes(b" " * size)
    monkeypatch.setattr(sources, "UNIT_BYTES", (4, 64))
    units = open_source(str(tmp_path)).units()
    assert {piece.text_bytes for (piece,) in units[:-1]} == {unit}


def test_identity_follows_the_text_not_the_path(tmp_path):
    for folder, text in (("one", "same"), ("two", "same"), ("three", "diff")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    one, two, three = (
        open_source(str(tmp_path / folder / "a.txt")) for folder in ("one", "two", "three")
    )
    assert one.identity() == two.identity() != three.identity()
    assert one.identity(content=False) == three.identity(content=False) != one.identity()


def test_embedded_corpus_is_the_standard_library_and_stays_the_same():
    first, second = open_source("python-stdlib"), open_source("python-stdlib")
    assert first == second
    assert first.identity() == second.identity()
    paths = [piece.path for unit in first.units() for piece in unit]
    assert paths == list(first.files)
    assert all(isinstance(document, Document) for document in read_all(first))
    assert len(set(paths)) == len(paths) > 300
    assert Path(json.__file__).resolve() in {path.resolve() for path in paths}
    assert not any("site-packages" in path.parts or "test" in path.parts for path in paths)
    unit = first.units()[-1]
    texts = [document.text for document in first.documents(unit)]
    assert texts == [piece.path.read_bytes().decode() for piece in unit]
    assert first.estimated_bytes() == sum(path.stat().st_size for path in paths)


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("./owner/name", None, "no such file or folder"),
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("a.csv", b"text\n", "must end in one of .txt, .parquet, .jsonl or .ndjson"),
        ("a.npy", b"text\n", "--data.path"),
        ("a.jsonl.7z", b"text\n", "must end in one of"),
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
    with pytest.raises(ValueError, match=r"holds none of .txt, .parquet, .jsonl.*1 .csv"):
        open_source(str(tmp_path))
    (tmp_path / "ids.bin").write_bytes(bytes(4))
    with pytest.raises(ValueError, match=r"1 \.bin, 1 \.csv\); pass token arrays .* --data\.path$"):
        open_source(str(tmp_path))


def test_linked_folders_are_read_once_each_and_loops_are_none(tmp_path):
    web, data, more = (tmp_path / name for name in ("store/web", "data", "more"))
    for folder in (web, data / "z" / "deep", more):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(f"from {folder.name}")
    (data / "web").symlink_to(web)
    (data / "web again").symlink_to(web)
    (data / "a").symlink_to(data / "z")  # which is here already, and keeps its path
    (data / "z" / "up").symlink_to(data)
    (web / "back").symlink_to(data)
    (web / "more").symlink_to(more)
    (data / "broken").symlink_to(tmp_path / "nowhere")
    source = open_source(str(data))
    names = [str(path.relative_to(data)) for path in source.files]
    assert names == ["web/a.txt", "web/more/a.txt", "z/deep/a.txt"]
    assert source.skipped == (("broken links", 1),)
    (data / "links").mkdir()
    (data / "links" / "web").symlink_to(web, target_is_directory=True)
    assert len(open_source(str(data / "links")).files) == 3


def test_hidden_and_other_files_are_counted_not_read(tmp_path):
    (tmp_path / ".hidden").mkdir()
    folder = tmp_path / ".hidden" / "data"  # it is named by the user
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".Trash").mkdir()
    for name in ("a.jsonl", ".ipynb_checkpoints/a.jsonl", ".Trash/b.jsonl", "._a.jsonl"):
        (folder / name).write_text('{"text": "one"}')
    for name in ("b.CSV", "c.csv", "README", "d.json", "e.tar.gz", "f.csv.bz2"):
        (folder / name).write_text("x")
    source = open_source(str(folder))
    assert texts_of(source) == ["one"]
    counts = {".csv": 2, ".csv.bz2": 1, ".json": 1, ".tar.gz": 1, "hidden": 3, "no ending": 1}
    assert dict(source.skipped) == counts


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="is a pipe or device"):
        open_source(str(tmp_path / "a.jsonl"))


def generate(parts):
    for part in parts:
        yield from ({"text": WORDS[number], "number": number} for number in part)


def shout(row):
    return {"text": row["text"].upper()}


def from_generator():
    """Return 200 rows in four shards."""
    parts = [list(range(start, start + 50)) for start in range(0, 200, 50)]
    return IterableDataset.from_generator(generate, gen_kwargs={"parts": parts})


def from_parquet(folder):
    """Return 200 rows of two files, in row groups of 30."""
    for part in range(2):
        rows = {"text": WORDS[part * 100 : (part + 1) * 100], "number": range(100)}
        Dataset.from_dict(rows).to_parquet(folder / f"{part}.parquet", batch_size=30)
    files = [str(folder / f"{part}.parquet") for part in range(2)]
    return load_dataset("parquet", data_files=files, split="train", streaming=True)


def test_rows_of_a_dataset_in_memory_are_documents(monkeypatch):
    monkeypatch.setattr(dataset_rows, "UNIT_ROWS", 60)
    rows = Dataset.from_dict({"text": WORDS, "number": range(200)})
    source = DatasetSource(rows, "rows")
    assert len(source.units()) == 3
    assert texts_of(source) == WORDS
    monkeypatch.setattr(dataset_rows, "MAX_UNITS", 2)
    assert len(source.units()) == 2
    assert texts_of(source) == WORDS
    reversed_rows = DatasetSource(rows.select(range(199, -1, -1)), "reversed")
    assert texts_of(reversed_rows) == WORDS[::-1]


def test_rows_of_datasets_that_are_iterated_are_documents(tmp_path):
    rows = from_parquet(tmp_path)
    for name, dataset, units, texts in (
        ("generator", from_generator(), 4, WORDS),
        ("parquet", rows, 8, WORDS),
        ("mapped", rows.map(shout), 8, [word.upper() for word in WORDS]),
        ("filtered", rows.filter(lambda row: row["number"] < 50), 8, WORDS[:50] + WORDS[100:150]),
        ("one after the other", concatenate_datasets([rows, from_generator()]), 12, WORDS * 2),
    ):
        source = DatasetSource(dataset, name)
        assert len(source.units()) == units
        assert texts_of(source) == texts


@pytest.mark.parametrize("kind", ["python", "numpy", "torch", "arrow", "pandas"])
def test_the_format_of_a_dataset_makes_no_difference(tmp_path, kind):
    for rows in (Dataset.from_dict({"text": WORDS}), from_parquet(tmp_path)):
        assert texts_of(DatasetSource(rows.with_format(kind), "rows")) == WORDS


def shout_batch(batch):
    return {"text": [text.upper() for text in batch["text"]]}


TRANSFORMED = {
    "with_transform": (lambda rows: rows.with_transform(shout_batch), "text"),
    "of two columns": (
        lambda rows: rows.with_transform(
            lambda batch: {"text": [f"{t} {n}" for t, n in zip(*batch.values(), strict=True)]}
        ),
        "text",
    ),
    "a new column": (
        lambda rows: rows.with_transform(lambda batch: {"twice": [t * 2 for t in batch["text"]]}),
        "twice",
    ),
    "of one column": (
        lambda rows: rows.with_transform(shout_batch, columns=["text"], output_all_columns=True),
        "text",
    ),
    "of chosen rows": (
        lambda rows: rows.with_transform(shout_batch).select(range(150, -1, -1)),
        "text",
    ),
    "columns of a format": (lambda rows: rows.with_format("numpy", columns=["text"]), "text"),
    "all columns of a format": (
        lambda rows: rows.with_format("numpy", columns=["number"], output_all_columns=True),
        "text",
    ),
    "a format with options": (lambda rows: rows.with_format("numpy", dtype=np.int16), "text"),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_transform_is_applied_to_each_row_as_datasets_does(monkeypatch, name):
    monkeypatch.setattr(dataset_rows, "UNIT_ROWS", 60)
    change, field = TRANSFORMED[name]
    rows = change(Dataset.from_dict({"text": WORDS, "number": range(200)}))
    source = DatasetSource(rows, "rows", field)
    assert len(source.units()) == len(rows) // 60
    assert texts_of(source) == [row[field] for row in rows]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            lambda rows: rows.with_format("numpy", columns=["number"]),
            r"'text' is not a column of rows; its columns are number; its format hides .*None\)",
        ),
        (
            lambda rows: rows.with_transform(lambda batch: {"more": batch["text"]}),
            "'text' is not a column of rows; its columns are more; its format hides",
        ),
        (
            lambda rows: rows.with_transform(lambda batch: {"text": 5, "n": batch["number"]}),
            "data.source=rows: the transform of this dataset makes no row .*dict of lists",
        ),
        (
            lambda rows: DatasetDict({"train": rows, "test": rows}),
            "data.source=rows holds splits .DatasetDict., not rows; give one of them: train, test",
        ),
        (
            lambda rows: IterableDatasetDict({"train": rows.to_iterable_dataset()}),
            "data.source=rows holds splits .IterableDatasetDict., not rows; give one",
        ),
    ],
    ids=["hidden", "another column", "no rows", "splits", "splits that are iterated"],
)
def test_a_dataset_that_gives_no_rows_of_text_is_refused(change, rule):
    rows = change(Dataset.from_dict({"text": WORDS, "number": range(200)}))
    with pytest.raises(ValueError, match=rule):
        DatasetSource(rows, "rows")


def test_a_dataset_without_rows_has_no_documents(tmp_path):
    for rows in (
        Dataset.from_dict({"text": []}),
        Dataset.from_dict({"text": WORDS}).with_transform(shout_batch).select([]),
    ):
        source = DatasetSource(rows, "rows")
        assert source.units() == [(0, 1)]
        assert read_all(source) == []
        job = Job((source,), train_tokenizer=300, validation="none")
        with pytest.raises(ValueError, match="data.source=rows leaves no document with text"):
            prepare(job, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_taken_and_skipped_rows_are_those_that_datasets_gives(tmp_path):
    rows = from_parquet(tmp_path)
    for dataset, texts in (
        (rows.take(70), WORDS[:70]),
        (rows.skip(70), WORDS[70:]),
        (rows.skip(70).map(shout).take(50), [word.upper() for word in WORDS[70:120]]),
    ):
        assert texts_of(DatasetSource(dataset, "rows")) == texts
        assert [row["text"] for row in dataset] == texts


def interleave(rows, other, stopping_strategy, probabilities):
    options = {"seed": 3, "stopping_strategy": stopping_strategy, "probabilities": probabilities}
    return interleave_datasets([rows, other], **options)


def in_epoch(rows):
    rows = rows.select_columns(["text", "number"])
    rows.set_epoch(2)
    return rows


def begun(rows):
    iterator = iter(rows)
    for _ in range(30):
        next(iterator)
    begun = rows.select_columns(["text", "number"])
    begun.load_state_dict(rows.state_dict())
    return begun


def join(batch):
    return {"text": [" ".join(batch["text"])]}


def others():
    texts = [f"other {number}" for number in range(40)]
    return Dataset.from_dict({"text": texts, "number": range(40)}).to_iterable_dataset(3)


ONE_COLUMN = ("map to other columns", "map batches", "concatenate columns")


# By name: what is done to a dataset, and whether its shards are read by themselves.
CHAINS = {
    "map": (lambda rows: rows.map(shout), True),
    "map to other columns": (lambda rows: rows.map(shout, remove_columns=["number"]), True),
    "map indices": (lambda rows: rows.map(lambda _, i: {"text": f"{i}"}, with_indices=True), False),
    "map batches": (
        lambda rows: rows.map(join, batched=True, batch_size=7, remove_columns=["number"]),
        False,
    ),
    "filter": (lambda rows: rows.filter(lambda row: row["number"] % 3), True),
    "filter indices": (lambda rows: rows.filter(lambda _, i: i % 3, with_indices=True), False),
    "filter batches": (
        lambda rows: rows.filter(
            lambda batch: [i > 3 for i, _ in enumerate(batch["text"])], batched=True, batch_size=9
        ),
        False,
    ),
    "take": (lambda rows: rows.take(70), False),
    "skip": (lambda rows: rows.skip(70), False),
    "repeat": (lambda rows: rows.repeat(2), False),
    "batch": (lambda rows: rows.map(join, batched=True, remove_columns=["number"]), False),
    "add column": (lambda rows: rows.add_column("more", list(range(400))), False),
    "select columns": (lambda rows: rows.select_columns(["text"]), True),
    "remove columns": (lambda rows: rows.remove_columns("number"), True),
    "rename column": (lambda rows: rows.rename_column("number", "renamed"), True),
    "format": (lambda rows: rows.with_format("numpy").map(lambda row: row), True),
    "concatenate": (
        lambda rows: concatenate_datasets([rows, others()]),
        True,
    ),
    "concatenate columns": (
        lambda rows: concatenate_datasets(
            [rows.select_columns(["text"]), rows.select_columns(["number"])], axis=1
        ),
        False,
    ),
    "split by node": (lambda rows: split_dataset_by_node(rows, rank=1, world_size=3), False),
    "epoch": (in_epoch, False),
    "state": (begun, False),
    **{
        f"interleave {strategy} {probabilities}": (
            lambda rows, s=strategy, p=probabilities: interleave(rows, others(), s, p),
            False,
        )
        for strategy in (
            "first_exhausted",
            "all_exhausted",
            "all_exhausted_without_replacement",
        )
        for probabilities in (None, [0.2, 0.8])
    },
}


def words_of(dataset):
    return [row["text"] for row in dataset]


@pytest.fixture
def no_waiting(monkeypatch):
    """`datasets` waits for seconds after a `.parquet` that was not read to its end."""
    monkeypatch.setattr("datasets.iterable_dataset.time.sleep", lambda _: None)


@pytest.mark.parametrize("name", CHAINS)
def test_the_rows_are_those_that_datasets_gives(tmp_path, no_waiting, name):
    change, is_sharded = CHAINS[name]
    numbered = Dataset.from_dict({"text": WORDS, "number": range(200)}).to_iterable_dataset(5)
    for rows in (from_parquet(tmp_path), numbered):
        for dataset in (change(rows), change(rows.map(shout))):
            source = DatasetSource(dataset, "rows")
            assert (len(source.units()) > 1) == is_sharded
            assert texts_of(source) == words_of(dataset)
        after = change(rows).map(shout)
        assert texts_of(DatasetSource(after, "rows")) == words_of(after)


def test_chains_of_steps_give_the_rows_that_datasets_gives(tmp_path, no_waiting):
    rows, draw = from_parquet(tmp_path), random.Random(0)
    alike = ("map", "filter", "take", "skip", "format", "concatenate", "interleave", "map indices")
    names = [n for n in CHAINS if n.startswith(alike) and n not in ONE_COLUMN]
    for _ in range(12):
        dataset, steps = rows, draw.choices(names, k=3)
        for step in steps:
            dataset = CHAINS[step][0](dataset)
        assert texts_of(DatasetSource(dataset, "rows")) == words_of(dataset), steps


def test_a_shuffle_buffer_is_refused_however_deep(tmp_path):
    rows = from_parquet(tmp_path)
    shuffled = rows.shuffle(seed=0, buffer_size=10)
    for dataset in (
        shuffled,
        shuffled.map(shout).take(5),
        shuffled.with_format("numpy").select_columns(["text"]),
        interleave_datasets([rows, shuffled.filter(lambda row: row["number"] > 5)]),
        concatenate_datasets([interleave_datasets([rows, shuffled]), rows]).map(shout),
        Dataset.from_dict({"text": WORDS}).to_iterable_dataset(3).shuffle(seed=0),
    ):
        with pytest.raises(ValueError, match="data.source=rows was shuffled with a shuffle buffer"):
            DatasetSource(dataset, "rows")
    for dataset in (rows, Dataset.from_dict({"text": WORDS}).shuffle(seed=0)):
        assert sorted(texts_of(DatasetSource(dataset, "rows"))) == sorted(WORDS)


def test_a_dataset_without_the_column_is_refused(tmp_path):
    for rows in (
        Dataset.from_dict({"content": WORDS}),
        from_parquet(tmp_path).remove_columns("text"),
    ):
        with pytest.raises(
            ValueError, match="data.text_field='text' is not a column of rows; its columns"
        ):
            DatasetSource(rows, "rows")
    rows = Dataset.from_dict({"content": WORDS})
    assert texts_of(DatasetSource(rows, "rows", text_field="content")) == WORDS


def generate_other_things():
    for value in ("good", None, 5, "half \ud83d of a character", np.str_("good"), ["good"]):
        yield {"text": value}
    yield {"content": "good"}


def test_rows_that_hold_no_text_are_named():
    rows = IterableDataset.from_generator(generate_other_things)
    found = read_all(DatasetSource(rows, "rows"))
    reason = "no text in data.text_field='text'"
    bad = [Rejected(f"rows, row {number} of unit 0", reason) for number in range(7)]
    good = Document("good")
    assert found == [good, Document(""), bad[2], bad[3], good, bad[5], bad[6]]


def test_a_column_of_bytes_is_read_as_in_parquet(tmp_path):
    values = ["zweite: äöü".encode(), b"", None, b"half \xff of a character", b"last"]
    rows = Dataset.from_dict({"text": values}, features=Features({"text": Value("binary")}))
    rows.to_parquet(tmp_path / "a.parquet")
    there = [
        d._replace(where="") if isinstance(d, Rejected) else d
        for d in read_all(open_source(str(tmp_path / "a.parquet")))
    ]
    for dataset in (rows, rows.to_iterable_dataset(), rows.with_format("numpy")):
        found = read_all(DatasetSource(dataset, "rows"))
        assert found[3].where == "rows, row 3 of unit 0"
        found[3] = found[3]._replace(where="")
        assert found == there


def test_a_hub_dataset_is_read_as_it_comes(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    from_parquet(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)  # `datasets` takes a folder of that name for the dataset
    source = HubSource("owner/name", "text")
    assert len(source.units()) == 8
    assert texts_of(source) == WORDS
    assert source.unit_bytes(source.units()[0]) == 0
    with pytest.raises(ValueError, match="data.text_field='content' is not a column of owner/name"):
        HubSource("owner/name", "content").units()


@pytest.mark.parametrize("name", ["owner/name", "owner/name:config", "o/n:c@main", "o/n@v1.0"])
def test_names_of_hub_datasets_are_known(name):
    assert open_source(name, text_field="content") == HubSource(name, "content")


def test_hub_dataset_without_a_network_is_refused_with_advice(tmp_path):
    script = """
from pretrain_lib.data.text.opening import open_source
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
    assert (
        "nobody/no-such-dataset:config is no file or folder here, and could not be loaded"
        in result.stdout
    )
    for advice in ("corpus.jsonl", "--data.path", "python-stdlib"):
        assert advice in result.stdout


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data.source=data/corpus.jsonl: there is no such file"):
        open_source("data/corpus.jsonl")


@pytest.mark.parametrize("content", [None, b"", b"\0"])
def test_a_name_of_two_lines_gives_a_message_of_one(tmp_path, content):
    path = tmp_path / ("a\nb.txt" if content != b"\0" else "a\nb.csv")
    if content is not None:
        path.write_bytes(content)
    for name in (path, path.parent if content == b"" else path):
        with pytest.raises(ValueError, match="data.source=") as error:
            open_source(str(name))
        assert len(str(error.value).splitlines()) == 1
