"""Overlap: equal to a naive search, exact at every boundary, the same with several workers."""

import dataclasses
import gzip
import io
import json
import random
import unicodedata

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.data import overlap
from pretrain_lib.data.overlap import find_overlap, format_overlap, write_overlap
from pretrain_lib.data.text import sources
from pretrain_lib.data.text.opening import open_source

pytestmark = pytest.mark.moderate

WORDS = [f"w{i}" for i in range(40)]


def naive_words(text):
    normal = unicodedata.normalize("NFC", text)
    return "".join(c if c.isalnum() else " " for c in normal.lower()).split()


def naive_ngrams(strings, n):
    """Return the n-grams of the strings, as text, in order and each once."""
    lists = [naive_words(string) for string in strings]
    return list(
        dict.fromkeys(" ".join(ws[i : i + n]) for ws in lists for i in range(len(ws) - n + 1))
    )


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_corpus(path, texts):
    write_lines(path, [{"text": text} for text in texts])
    return str(path)


def run(tmp_path, texts, records, **options):
    """Compare items with one .jsonl of documents and return the report on the items' file."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    items = write_lines(tmp_path / "items.jsonl", records)
    return find_overlap([corpus], [items], quiet=True, **options).files[0]


def overlapping_lines(*arguments, **options):
    return [found.line for found in run(*arguments, **options).overlaps]


def small_text(words):
    """Return texts of few words, so that n-grams occur again and again."""
    parts = st.tuples(st.sampled_from(words), st.sampled_from([" ", "_", ", ", "\n", "' -"]))
    return st.lists(parts, max_size=14).map(lambda ps: "".join(w + gap for w, gap in ps))


def test_composed_and_decomposed_text_are_the_same_words(tmp_path):
    item, text = "Größe und Ähnlichkeit für Öl", "die größe und ähnlichkeit für öl hier"
    for form, other in (("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")):
        items = [{"question": unicodedata.normalize(form, item)}]
        corpus = [{"text": unicodedata.normalize(other, text)}]
        report = run(tmp_path, [text["text"] for text in corpus], items, ngram=5)
        assert (report.items, report.overlapping) == (1, 1)


@settings(deadline=None, max_examples=150)
@given(
    texts=st.lists(small_text(["a", "B", "ab", "Éa", "x"]), min_size=1, max_size=8),
    records=st.lists(
        st.lists(small_text(["A", "b", "aB", "éa", "y"]), max_size=3), min_size=1, max_size=6
    ),
    ngram=st.integers(1, 9),
    unit_bytes=st.integers(20, 400),
    piece=st.tuples(st.integers(1, 9), st.integers(1, 4)),
)
def test_report_equals_a_naive_search(tmp_path_factory, texts, records, ngram, unit_bytes, piece):
    folder = tmp_path_factory.mktemp("overlap")
    own = [naive_ngrams(strings, ngram) for strings in records]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", (unit_bytes, unit_bytes))
        patch.setattr(overlap, "PIECE_CHARACTERS", piece[0])
        patch.setattr(overlap, "PIECES_AT_ONCE", piece[1])
        named = [{"strings": strings} for strings in records]
        if not any(own):
            with pytest.raises(ValueError, match=f"ngram={ngram} words"):
                run(folder, texts, named, ngram=ngram)
            return
        report = run(folder, texts, named, ngram=ngram)
        source = open_source(str(folder / "corpus.jsonl"))
        units = [list(source.documents(unit)) for unit in source.units()]
    first = {}
    for u, documents in enumerate(units):
        for d, document in enumerate(documents):
            for gram in naive_ngrams([document.text], ngram):
                first.setdefault(gram, (u, d))
    found = {i: [gram for gram in grams if gram in first] for i, grams in enumerate(own, start=1)}
    found = {line: grams for line, grams in found.items() if grams}
    assert (report.items, report.tested) == (len(records), sum(map(bool, own)))
    assert report.ngrams == sum(map(len, own))
    assert report.overlapping == len(found)
    assert report.overlapping_ngrams == sum(map(len, found.values()))
    assert [
        (o.line, o.ngrams, o.overlapping_ngrams, o.example, (o.unit, o.document))
        for o in report.overlaps
    ] == [
        (line, len(own[line - 1]), len(grams), grams[0], first[grams[0]])
        for line, grams in found.items()
    ]


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_words_are_runs_of_letters_and_digits_of_any_script(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("words")
    grams = naive_ngrams([text], 1)
    if grams:
        report = run(folder, [" ".join(grams)], [{"text": text}], ngram=1)
        assert (report.ngrams, report.overlapping_ngrams) == (len(grams), len(grams))


@pytest.mark.parametrize(
    ("item", "text", "overlaps"),
    [
        ("one two three", "one two three", True),
        ("One, TWO -- three!", "one two\n\nthree", True),
        ("one_two_three", "(one) [two] 'three'", True),
        ("ÜBER 2 ČAJE", "über 2 čaje", True),
        ("\u041c\u0438\u0440 \u0438 \u0434\u0435\u043d\u044c", "мир и день", True),
        ("one two three", "zero one two three four", True),
        ("one two three", "one two threes", False),
        ("one two three", "none two three", False),
        ("one two three", "one two", False),
        ("one two three", "one x two three", False),
        ("one two three", "three two one", False),
        ("one two 3", "one two 33", False),
        ("one two three", "onetwo three", False),
        ("cafe au lait", "café au lait", False),
    ],
)
def test_what_counts_as_the_same_words(tmp_path, item, text, overlaps):
    assert overlapping_lines(tmp_path, [text], [{"q": item}], ngram=3) == [1] * overlaps


def test_planted_items_are_found_where_they_are_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", (2000, 2000))
    draw = random.Random(0)
    records = [{"q": " ".join(draw.choices(WORDS, k=20)), "a": ["yes", "no"]} for _ in range(20)]
    texts = [" ".join(draw.choices(WORDS, k=100)) for _ in range(60)]
    planted = {3: 41, 8: 0, 19: 59}  # line of the item, document
    for line, document in planted.items():
        middle = naive_words(records[line - 1]["q"])[4:17]  # exactly 13 words
        texts[document] = f"{texts[document][:80]} {' - '.join(middle).upper()}. And so on."
    report = run(tmp_path, texts, records)
    assert [found.line for found in report.overlaps] == sorted(planted)
    assert (report.tested, report.overlapping, report.overlapping_ngrams) == (20, 3, 3)
    assert report.ngrams == 20 * 8
    source = open_source(str(tmp_path / "corpus.jsonl"))
    units = source.units()
    assert len(units) > 3
    for found in report.overlaps:
        text = list(source.documents(units[found.unit]))[found.document].text
        assert text == texts[planted[found.line]]
        assert found.example == " ".join(naive_words(records[found.line - 1]["q"])[4:17])
        assert (found.source, found.file) == (source.name, str(tmp_path / "corpus.jsonl"))


def test_ngrams_span_neither_two_strings_of_an_item_nor_two_documents(tmp_path):
    words = WORDS[:26]
    whole, left, right = " ".join(words), " ".join(words[:13]), " ".join(words[13:])
    crossing = " ".join(words[7:20])
    records = [{"a": left, "b": right}, {"a": [left, {"b": right}]}, {"a": whole}]
    assert overlapping_lines(tmp_path, [crossing], records) == [3]
    assert overlapping_lines(tmp_path, [left, right], [{"a": crossing}]) == []
    assert overlapping_lines(tmp_path, [left, "", right], [{"a": crossing}]) == []
    assert overlapping_lines(tmp_path, [f"{left} {right}"], [{"a": crossing}]) == [1]


def test_ngrams_do_not_span_two_files_or_a_document_that_cannot_be_read(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("one two")
    (corpus / "b.txt").write_text("three four")
    lines = ['{"text": "five six"}', '{"text": null}', '{"text": "seven eight"}']
    (corpus / "c.jsonl").write_text("\n".join(lines))
    numbers = naive_words("one two three four five six seven eight")
    records = [{"q": " ".join(pair)} for pair in zip(numbers, numbers[1:], strict=False)]
    items = write_lines(tmp_path / "items.jsonl", records)
    report = find_overlap([str(corpus)], [items], ngram=2, quiet=True)
    assert [found.line for found in report.files[0].overlaps] == [1, 3, 5, 7]
    assert [found.file for found in report.files[0].overlaps] == [
        str(corpus / name) for name in ("a.txt", "b.txt", "c.jsonl", "c.jsonl")
    ]
    assert [found.document for found in report.files[0].overlaps] == [0, 1, 2, 4]


def test_short_items_and_documents(tmp_path):
    long = " ".join(WORDS[:13])
    records = [{"q": " ".join(WORDS[:12])}, {"q": long}, {"q": "", "n": 5, "x": None}, {}]
    report = run(tmp_path, ["", " ", "w1", " ".join(WORDS[:12])], records)
    assert (report.items, report.tested, report.overlapping, report.ngrams) == (4, 1, 0, 1)
    report = run(tmp_path, ["", "w1", long], records)
    assert [found.line for found in report.overlaps] == [2]


def test_the_same_ngram_in_an_item_counts_once(tmp_path):
    records = [{"ctx": "a b c", "ctx_a": "A B C", "endings": ["a b c x", "a b c y"]}]
    report = run(tmp_path, ["a b c", "c x y"], records, ngram=3)
    assert (report.ngrams, report.overlapping_ngrams) == (3, 1)


def test_only_the_fields_asked_for_are_tested(tmp_path):
    records = [
        {"question": "a b c", "answer": "x y z"},
        {"answer": {"deep": ["n o", ["a b c"]]}},
        {"question": ["a b c"]},
    ]
    texts = ["a b c"]
    assert overlapping_lines(tmp_path, texts, records, ngram=3) == [1, 2, 3]
    options = {"ngram": 3, "fields": ["answer"]}
    assert overlapping_lines(tmp_path, texts, records, **options) == [2]
    assert run(tmp_path, texts, records, **options).tested == 2
    options = {"ngram": 3, "fields": ["question", "answer"]}
    assert overlapping_lines(tmp_path, texts, records, **options) == [1, 2, 3]


def test_text_field_is_the_corpus_one(tmp_path):
    corpus = write_lines(tmp_path / "a.jsonl", [{"text": "x y z", "content": "a b c"}])
    items = write_lines(tmp_path / "items.jsonl", [{"text": "x y z"}, {"text": "a b c"}])
    report = find_overlap([str(corpus)], [items], ngram=3, text_field="content", quiet=True)
    assert [found.line for found in report.files[0].overlaps] == [2]


def test_number_of_workers_changes_nothing_and_the_first_place_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", (3000, 3000))
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS[:8], k=60)) for _ in range(150)]
    late = write_corpus(tmp_path / "late.jsonl", texts)
    early = write_corpus(tmp_path / "early.jsonl", texts[:50:-1])
    records = [{"q": " ".join(draw.choices(WORDS[:8], k=9))} for _ in range(100)]
    records += [{"q": text} for text in texts[:100:7]]
    items = [
        write_lines(tmp_path / "one.jsonl", records[:60]),
        write_lines(tmp_path / "two.jsonl", records[60:]),
    ]
    assert len(open_source(late).units()) > 5
    one, two = (
        find_overlap([early, late], items, ngram=5, workers=workers, quiet=True)
        for workers in (1, 2)
    )
    assert one == two
    places = [found for file in one.files for found in file.overlaps]
    assert {found.source for found in places} == {early, late}
    for found in places:
        gram = found.example
        earlier = [text for text in texts[:50:-1] if gram in naive_ngrams([text], 5)]
        assert (found.source == early) == bool(earlier)
        source = open_source(found.source)
        units = [[d.text for d in source.documents(unit)] for unit in source.units()]
        before = [text for texts in units[: found.unit] for text in texts]
        before += units[found.unit][: found.document]
        assert gram in naive_ngrams([units[found.unit][found.document]], 5)
        assert not any(gram in naive_ngrams([text], 5) for text in before)


def test_large_text_file_is_searched_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", (4000, 4000))
    draw = random.Random(2)
    words = draw.choices(WORDS, k=6000)
    (tmp_path / "a.txt").write_text(" ".join(words))
    items = write_lines(tmp_path / "i.jsonl", [{"q": " ".join(words[4000:4020])}, {"q": "x " * 13}])
    source = open_source(str(tmp_path / "a.txt"))
    report = find_overlap([source.name], [items], quiet=True)
    parts = [[d.text for d in source.documents(unit)] for unit in source.units()]
    assert len(parts) > 3
    assert report.sources[0].documents == sum(map(len, parts))
    (found,) = report.files[0].overlaps
    assert found.example in parts[found.unit][found.document]


def test_documents_that_cannot_be_read_are_counted_and_shown(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a b c"}\n{"body": "d e f"}\n{"text": 5}\n{"text": "g h i"}\n')
    records = [{"q": "a b c"}, {"q": "d e f"}, {"q": "g h i"}]
    items = write_lines(tmp_path / "items.jsonl", records)
    report = find_overlap([str(corpus)], [items], ngram=3, quiet=True)
    assert [found.line for found in report.files[0].overlaps] == [1, 3]
    (read,) = report.sources
    assert (read.documents, read.rejected) == (2, 2)
    assert '"body": "d e f"' in read.first_rejected
    assert f"{corpus}: documents searched: 2; 2 cannot be read" in format_overlap(report)
    assert read.first_rejected in format_overlap(report)


def test_a_warning_about_a_file_is_no_document(tmp_path):
    raw = gzip.compress(b'{"text": "a b c"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(raw + b"garbage")
    items = write_lines(tmp_path / "items.jsonl", [{"q": "a b c"}])
    report = find_overlap([str(tmp_path / "a.jsonl.gz")], [items], ngram=3, quiet=True)
    assert (report.sources[0].documents, report.sources[0].rejected) == (1, 0)
    assert [found.line for found in report.files[0].overlaps] == [1]


def test_blank_lines_of_items_are_no_items_but_count_as_lines(tmp_path):
    (tmp_path / "items.jsonl").write_bytes('\ufeff{"q": "ä b"}\r\n\n  \n{"q": "c d"}'.encode())
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["c d"])
    (file,) = find_overlap([corpus], [tmp_path / "items.jsonl"], ngram=2, quiet=True).files
    assert (file.items, file.tested) == (2, 2)
    assert [found.line for found in file.overlaps] == [4]


def test_table_and_json_hold_the_report(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["a b c d e", "é f g"])
    many = [{"q": f"a b c x{i} y{i}"} for i in range(1200)]  # 1 of 3 trigrams
    one = write_lines(tmp_path / "one.jsonl", [*many, {"q": "no"}, {"q": "n o p"}])
    two = write_lines(tmp_path / "two.jsonl", [{"q": "C D E z"}, {"q": "É f g"}])
    none = write_lines(tmp_path / "none.jsonl", [{"q": "no"}])
    report = find_overlap([corpus], [one, two, none], ngram=3, quiet=True)
    rows = {
        line.split()[0]: line.split()[1:] for line in format_overlap(report).splitlines() if line
    }
    assert rows[str(one)] == ["1,202", "1,201", "1,200", "99.92%"]
    assert rows[str(two)] == ["2", "2", "2", "100.00%"]
    assert rows[str(none)] == ["1", "0", "0", "-"]
    shown = format_overlap(report).splitlines()[-30:]
    assert shown[:6] == [
        f"{two}, line 2: 1 of 1 3-grams:",
        '  "é f g"',
        f"  in {corpus} (unit 0, document 1)",
        f"{two}, line 1: 1 of 2 3-grams:",
        '  "c d e"',
        f"  in {corpus} (unit 0, document 0)",
    ]
    assert [line.split(":")[0] for line in shown[6::3]] == [f"{one}, line {i}" for i in range(1, 9)]
    write_overlap(report, tmp_path / "new" / "report.json")
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert written == dataclasses.asdict(report)
    assert written["files"][1]["overlaps"][1] == {
        "line": 2,
        "ngrams": 1,
        "overlapping_ngrams": 1,
        "example": "é f g",
        "source": corpus,
        "unit": 0,
        "document": 1,
        "file": corpus,
    }


def test_report_without_any_overlap_shows_none(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["a b"])
    items = write_lines(tmp_path / "items.jsonl", [{"q": "b a"}])
    text = format_overlap(find_overlap([corpus], [items], ngram=2, quiet=True))
    assert "0.00%" in text
    assert "first:" not in text


@pytest.mark.parametrize(
    "line",
    [b'{"q": "cut', b'["a b c"]', b'"a b c"', b"5", b"null", b'{"q": "\xff"}', b"[" * 100_000],
)
def test_line_of_items_that_is_no_json_object_is_named(tmp_path, line):
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["a b c"])
    (tmp_path / "items.jsonl").write_bytes(b'{"q": "a b c"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match="items.jsonl: line 3 must be a JSON object"):
        find_overlap([corpus], [tmp_path / "items.jsonl"], ngram=3, quiet=True)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"ngram": 0}, "ngram=0 must be at least 1"),
        ({"ngram": -1}, "ngram=-1 must be at least 1"),
        ({"ngram": 4}, "none of 2 items has a string of ngram=4 words"),
        ({"ngram": 3, "fields": ["a"]}, "none of 2 items has a string"),
        ({"ngram": 3, "fields": ["q", "x", "y"]}, "fields=x, y: no record of .*they have q, a"),
        ({"ngram": 3, "text_field": "body"}, "corpus.jsonl: no document can be read: .*'body'"),
    ],
)
def test_what_cannot_be_tested_is_refused(tmp_path, options, rule):
    records = [{"q": "a b c", "a": "yes"}, {"q": "c d"}]
    with pytest.raises(ValueError, match=rule):
        run(tmp_path, ["a b c"], records, **options)


def test_missing_files_are_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["a b c"])
    items = write_lines(tmp_path / "items.jsonl", [{"q": "a b c"}])
    options = {"ngram": 3, "quiet": True}
    with pytest.raises(ValueError, match="items=.*other.jsonl: there is no such file"):
        find_overlap([corpus], [items, tmp_path / "other.jsonl"], **options)
    with pytest.raises(ValueError, match="no item is in there"):
        find_overlap([corpus], [write_lines(tmp_path / "empty.jsonl", [])], **options)
    with pytest.raises(ValueError, match="sources is empty"):
        find_overlap([], [items], **options)
    with pytest.raises(ValueError, match="other.txt: there is no such file"):
        find_overlap([corpus, str(tmp_path / "other.txt")], [items], **options)
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n\n")
    with pytest.raises(ValueError, match="blank.jsonl: no document can be read: it has none"):
        find_overlap([corpus, str(blank)], [items], **options)


def test_a_separator_splits_a_text_file_into_documents(tmp_path):
    """An n-gram that spans two documents occurs in neither."""
    (tmp_path / "a.txt").write_text("one two three\n<|sep|>\nfour five six\n")
    items = write_lines(tmp_path / "items.jsonl", [{"q": "two three four"}, {"q": "four five six"}])
    options = {"ngram": 3, "quiet": True, "document_separator": "<|sep|>"}
    (file,) = find_overlap([str(tmp_path / "a.txt")], [items], **options).files
    assert [(found.line, found.file) for found in file.overlaps] == [(2, str(tmp_path / "a.txt"))]


WRITERS = {
    "gzip": lambda lines: gzip.compress(lines),
    "Parquet": lambda lines: pq_bytes(lines),
    "UTF-16": lambda lines: lines.decode().encode("utf-16"),
    "array": lambda lines: json.dumps([json.loads(line) for line in lines.splitlines()]).encode(),
    "carriage returns": lambda lines: lines.replace(b"\n", b"\r"),
}


def pq_bytes(lines):
    found = io.BytesIO()
    rows = [json.loads(line) for line in lines.splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), found)
    return found.getvalue()


@pytest.mark.parametrize("kind", WRITERS)
def test_items_of_another_kind_are_refused_by_their_kind(tmp_path, kind):
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["a b c d"])
    lines = b'{"q": "a b c d"}\n{"q": "e f g h"}\n'
    items = tmp_path / "the items.jsonl"
    items.write_bytes(lines)
    assert find_overlap([corpus], [items], quiet=True, ngram=3).files[0].overlapping == 1
    items.write_bytes(WRITERS[kind](lines))
    message = f"items={tmp_path}/the items.jsonl .*{kind}.*; (write|decompress)"
    with pytest.raises(ValueError, match=message) as error:
        find_overlap([corpus], [items], quiet=True, ngram=3)
    assert len(str(error.value).splitlines()) == 1
