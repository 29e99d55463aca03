"""The tasks made of held-out text: true continuations, equal form, balanced labels."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pretrain_lib.data.prepare.prepare import Job, prepare
from pretrain_lib.evaluate.local_tasks import write_local_tasks
from pretrain_lib.evaluate.tasks import open_tasks

SIZES = {"context_characters": 80, "ending_characters": 30}
WORDS = ("sun", "moon", "cloud", "rain", "wind", "river", "stone", "élan", "naïve", "字", "été")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    generator = random.Random(0)
    return [
        " ".join(generator.choice(WORDS) + str(generator.randrange(1000)) for _ in range(200))
        + "\n\n  indented, at the end\n"
        for _ in range(60)
    ]


@pytest.fixture(scope="module")
def prepared(documents, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("local_tasks")
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    job = Job(sources=(str(source),), train_tokenizer=400, validation="hash:0.2")
    prepare(job, folder / "data", quiet=True)
    return folder / "data"


def read_rows(out: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{task}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(prepared, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("tasks")
    names = write_local_tasks(prepared, out, items=101, seed=3, **SIZES)
    assert names == ["heldout_choice", "heldout_perplexity"]
    return read_rows(out, "heldout_choice")


def test_only_the_right_ending_follows_the_context(rows, documents):
    assert len(rows) == 101
    for row in rows:
        follows = [
            any(f"{row['context']} {ending}" in text for text in documents)
            for ending in row["choices"]
        ]
        assert follows == [position == row["label"] for position in range(4)]


def test_endings_have_the_same_form(rows, documents):
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert 40 <= len(row["context"]) <= 80
        for ending in row["choices"]:
            assert len(ending) == 30 and not ending[0].isspace()
            assert any(f" {ending}" in text for text in documents)


def test_items_do_not_share_text(rows):
    right = {row["choices"][row["label"]] for row in rows}
    assert len(right) == len(rows)  # no stretch serves as an item twice
    contexts = " ".join(row["context"] for row in rows)
    assert not any(ending in contexts for ending in right)


def test_labels_are_balanced_and_shuffled(rows):
    labels = [row["label"] for row in rows]
    assert sorted(Counter(labels).values()) == [25, 25, 25, 26]
    assert labels != sorted(labels) and labels != [i % 4 for i in range(101)]


def test_the_text_and_the_seed_alone_decide(prepared, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_local_tasks(prepared, tmp_path / name, items=20, seed=seed, **SIZES)
    a, b, c = (read_rows(tmp_path / name, "heldout_choice") for name in "abc")
    assert a == b != c


def test_perplexity_documents_are_the_beginnings_of_held_out_ones(prepared, documents, tmp_path):
    write_local_tasks(prepared, tmp_path, items=4, document_characters=300, documents=5, **SIZES)
    texts = [row["text"] for row in read_rows(tmp_path, "heldout_perplexity")]
    assert len(texts) == 5
    assert set(texts) <= {text[:300] for text in documents}


def test_whole_documents_come_back_unchanged(prepared, documents, tmp_path):
    write_local_tasks(prepared, tmp_path, items=4, document_characters=10**6, **SIZES)
    held_out = json.loads((prepared / "manifest.json").read_text())["splits"]["validation"]
    texts = [row["text"] for row in read_rows(tmp_path, "heldout_perplexity")]
    assert len(texts) == held_out["documents"]
    assert sum(len(text.encode()) for text in texts) == held_out["text_bytes"]
    assert set(texts) <= set(documents)


def test_data_files_are_absolute(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for task in write_local_tasks(prepared, Path("tasks"), items=4, **SIZES):
        config = yaml.safe_load((tmp_path / "tasks" / f"{task}.yaml").read_text())
        data = Path(config["dataset_kwargs"]["data_files"]["validation"])
        assert data == (tmp_path / "tasks" / f"{task}.jsonl").resolve()


@pytest.mark.slow
def test_tasks_load_from_a_folder_whose_name_is_a_pattern(prepared, tmp_path):
    folder = tmp_path / "my tasks [1]*"
    names = write_local_tasks(prepared, folder, items=4, **SIZES)
    tasks = open_tasks(names, include_path=folder).manager.load(names)["tasks"]
    for name in names:
        assert len(tasks[name].validation_docs()) == len(read_rows(folder, name))


def test_too_little_text_is_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match="items=100000 needs .* gives"):
        write_local_tasks(prepared, tmp_path / "tasks", items=100_000, **SIZES)
    assert not (tmp_path / "tasks").exists()


def test_a_folder_without_held_out_text_is_refused(documents, tmp_path):
    source = tmp_path / "text.txt"
    source.write_text(documents[0])
    job = Job(sources=(str(source),), train_tokenizer=300, validation="none")
    prepare(job, tmp_path / "data", quiet=True)
    with pytest.raises(ValueError, match="no held-out text"):
        write_local_tasks(tmp_path / "data", tmp_path / "tasks")
