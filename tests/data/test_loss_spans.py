"""Loss masks that `prepare` writes from spans: which tokens count, how they are kept and read."""

import json
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.corpus.corpus import build_dataset, open_corpus
from pretrain_lib.data.inspection import inspect_data
from pretrain_lib.data.prepare import prepare as prepare_module
from pretrain_lib.data.prepare.job import Job
from pretrain_lib.data.prepare.loss_spans import mask_tokens
from pretrain_lib.data.prepare.prepare import prepare
from pretrain_lib.data.text import sources
from pretrain_lib.data.text.opening import open_source
from pretrain_lib.data.text.tokenizer import Tokenizer, train_tokenizer
from pretrain_lib.data.tokens.arrays import open_split
from pretrain_lib.data.tokens.manifests import FORMAT_VERSION, MASKED_VERSION
from pretrain_lib.data.tokens.verify import verify_folder
from pretrain_lib.data.windows.packing import IGNORED_TARGET
from tests.conftest import change

pytestmark = pytest.mark.moderate

WORDS = ["one", "two", "Größe", "大きさ", "naïve", "\U0001f680", "<|endoftext|>", "12", "\n", "  "]
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=3 + i % 20)) for i in range(300)]
TOKENIZER = train_tokenizer(TEXTS, vocabulary_size=300)


def plain_mask(text, spans):
    """Return which tokens of a text overlap a span, by the offsets that `tokenizers` gives."""
    TOKENIZER.backend.encode_special_tokens = True  # what spells one is text
    encoding = TOKENIZER.backend.encode(text, add_special_tokens=False)
    if spans is None:
        return [True] * (1 + len(encoding.ids))
    counts = [any(start < b and a < end for a, b in spans) for start, end in encoding.offsets]
    return [False, *counts]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), texts=st.lists(st.text("ab 大\U0001f680é\n", min_size=1), min_size=1))
def test_tokens_that_overlap_a_span_count(data, texts):
    places = [st.integers(0, len(text)) for text in texts]
    spans = [
        data.draw(st.none() | st.lists(st.tuples(p, p).map(sorted).map(tuple), max_size=3))
        for p in places
    ]
    # An empty span is in no token.
    plain = [own if own is None else [(a, b) for a, b in own if a < b] for own in spans]
    expected = [plain_mask(text, own) for text, own in zip(texts, plain, strict=True)]
    rows = TOKENIZER.encode_documents(texts)
    tokens = np.concatenate(rows)
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    raw = [text.encode() for text in texts]
    found = mask_tokens(TOKENIZER, tokens, ends, raw, spans)
    assert found.tolist() == [count for own in expected for count in own]


def write_spans(folder):
    """Write documents with spans, some whole and some with none, and return them by text."""
    folder.mkdir()
    draw, spans, lines = random.Random(1), {}, []
    for number, text in enumerate(TEXTS):
        text = f"{number} {text}"
        places = sorted(draw.choices(range(len(text) + 1), k=4))
        own = [None, [], [places[:2], places[2:]], [places[:2]], [[0, len(text)]]][number % 5]
        spans[text] = own
        lines.append(json.dumps({"text": text, "answer": own}) + "\n")
    (folder / "a.jsonl").write_text("".join(lines[:200]))
    (folder / "b.ndjson").write_text("".join(lines[200:]))
    return spans


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Documents with spans, prepared by one process and by two."""
    root = tmp_path_factory.mktemp("spans")
    spans = write_spans(root / "text")
    TOKENIZER.save(root / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", (3000, 3000))
        patch.setattr(prepare_module, "WORKER_BYTES", 1)
        job = Job((str(root / "text"),), str(root / "tokenizer"), loss_spans="answer")
        for workers in (1, 2):
            prepare(job, root / f"{workers}", workers=workers, quiet=True)
        other = Job((str(root / "text"),), str(root / "tokenizer"))
        prepare(other, root / "unmasked", workers=1, quiet=True)
    return root, spans


def test_prepared_masks_are_those_of_the_documents(folders):
    root, spans = folders
    assert verify_folder(root / "1") == []
    for path in (root / "1").rglob("*.*"):
        if path.is_file() and path.name != ".lock":
            assert path.read_bytes() == (root / "2" / path.relative_to(root / "1")).read_bytes()
    for split in ("train", "validation"):
        tokens = open_split(root / "1", split)
        bare = open_split(root / "unmasked", split)
        assert bare.counts(0, 1) is None
        assert np.array_equal(tokens.read(0, len(tokens)), bare.read(0, len(bare)))
        ids, counts = tokens.read(0, len(tokens)), tokens.counts(0, len(tokens))
        ends = [*tokens.document_ends(0, len(tokens)).tolist(), len(tokens)]
        for start, end in zip([0, *ends], ends, strict=False):
            text = TOKENIZER.decode(ids[start + 1 : end])
            own = spans[text]
            own = own and [(a, b) for a, b in own if a < b]
            assert counts[start:end].tolist() == plain_mask(text, own)
    manifest = json.loads((root / "1" / "manifest.json").read_text())
    assert manifest["format_version"] == MASKED_VERSION
    assert (
        manifest["splits"]["train"]["counted_tokens"]
        == open_split(root / "1", "train").counts(0, manifest["splits"]["train"]["tokens"]).sum()
    )
    unmasked = json.loads((root / "unmasked" / "manifest.json").read_text())
    assert unmasked["format_version"] == FORMAT_VERSION
    assert unmasked["fingerprint"] != manifest["fingerprint"]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("masking", [False, True])
def test_a_run_has_no_targets_that_do_not_count(folders, recipe, packing, masking):
    root, _ = folders
    options = {"packing": packing, "document_masking": masking, "validation": "none"}
    options["path"] = str(root / "1")
    plain = options | {"path": str(root / "unmasked")}
    masked, bare = (change(recipe, data=data) for data in (options, plain))
    corpora = [open_corpus(config) for config in (masked, bare)]
    ours, other = (build_dataset(c, k) for c, k in zip((masked, bare), corpora, strict=True))
    array = corpora[0].train[0]
    # Ids do not tell the places, so windows are compared with those without a mask.
    differ = 0
    for index in range(min(len(ours), 40)):
        window, plain_window = ours[index], other[index]
        assert window["input_ids"].equal(plain_window["input_ids"])
        kept = window["targets"] != IGNORED_TARGET
        assert window["targets"][kept].equal(plain_window["targets"][kept])
        differ += int((plain_window["targets"] != IGNORED_TARGET).sum() - kept.sum())
        if packing == "concat" and not masking:
            start = int(ours.order.locate(np.array([index]))[2][0])
            assert kept.tolist() == array.counts(start + 1, len(kept)).tolist()
    assert differ > 50


def test_inspect_says_how_many_tokens_count(folders):
    root, _ = folders
    counts = open_split(root / "1", "train").counts(0, len(open_split(root / "1", "train")))
    lines = "\n".join(inspect_data([root / "1"], sequence_length=16, window=0))
    assert f"{counts.sum():,} tokens ({counts.mean():.2%}) count, by the loss mask" in lines


def test_a_damaged_mask_is_found(folders, tmp_path):
    root, _ = folders
    names = sorted(path.name for path in (root / "1").glob("train-*.loss"))
    raw = bytearray((root / "1" / names[0]).read_bytes())
    raw[3] ^= 1
    for path in (root / "1").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(raw if path.name == names[0] else path.read_bytes())
    with pytest.raises(ValueError, match=f"{names[0]}, block 0 .* differ from what was written"):
        open_split(tmp_path, "train").counts(0, 9)
    assert f"{tmp_path / names[0]}: its bytes differ" in "\n".join(verify_folder(tmp_path))


WRONG = [{}, {"s": "all"}, {"s": [[3]]}, {"s": [[2, 1]]}, {"s": [[-1, 1]]}, {"s": [[0, 99]]}]
WRONG += [{"s": [[0.5, 1]]}, {"s": [[True, 1]]}, {"s": [5]}, {"s": {"a": 1}}]


def test_documents_with_wrong_spans_are_left_out_by_name(tmp_path):
    good = {"text": "some words", "s": [[0, 4]]}
    lines = [good, *({"text": "some words"} | wrong for wrong in WRONG), good | {"s": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_source(str(tmp_path / "a.jsonl"), loss_spans="s")
    (unit,) = source.units()
    first, *bad, last = source.documents(unit)
    assert (first.spans, last.spans) == (((0, 4),), None)
    assert len(bad) == len(WRONG)
    assert {item.reason for item in bad} == {
        "no [start, end] of characters of the text in data.loss_spans='s'"
    }
    job = Job((str(tmp_path / "a.jsonl"),), train_tokenizer=300, loss_spans="s", max_rejected=3)
    with pytest.raises(ValueError, match="4 documents could not be read.*data.loss_spans"):
        prepare(job, tmp_path / "out", quiet=True)


@pytest.mark.parametrize("other", ["NaN", "Infinity", '"\\ud800"', "1e999", "9" * 5000])
def test_spans_are_read_whatever_other_fields_hold(tmp_path, other):
    line = f'{{"text": "abc def", "s": [[0, 2]], "other": {other}}}\n'
    (tmp_path / "a.jsonl").write_text(line)
    source = open_source(str(tmp_path / "a.jsonl"), loss_spans="s")
    ((document,),) = [list(source.documents(unit)) for unit in source.units()]
    assert (document.text, document.spans) == ("abc def", ((0, 2),))


def test_spans_are_refused_where_they_cannot_be_used(tmp_path):
    (tmp_path / "a.txt").write_text("some words")
    lines = json.dumps({"text": "some words " * 9, "s": []}) + "\n"
    (tmp_path / "a.jsonl").write_text(lines * 9)
    source, options = (str(tmp_path / "a.jsonl"),), {"loss_spans": "s", "validation": "none"}
    with pytest.raises(ValueError, match="data.loss_spans='s' is a field of JSON lines"):
        Job((str(tmp_path / "a.txt"),), train_tokenizer=300, **options).open_sources()
    with pytest.raises(ValueError, match="data.loss_spans='s' needs whole documents"):
        Job(source, train_tokenizer=300, loss_spans="s", validation="first:3")
    with pytest.raises(ValueError, match="data.loss_spans='s' leaves out every token"):
        prepare(Job(source, train_tokenizer=300, **options), tmp_path / "none", quiet=True)
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    backend.normalizer = tokenizers.normalizers.NFC()
    Tokenizer(backend, TOKENIZER.end_of_text).save(tmp_path / "nfc")
    with pytest.raises(ValueError, match="data.loss_spans='s' needs a tokenizer whose tokens are"):
        prepare(Job(source, str(tmp_path / "nfc"), **options), tmp_path / "nfc-out", quiet=True)
