"""What `pretrain inspect` says of data, counted by hand."""

import re

import numpy as np
import pytest

from pretrain_lib.commands.cli import main
from pretrain_lib.corpus.corpus import open_corpus
from pretrain_lib.data.inspection import inspect_data
from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.data.tokens.arrays import open_split
from pretrain_lib.data.windows.batches import PackedDataset
from tests.conftest import change

LENGTH = 48


def lines_of(*paths, **options):
    options = {"sequence_length": LENGTH, "window": 0} | options
    return list(inspect_data(list(paths), **options))


def only(lines, pattern):
    (found,) = [match for line in lines if (match := re.search(pattern, line))]
    return found


@pytest.fixture
def ends(prepared):
    tokens = open_split(prepared, "train")
    return [*tokens.document_ends(0, len(tokens)).tolist(), len(tokens)]


def test_share_of_documents_cut_by_an_edge_is_that_of_the_first_epoch(prepared, ends):
    tokens = open_split(prepared, "train")
    dataset = PackedDataset(tokens, sequence_length=LENGTH)
    edges = {dataset.order.offset(0, 0) + i * LENGTH for i in range(-1, len(dataset) + 3)}
    starts = [0, *ends[:-1]]
    cut = sum(any(s < edge < e for edge in edges) for s, e in zip(starts, ends, strict=True))
    lines = lines_of(prepared)
    assert only(lines, r"([\d.]+)% of the documents are cut")[1] == f"{100 * cut / len(ends):.1f}"
    unread = 1 - len(dataset) * LENGTH / len(tokens)
    assert only(lines, r"([\d.]+)% of the tokens are left")[1] == f"{100 * unread:.2f}"
    assert only(lines, r"concat +([\d,]+) windows")[1] == f"{len(dataset):,}"


def test_best_fit_says_what_it_pads_and_cuts(prepared, ends):
    lines = lines_of(prepared, packing="best_fit")
    windows, padded, cut = only(
        lines, r"best_fit +([\d,]+) windows of 48: ([\d.]+)% padded, ([\d.]+)% of the documents"
    ).groups()
    windows = int(windows.replace(",", ""))
    assert float(padded) == pytest.approx(100 * (1 - ends[-1] / (windows * LENGTH)), abs=0.005)
    longer = np.mean(np.diff([0, *ends]) > LENGTH)
    assert float(cut) == pytest.approx(100 * longer, abs=0.05)


def test_a_planned_run_states_share_and_epochs_of_each_path(prepared, tmp_path):
    other = tmp_path / "ids.npy"
    np.save(other, np.arange(500) % 300)
    lines = lines_of(prepared, other, weights=[1, 3], planned_tokens=4096 * LENGTH)
    assert only(lines, r"run +([\d,]+) windows")[1] == "4,096"
    shares = [re.search(r"([\d.]+)% of them from (\S+): ([\d.]+) epochs", line) for line in lines]
    shares = [match.groups() for match in shares if match]
    windows = len(PackedDataset(open_split(prepared, "train"), sequence_length=LENGTH))
    assert shares == [
        ("25.0", str(prepared), f"{1024 / windows:.2f}"),
        ("75.0", str(other), f"{3072 / ((500 - LENGTH) // LENGTH):.2f}"),
    ]


def test_the_window_shown_is_the_window_trained_on_cut_at_its_documents(prepared):
    dataset = PackedDataset(
        open_split(prepared, "train"), sequence_length=LENGTH, seed=5, document_masking=True
    )
    numbers = [k for k in range(40) if dataset[k]["document_ends"][0] < LENGTH]
    lines = lines_of(prepared, window=numbers[0], seed=5)
    shown = [line for line in lines if line.startswith("--- tokens")]
    inner = [int(e) for e in dataset[numbers[0]]["document_ends"] if e < LENGTH]
    edges = [0, *inner, LENGTH]
    assert shown == [f"--- tokens {a} to {b}" for a, b in zip(edges, edges[1:], strict=False)]


def test_the_window_shown_is_that_of_permuted_documents(prepared):
    options = {"sequence_length": LENGTH, "seed": 5, "document_masking": True}
    dataset = PackedDataset(open_split(prepared, "train"), shuffle="documents", **options)
    tokenizer = load_tokenizer(prepared / "tokenizer")
    ends = sorted({0, LENGTH, *dataset[3]["document_ends"].tolist()})
    ids = dataset[3]["input_ids"].tolist()
    texts = [tokenizer.decode(ids[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    shown = "\n".join(lines_of(prepared, window=3, seed=5, shuffle="documents"))
    assert all(text in shown for text in texts)


def test_arrays_of_others_are_shown_as_ids(tmp_path):
    ids = np.arange(200, dtype=np.uint16)
    ids.tofile(tmp_path / "train.bin")
    lines = lines_of(tmp_path / "train.bin")
    assert "where documents end is not known" in "\n".join(lines)
    shown = [int(number) for number in lines[-1].split()]
    assert shown == list(range(shown[0], shown[0] + LENGTH))
    with pytest.raises(ValueError, match="best_fit needs document ends, which .*train.bin does no"):
        lines_of(tmp_path / "train.bin", packing="best_fit")


def test_the_plan_of_an_array_is_the_one_that_a_run_makes(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (np.arange(2000, dtype="<u2") % 300).tofile(tmp_path / "a.ds")
    np.arange(50, 2001, 50, dtype="<u8").tofile(tmp_path / "a.ds.index")
    data = {"path": str(tmp_path / "a.ds"), "validation": "none", "packing": "best_fit"}
    (plan,) = open_corpus(change(recipe, data=data)).plans
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/packing/*")}
    length = recipe.batch.sequence_length
    lines = lines_of(tmp_path / "a.ds", packing="best_fit", sequence_length=length)
    assert only(lines, r"best_fit +(\d+) windows")[1] == str(plan.num_windows)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/packing/*")} == made


def test_a_type_is_for_the_files_that_do_not_state_theirs(tmp_path):
    np.arange(500, dtype="<u2").tofile(tmp_path / "bare.npy")
    np.save(tmp_path / "stated.npy", np.arange(500, dtype="<u4") + 500)
    paths = [tmp_path / "bare.npy", tmp_path / "stated.npy"]
    text = "\n".join(lines_of(*paths, dtype="uint16"))
    assert "500 tokens in 1 file, uint16" in text and "500 tokens in 1 file, uint32" in text
    with pytest.raises(ValueError, match=r"data.dtype=uint16, but .*stated.npy holds uint32"):
        lines_of(tmp_path / "stated.npy", dtype="uint16")


def test_the_type_of_bare_ids_is_that_of_the_flag(tmp_path, capsys):
    ids = np.arange(60_000, 60_100, dtype=np.uint32)
    ids.tofile(tmp_path / "train.bin")
    command = ["inspect", str(tmp_path / "train.bin"), "--sequence_length", "48"]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code
    assert "give --dtype uint32" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--dtype", "uint32"])
    assert not stopped.value.code
    shown = [int(number) for number in capsys.readouterr().out.splitlines()[-1].split()]
    assert shown == list(range(shown[0], shown[0] + 48))
