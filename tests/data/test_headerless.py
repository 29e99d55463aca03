"""Arrays of which nothing in the file says the type: read as told, or refused when in doubt."""

import gzip
import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pretrain_lib.data.tokens.foreign import open_foreign
from pretrain_lib.data.tokens.headerless import SAMPLE_BYTES, SAMPLES

TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


def ids_below(vocabulary, count=5000, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, count)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(["ids.bin", "part-0-00000.npy"]),
    dtype=st.sampled_from(TYPES),
    ids=st.lists(st.integers(0, 127), min_size=1, max_size=40),
    shift=st.integers(0, 8),
)
def test_ids_of_a_stated_type_are_read_as_numpy_wrote_them(
    tmp_path_factory, name, dtype, ids, shift
):
    path = tmp_path_factory.mktemp("raw") / name
    written = np.array(ids, dtype) << (shift if dtype[-1] != "8" else 0)
    array = np.memmap(path, dtype=dtype, mode="w+", shape=len(ids))  # as OLMo and dolma write
    array[:] = written
    array.flush()
    tokens = open_foreign(path, vocabulary_size=2**16, dtype=dtype)
    assert tokens.read(0, len(tokens)).tolist() == written.tolist()


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(50_257, "uint32"), (128_256, "uint32"), (151_936, "int32"), (10, "uint32")]
    + [(50_257, "int64"), (256_000, "uint32"), (128_256, "int64")],
)
def test_longer_ids_are_not_taken_for_uint16(tmp_path, vocabulary, dtype):
    ids = ids_below(vocabulary)
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    named = "int64" if dtype == "int64" else "uint32"
    with pytest.raises(ValueError, match=f"train.bin has no header, .* give data.dtype={named}"):
        open_foreign(tmp_path / "train.bin", vocabulary_size=None)
    tokens = open_foreign(tmp_path / "train.bin", vocabulary_size=vocabulary, dtype=dtype)
    assert tokens.read(0, len(tokens)).tolist() == ids.tolist()


@pytest.mark.parametrize("dtype", [">u4", ">i4", ">i8", ">u2"])
@pytest.mark.parametrize("vocabulary", [10, 300, 50_257, 128_256])
def test_ids_of_the_other_byte_order_are_refused_with_what_converts_them(
    tmp_path, dtype, vocabulary
):
    if dtype == ">u2" and not 256 < vocabulary < 2**16:
        return  # cannot be told, or cannot be written
    ids = ids_below(vocabulary)
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="train.bin .*big-endian ids.* little-endian") as error:
        open_foreign(tmp_path / "train.bin", vocabulary_size=None)
    found = re.search(r"numpy.fromfile\(FILE, '(\S+)'\).astype\('(\S+)'\).tofile", str(error.value))
    np.fromfile(tmp_path / "train.bin", found[1]).astype(found[2]).tofile(tmp_path / "new.bin")
    named = re.search(r"tofile\(NEW\), and give data.dtype=(\w+)", str(error.value))
    options = {"vocabulary_size": vocabulary, "dtype": named and named[1]}
    tokens = open_foreign(tmp_path / "new.bin", **options)
    assert tokens.read(0, len(tokens)).tolist() == ids.tolist()


@pytest.mark.parametrize("vocabulary", [65, 100, 255])
def test_big_endian_uint16_of_a_small_vocabulary_is_refused(tmp_path, vocabulary):
    ids_below(vocabulary).astype(">u2").tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="holds big-endian ids"):
        open_foreign(tmp_path / "train.bin", vocabulary_size=50_257)


@pytest.mark.parametrize("vocabulary", [4, 20, 65, 50_257, 65_536])
def test_uint16_is_read_without_being_told(tmp_path, vocabulary):
    ids = ids_below(vocabulary)
    ids[:4000:2] = 0  # padding, or a token that is found in every second place
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    tokens = open_foreign(tmp_path / "train.bin", vocabulary_size=vocabulary)
    assert tokens.read(0, len(tokens)).tolist() == ids.tolist()


def test_a_long_file_is_judged_by_samples_of_all_of_it(tmp_path):
    ids = ids_below(50_257, 2 * SAMPLES * SAMPLE_BYTES)
    head = len(ids) // 2
    ids[1:head:2] = 0
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    tokens = open_foreign(tmp_path / "train.bin", vocabulary_size=50_257)
    assert tokens.read(head, 100).tolist() == ids[head : head + 100].tolist()
    ids.astype("<u4").tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="data.dtype=uint32"):
        open_foreign(tmp_path / "train.bin", vocabulary_size=50_257)


def test_npy_without_header_is_refused_for_its_true_reason(tmp_path):
    ids_below(50_257).astype("<u2").tofile(tmp_path / "part-0-00000.npy")
    with pytest.raises(ValueError, match="has no .npy header: .* data.dtype=uint16") as error:
        open_foreign(tmp_path / "part-0-00000.npy", vocabulary_size=50_257)
    assert "pickle" not in str(error.value)


def test_a_type_that_the_file_contradicts_is_refused(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(9, dtype=np.int32))
    assert len(open_foreign(tmp_path / "ids.npy", vocabulary_size=9, dtype="int32")) == 9
    (tmp_path / "llmc.bin").write_bytes(struct.pack("<256i", 20240520, 1, 2, *[0] * 253) + b"abcd")
    assert len(open_foreign(tmp_path / "llmc.bin", vocabulary_size=None, dtype="uint16")) == 2
    for name, dtype in (("ids.npy", "int32"), ("llmc.bin", "uint16")):
        with pytest.raises(ValueError, match=f"dtype=uint32, but .*{name} holds {dtype} by its"):
            open_foreign(tmp_path / name, vocabulary_size=None, dtype="uint32")


def test_ids_that_do_not_fill_the_file_are_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(6))
    with pytest.raises(ValueError, match="a.bin: 6 bytes are not a whole number of uint32 ids"):
        open_foreign(tmp_path / "a.bin", vocabulary_size=None, dtype="uint32")
    np.save(tmp_path / "a.npy", np.arange(9))
    with (tmp_path / "a.npy").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"a.npy: 204 bytes, but its tokens need 200, for 9 int64"):
        open_foreign(tmp_path / "a.npy", vocabulary_size=None)


@pytest.mark.parametrize(
    ("count", "size", "message"),
    [
        (-5, 5, "header counts -5 tokens, a number that overflowed"),
        (0, 5, "header counts 0 tokens"),
        (3, 5, "1034 bytes, but its tokens need 1030"),
        (7, 5, "1034 bytes, but its tokens need 1038"),
    ],
)
def test_a_header_of_llmc_that_its_file_contradicts_is_refused(tmp_path, count, size, message):
    header = struct.pack("<256i", 20240520, 1, count, *[0] * 253)
    (tmp_path / "train.bin").write_bytes(header + bytes(2 * size))
    with pytest.raises(ValueError, match=f"train.bin: .*{message}"):
        open_foreign(tmp_path / "train.bin", vocabulary_size=None)


@pytest.mark.parametrize(("magic", "what"), [(20240522, "evaluation data"), (20240326, "a model")])
def test_other_files_of_llmc_are_no_tokens(tmp_path, magic, what):
    content = struct.pack("<256i", magic, 1, 10, *[0] * 253) + ids_below(50_257).tobytes()
    (tmp_path / "hellaswag_val.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"val.bin holds no tokens but {what} of llm.c \(magic"):
        open_foreign(tmp_path / "hellaswag_val.bin", vocabulary_size=None)


def test_a_name_that_is_not_utf8_is_said_so_that_it_can_be_printed(tmp_path):
    path = tmp_path / "b\udcff.bin"
    ids_below(50_257).astype("<u2").tofile(path)
    with pytest.raises(ValueError, match=r"b\\udcff.bin: the name is not UTF-8; rename") as error:
        open_foreign(tmp_path / "*.bin", vocabulary_size=None)
    str(error.value).encode()


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_negative_ids_are_not_taken_for_uint16(tmp_path, dtype):
    ids = ids_below(128_256).astype(dtype)
    ids[::50] = -100  # as ignored targets are written
    ids.tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=f"every second uint16 .* give data.dtype={dtype}"):
        open_foreign(tmp_path / "train.bin", vocabulary_size=None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("array.npy", "rename it to end in .npy"), ("ids.gz", "decompress it"), ("ids.txt", "text")]
    + [("llmc", "big-endian"), ("torch.pt", "ZIP archive")],
)
def test_what_is_no_array_of_ids_is_refused_by_its_content(tmp_path, name, expected):
    ids, path = ids_below(50_257, 2000).astype("<u2"), tmp_path / name
    if name == "array.npy":
        np.save(path, ids)
    elif name == "torch.pt":
        torch.save(torch.arange(2000), path)
    elif name == "llmc":
        path.write_bytes(np.array([20240520, 1, 100], ">i4").tobytes() + ids.tobytes())
    else:
        path.write_bytes(gzip.compress(ids.tobytes()) if name == "ids.gz" else b"A line.\n" * 99)
    file = tmp_path / "train.bin"
    file.write_bytes(path.read_bytes() + bytes(path.stat().st_size % 2))
    with pytest.raises(ValueError, match=f"train.bin .*{expected}"):
        open_foreign(file, vocabulary_size=None)


TEXTS = {
    "French": "Été comme hiver, l'élève préfère les crêpes à la crème brûlée. ",
    "English": "It\u2019s a long day, isn\u2019t it? The fox jumps over the dog.\f\n",
    "Chinese": "语言模型的预训练数据。",
    "Greek": "Τη γλώσσα μου έδωσαν ελληνική 😀 ",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("size", [64, 998, 40_000, 700_002])
def test_text_of_any_script_is_not_taken_for_ids(tmp_path, name, size):
    text = (TEXTS[name] * (size // len(TEXTS[name]) + 1)).encode()
    for start in range(4):  # wherever it is cut
        (tmp_path / "train.bin").write_bytes(text[start : start + size])
        with pytest.raises(ValueError, match=r"train.bin holds text: .* \(uint8 if each is a byte"):
            open_foreign(tmp_path / "train.bin", vocabulary_size=None)


def test_text_of_other_encodings_and_with_a_stray_control_is_text(tmp_path):
    for raw in ((TEXTS["French"] * 99).encode("latin-1"), TEXTS["Greek"].encode() * 99 + b"\0."):
        (tmp_path / "train.bin").write_bytes(raw[: len(raw) // 2 * 2])
        with pytest.raises(ValueError, match="train.bin holds text"):
            open_foreign(tmp_path / "train.bin", vocabulary_size=None)


@settings(deadline=None, max_examples=100)
@given(
    vocabulary=st.sampled_from([2, 10, 65, 127, 256, 257, 300, 8192, 32_000, 50_257, 65_536]),
    size=st.sampled_from([1, 2, 3, 40, 5000]),
    seed=st.integers(0, 99),
    shape=st.sampled_from(["even", "zipf", "bytes"]),
)
def test_ids_of_every_vocabulary_are_read(tmp_path_factory, vocabulary, size, seed, shape):
    random = np.random.default_rng(seed)
    ids = random.integers(0, vocabulary, size)
    if shape == "zipf":
        ids = random.zipf(1.3, size) % vocabulary
    elif shape == "bytes":  # of text, with an end-of-text token
        ids = np.where(random.random(size) < 0.01, max(vocabulary, 257) - 1, ids % 96 + 32)
    path = tmp_path_factory.mktemp("ids") / "train.bin"
    ids.astype("<u2").tofile(path)
    is_short = size <= 3  # two ids may look like anything: they are refused, never read wrong
    try:
        tokens = open_foreign(path, vocabulary_size=None)
    except ValueError:
        assert is_short
    else:
        assert tokens.read(0, size).tolist() == ids.tolist()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8", "uint8"])
@pytest.mark.parametrize("vocabulary", [20, 100, 50_257])
def test_ids_in_floats_or_bytes_are_refused_by_their_values(tmp_path, dtype, vocabulary):
    ids = ids_below(min(vocabulary, 100 if dtype == "uint8" else 2048 if dtype == "<f2" else 2**16))
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=f"holds .*{np.dtype(dtype).name}") as error:
        open_foreign(tmp_path / "train.bin", vocabulary_size=None)
    assert ("big-endian" in str(error.value)) == dtype.startswith(">")
    path, given = tmp_path / "train.bin", "uint8"
    if dtype != "uint8":
        path, given = tmp_path / "new.bin", "uint32"
        np.fromfile(tmp_path / "train.bin", dtype).astype("<u4").tofile(path)
        assert f"numpy.fromfile(FILE, '{dtype}').astype('<u4')" in str(error.value)
    tokens = open_foreign(path, vocabulary_size=None, dtype=given)
    assert tokens.read(0, len(tokens)).tolist() == ids.tolist()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["list", "array", "dict", "torch", "safetensors"])
def test_pickles_and_tensors_are_not_taken_for_ids(tmp_path, kind, protocol):
    ids, path = ids_below(50_257, 2000), tmp_path / "train.bin"
    if kind == "torch":
        torch.save(torch.from_numpy(ids), path, _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        save_file({"ids": ids.astype("<u2")}, path)
    else:
        made = {"list": ids.tolist(), "array": ids, "dict": {"ids": ids}}[kind]
        path.write_bytes(pickle.dumps(made, protocol=protocol))
    path.write_bytes(path.read_bytes() + bytes(path.stat().st_size % 2))
    with pytest.raises(ValueError, match=r"train.bin holds (a pickle|tensors of safetensors)"):
        open_foreign(path, vocabulary_size=None)


def test_a_pattern_names_no_hidden_files_folders_or_pipes(tmp_path):
    ids = ids_below(50_257, 900).astype("<u2")
    ids.tofile(tmp_path / "train_0.bin")
    ids[:7].tofile(tmp_path / "._train_0.bin")
    (tmp_path / "folder.bin").mkdir()
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "broken.bin").symlink_to("nowhere")
    tokens = open_foreign(tmp_path / "*.bin", vocabulary_size=None)
    assert tokens.read(0, len(tokens)).tolist() == ids.tolist()
    assert len(open_foreign(tmp_path / ".*.bin", vocabulary_size=None)) == 7
    for name, expected in (
        ("pipe.bin", "is not a file"),
        ("broken.bin", "is not a file|no such file"),
        ("**.bin", "no such file|is not a pattern"),
        ("fold*/train_0.bin", "only the name of the file may be a pattern"),
    ):
        with pytest.raises(ValueError, match=expected):
            open_foreign(tmp_path / name, vocabulary_size=None)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    ids_below(50_257).astype("<u2").tofile(tmp_path / "train.bin")
    tokens = open_foreign(tmp_path / "train.bin", vocabulary_size=None)
    os.truncate(tmp_path / "train.bin", 100)
    with pytest.raises(ValueError, match=r"train.bin is shorter than when it was opened"):
        tokens.read(0, 200)
