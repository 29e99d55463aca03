"""The data layer against its peers: text to tokens, tokens to batches, and the start of a run.

Every figure stands beside a peer's that was measured in turn with it. The medians are printed, all
values go to a JSON, and `README.md` says what each row means. What is measured runs in processes of
their own.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from measuring import (
    Row,
    begin,
    build_parser,
    in_turn,
    ready,
    resident_mb,
    run_child,
    say,
    timed,
    write_report,
)

# Only the standard library up here: what is imported in a child is part of what is measured.

TEXT_MEGABYTES, DOCUMENT_CHARACTERS = 256, (1000, 8000)
GIGATOKEN_BATCH = 1000  # documents
VOCABULARY_SIZE = 8192
INSTALLED, TRAINING_BYTES = "installed", 20 * 10**6
UNREPEATED, LETTERS = "unrepeated", str.maketrans("0123456789", "ghijklmnop")
WORKER_GOAL = f"value < {2**30 / 1e6:.0f}"  # 1 GiB
SLICE = 8  # `tokenizers` is slow: it gets every so many-th document
T, BATCH = 1024, 64
NEEDED_WINDOWS = 600_000 / T  # a second: what GPT-2 124M takes on a fast GPU
STEP_GOAL = f"value >= {NEEDED_WINDOWS / 0.01:.0f}"  # 1 % of a step
SHARD_TOKENS, DOCUMENT_TOKENS = 2**24, 1000
READ_SHARDS, START_SHARDS = {"100 MB": 3, "400 MB": 12}, 597  # 10B tokens for the start
LATER_BATCHES, MEMORY_BATCHES = 300, 16  # read in later epochs; between looks at the memory
READING, MANY_FILES_BATCHES = ", reading on", 100  # on the 10B tokens of the start
FLAT_MB = 4.0  # growth of memory that counts as none
FLAT, ARROW = "flat.bin", "windows.arrow"  # the same tokens, for the peers
OURS = {
    "ours": {},
    "ours, document_masking": {"masking": True},
    "ours, best_fit": {"best_fit": True},
    "ours, best_fit and masking": {"best_fit": True, "masking": True},
}
PEERS = ("nanoGPT", "datasets, in batches", "datasets, row by row")
PACKAGES = (
    "pretrain_lib",
    "torch",
    "numpy",
    "gigatoken",
    "tiktoken",
    "tokenizers",
    "datasets",
    "pyarrow",
    "orjson",
)


# Text to tokens


def write_text(text: str, tokenizer: str | None, folder: str, megabytes: int) -> dict:
    """Write the text in each format, and a tokenizer if none is given; return what was written."""
    import pyarrow as pa
    from pyarrow import parquet

    import pretrain_lib as pl
    from pretrain_lib.data.text.encoder import choose_encoder
    from pretrain_lib.data.text.equivalence import as_tiktoken

    ready()
    documents, size = [], 0
    for document in cut_documents(installed_sources() if text == INSTALLED else texts_of(text)):
        documents.append(document)
        size += len(document.encode())
        if size > megabytes * 10**6:
            break
    if not size:
        sys.exit(f"error: --text {text} holds no text")
    if tokenizer is None:
        sample = documents[:: max(1, size // TRAINING_BYTES)]
        trained = pl.train_tokenizer(sample, vocabulary_size=VOCABULARY_SIZE)
        trained.save(Path(folder, "tokenizer"))
    loaded = pl.load_tokenizer(tokenizer or Path(folder, "tokenizer"))
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    Path(folder, "text.jsonl").write_text("".join(lines), encoding="utf-8")
    Path(folder, "text.txt").write_text("".join(documents), encoding="utf-8")
    parquet.write_table(pa.table({"text": documents}), Path(folder, "text.parquet"))
    used = choose_encoder(loaded, documents[:50]).package
    bare = [used, *(["tiktoken"] if as_tiktoken(loaded) else []), "tokenizers"]
    return {
        "encoders": list(dict.fromkeys(bare)),
        "megabytes": size / 1e6,
        "documents": len(documents),
    }


def installed_sources() -> Iterator[str]:
    """Yield the Python sources of the standard library and of all installed packages, mixed.

    None comes twice, so that no encoder knows the words of a text from an earlier copy of it.
    """
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    paths = sorted({path for root in roots for path in root.rglob("*.py") if path.is_file()})
    random.Random(0).shuffle(paths)
    seen = set()
    for path in paths:
        raw = path.read_bytes()
        if (digest := hashlib.blake2b(raw).digest()) not in seen:
            seen.add(digest)
            yield raw.decode("utf-8", errors="replace")


def texts_of(name: str) -> Iterator[str]:
    """Yield the documents of a file or folder, as `pretrain prepare` reads them."""
    from pretrain_lib.data.text.opening import open_source

    source = open_source(name)
    for document in (d for unit in source.units() for d in source.documents(unit)):
        yield getattr(document, "text", "")  # one that cannot be read has none


def cut_documents(texts: Iterator[str]) -> Iterator[str]:
    """Yield the texts in pieces of lengths as web pages have them."""
    lengths = random.Random(0)
    for text in texts:
        start = 0
        while start < len(text):
            end = start + lengths.randint(*DOCUMENT_CHARACTERS)
            yield text[start:end]
            start = end


def encode_bare(package: str, tokenizer: str, path: str, part: int = 0, parts: int = 1) -> float:
    """Return the MB/s of an encoder alone, on texts in memory."""
    import gigatoken

    import pretrain_lib as pl
    from pretrain_lib.data.text.equivalence import as_tiktoken, strip_added_tokens

    with Path(path).open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    texts = texts[part :: parts * (SLICE if package == "tokenizers" else 1)]
    loaded, raw = pl.load_tokenizer(tokenizer), [text.encode() for text in texts]
    fast = as_tiktoken(loaded) if package == "tiktoken" else None
    giga = gigatoken.Tokenizer.from_json(strip_added_tokens(loaded))

    def encode() -> None:
        if package == "gigatoken":
            for start in range(0, len(raw), GIGATOKEN_BATCH):
                giga.encode_batch(raw[start : start + GIGATOKEN_BATCH], parallel=False)
        elif fast is None:
            loaded.backend.encode_batch_fast(texts, add_special_tokens=False)
        else:
            for text in texts:
                fast.encode_ordinary(text)

    giga.encode_batch([], parallel=False)  # imports what it returns
    ready()
    return sum(map(len, raw)) / 1e6 / timed(encode)


def prepare_text(tokenizer: str, path: str, folder: str, workers: int) -> list:
    """Return the seconds that `prepare` takes, and the encoder that it used."""
    from pretrain_lib import Job, prepare

    job = Job((path,), tokenizer=tokenizer)
    ready()
    seconds = timed(lambda: prepare(job, Path(folder), workers=workers, quiet=True))
    return [seconds, json.loads(Path(folder, "manifest.json").read_text())["encoder"]]


def measure_prepare(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield the rows of text to tokens."""
    tokenizer, path = options.tokenizer or str(folder / "tokenizer"), str(folder / "text.jsonl")
    text = run_child(
        write_text, options.text, options.tokenizer, str(folder), options.text_megabytes
    )[0]
    encoders, megabytes = text["encoders"], text["megabytes"]
    out = (str(folder / f"prepared-{number}") for number in count())

    def bare(name: str, copies: int = 1) -> float:
        return sum(run_child(encode_bare, name, tokenizer, path, copies=copies))

    def ours(workers: int, suffix: str = ".jsonl") -> float:
        source = str(folder / f"text{suffix}")
        seconds, used = run_child(prepare_text, tokenizer, source, next(out), workers)[0]
        assert used == encoders[0], f"{used} was used, not {encoders[0]}"
        return megabytes / seconds

    def command() -> float:
        script = Path(sysconfig.get_path("scripts"), "pretrain")
        flags = ["--tokenizer", tokenizer, "--workers", "1", "--out", next(out)]
        run = partial(subprocess.run, check=True, capture_output=True)
        return megabytes / timed(lambda: run([script, "prepare", path, *flags]))

    measures = {name: partial(bare, name) for name in encoders}
    measures |= {
        f"{encoders[0]}, two processes": partial(bare, encoders[0], 2),
        "ours, 1 worker": partial(ours, 1),
        "ours, 2 workers": partial(ours, 2),
        "ours, 1 worker, .parquet": partial(ours, 1, ".parquet"),
        "ours, 1 worker, .txt": partial(ours, 1, ".txt"),
        "the command, 1 worker": command,
    }
    notes = {encoders[0]: f"the bare encoder; {megabytes:.0f} MB, {text['documents']:,} documents"}
    values = in_turn(measures, options.repeat)
    peer = "tiktoken" if "tiktoken" in encoders else encoders[0]
    for name, own in values.items():
        goal = "ratio >= 8" if name == "ours, 1 worker" and peer == "tiktoken" else ""
        yield Row("prepare", name, "MB/s", own, values[peer], goal, notes.get(name, ""))
    for name, other, goal in (
        ("ours, 1 worker", encoders[0], "ratio >= 0.7"),
        ("ours, 2 workers", "ours, 1 worker", "ratio >= 1.8"),
    ):
        yield Row("prepare", f"{name} / {other}", "MB/s", values[name], values[other], goal)


# The memory of a worker


def write_long_text(text: str, path: str, megabytes: int) -> int:
    """Write JSON lines of so many MB, the text again and again or words that never repeat."""
    ready()
    draw, documents, size = random.Random(0), [], 0
    if text != UNREPEATED:
        for document in cut_documents(installed_sources() if text == INSTALLED else texts_of(text)):
            documents.append(document)
            size += len(document.encode())
            if size > megabytes * 10**6:
                break
    size = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for number in count():
            if documents:
                own = documents[number % len(documents)]
            else:  # lower-case letters, digits would be cut
                words = (draw.getrandbits(4 * draw.randint(6, 24)) for _ in range(300))
                own = " ".join(f"{word:x}".translate(LETTERS) for word in words)
            file.write(json.dumps({"text": own}, ensure_ascii=False) + "\n")
            size += len(own.encode())
            if size > megabytes * 10**6:
                return size
    return size


def peak_of_command(tokenizer: str, path: str, out: str) -> float:
    """Return the highest resident memory of `pretrain prepare` with one worker, in MB."""
    script = Path(sysconfig.get_path("scripts"), "pretrain")
    command = [script, "prepare", path, "--tokenizer", tokenizer, "--workers", "1", "--out", out]
    ready()
    subprocess.run(command, check=True, capture_output=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6


def measure_worker(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield the rows of the memory of a worker."""
    tokenizer = options.tokenizer or str(folder / "tokenizer")
    if not Path(tokenizer).exists():
        run_child(write_text, options.text, None, str(folder), 20)
    for name, text, megabytes in (
        ("2 GB of text", options.text, 8 * options.text_megabytes),
        ("words that never repeat", UNREPEATED, options.text_megabytes),
    ):
        path, out = str(folder / "long.jsonl"), str(folder / f"worker-{megabytes}")
        size = run_child(write_long_text, text, path, megabytes)[0]
        say(f"the memory of a worker: {name}")
        peak = run_child(peak_of_command, tokenizer, path, out)[0]
        shutil.rmtree(out)
        Path(path).unlink()
        note = f"{size / 1e6:,.0f} MB of text"
        yield Row("worker", f"the command, {name}", "MB", [peak], None, WORKER_GOAL, note)


# Tokens to batches


def write_tokens(folder: str, shards: int, sparse: bool) -> int:
    """Write a prepared folder, and the same tokens as its peers want them; return their number.

    Sparse tokens are all zero and take no room on disk.
    """
    import numpy as np

    from pretrain_lib.data.prepare.manifest import summarize
    from pretrain_lib.data.tokens.manifests import FORMAT_VERSION, MANIFEST, manifest_bytes
    from pretrain_lib.data.tokens.shards import write_shard

    ready()
    root, generator, dtype = Path(folder), np.random.default_rng(0), np.dtype("<u2")
    root.mkdir()
    names = [f"train-{number:05d}-000" for number in range(shards)]
    for name in names[:1] if sparse else names:
        ids = generator.integers(0, 1 if sparse else VOCABULARY_SIZE, SHARD_TOKENS, dtype)
        cuts = np.unique(generator.integers(1, SHARD_TOKENS, SHARD_TOKENS // DOCUMENT_TOKENS))
        write_shard(root, name, ids, np.append(cuts, SHARD_TOKENS), text_bytes=0)
        with (root / FLAT).open("ab") as flat:
            flat.write(ids.tobytes())
    for name in names[1:] if sparse else ():
        (root / f"{name}.bin").touch()
        os.truncate(root / f"{name}.bin", ids.nbytes)
        for suffix in (".ends.npy", ".json"):
            (root / f"{name}{suffix}").write_bytes((root / f"{names[0]}{suffix}").read_bytes())
    os.truncate(root / FLAT, shards * ids.nbytes)
    manifest = {
        "format_version": FORMAT_VERSION,
        "sources": ["random"],
        "validation": "none",
        "dtype": dtype.str,
        "tokenizer_sha256": "",
        "tokenizer_files": {},
        "vocabulary_size": VOCABULARY_SIZE,
        "splits": {"train": summarize(root, names), "validation": summarize(root, [])},
        "fingerprint": "",
    }
    (root / MANIFEST).write_bytes(manifest_bytes(manifest))
    if not sparse:
        open_reader("ours, best_fit", folder)  # makes the plan
        write_arrow(root)
    os.sync()  # what is not on disk cannot be dropped from the page cache
    return shards * SHARD_TOKENS


def write_arrow(folder: Path) -> None:
    """Write the windows of a folder as rows of an Arrow file, as `datasets` keeps them."""
    import numpy as np
    import pyarrow as pa

    ids = np.fromfile(folder / FLAT, "<u2")
    starts = np.arange(0, len(ids) - T, T)
    schema = pa.schema([("ids", pa.list_(pa.uint16()))])
    with pa.OSFile(str(folder / ARROW), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for some in np.split(starts, range(1000, len(starts), 1000)):
            rows = ids[some[:, None] + np.arange(T + 1)]
            ends = pa.array(np.arange(len(some) + 1) * (T + 1), pa.int32())
            column = pa.ListArray.from_arrays(ends, pa.array(rows.ravel()))
            writer.write_batch(pa.record_batch([column], schema=schema))


def open_reader(name: str, folder: str) -> tuple[Callable[[int], Any], int]:
    """Return what reads the batch that begins at a window, and how many windows there are."""
    if name in OURS:
        return open_ours(folder, **OURS[name])
    read = open_nanogpt(folder) if name == "nanoGPT" else open_datasets(folder, name)
    return read, Path(folder, FLAT).stat().st_size // 2 // T - 1


@cache
def open_tokens(folder: str) -> Any:
    """Open our tokens, once per process: what was checked stays checked."""
    import pretrain_lib as pl

    return pl.open_split(Path(folder), "train")


def open_ours(folder: str, *, best_fit: bool = False, masking: bool = False) -> tuple:
    """Return our reader, and its number of windows."""
    import pretrain_lib as pl

    tokens, plans = open_tokens(folder), None
    if best_fit:
        plan_of = partial(pl.open_plan, fingerprint="benchmark", sequence_length=T)
        plans = [plan_of(tokens.iterate_ends, len(tokens), Path(folder, "packing"))]
    options = {"document_masking": masking, "plans": plans}
    dataset = pl.PackedDataset(tokens, sequence_length=T, **options)
    return lambda first: dataset.batch(range(first, first + BATCH)), len(dataset)


def open_nanogpt(folder: str) -> Callable:
    """Return a reader like that of nanoGPT's train.py: a new memmap a batch, random places."""
    import numpy as np
    import torch

    def read(_: int) -> tuple:
        data = np.memmap(Path(folder, FLAT), dtype=np.uint16, mode="r")
        places = torch.randint(len(data) - T, (BATCH,))
        windows = [(data[i : i + T], data[i + 1 : i + 1 + T]) for i in places]
        x = torch.stack([torch.from_numpy(x.astype(np.int64)) for x, _ in windows])
        y = torch.stack([torch.from_numpy(y.astype(np.int64)) for _, y in windows])
        return x, y

    return read


def open_datasets(folder: str, name: str) -> Callable:
    """Return a stream of `datasets` through a DataLoader, in the order of the file."""
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    rows = load_dataset("arrow", data_files=f"{folder}/{ARROW}", split="train", streaming=True)
    rows = rows.with_format("torch")
    in_batches = name == "datasets, in batches"
    loader = DataLoader(rows.batch(BATCH), None) if in_batches else DataLoader(rows, BATCH)
    batches = iter(loader)

    def read(_: int) -> tuple:
        ids = next(batches)["ids"]
        return ids[:, :-1], ids[:, 1:]

    return read


def read_windows(read: Callable[[int], Any], first: int, windows: int) -> Iterator[int]:
    """Read so many windows from one on, batch by batch, and yield the number of each batch."""
    for number in range(windows // BATCH):
        read(first + number * BATCH)
        yield number


def read_speed(folder: str) -> dict[str, float]:
    """Return the windows per second of each reader, ours also while blocks are checked."""
    import datasets  # noqa: F401 (imports are not measured)

    for path in filter(Path.is_file, Path(folder).iterdir()):
        path.read_bytes()  # into the page cache
    ready()
    read, epoch = open_reader("ours", folder)
    seconds = timed(lambda: list(read_windows(read, 0, epoch)))
    speeds, windows = {"ours, first epoch": epoch // BATCH * BATCH / seconds}, LATER_BATCHES * BATCH
    for name in (*OURS, *PEERS):
        read, epoch = open_reader(name, folder)
        read(epoch)
        speeds[name] = windows / timed(lambda r=read, e=epoch: list(read_windows(r, e, windows)))
    return speeds


def read_memory(name: str, folder: str) -> float:
    """Return by how many MB at most a process grows that opens a reader and reads an epoch."""
    import datasets  # noqa: F401 (memory of imports does not count)
    import torch  # noqa: F401

    from pretrain_lib import PackedDataset, open_plan, open_split  # noqa: F401

    ready()
    before = peak = resident_mb()
    read, windows = open_reader(name, folder)
    for number in read_windows(read, 0, windows):
        if number % MEMORY_BATCHES == 0:
            peak = max(peak, resident_mb())
    return max(peak, resident_mb()) - before


def measure_read(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield the rows of tokens to batches."""
    folders = {size: str(folder / size.replace(" ", "")) for size in READ_SHARDS}
    names = ("nanoGPT", "ours", "ours, document_masking", "ours, best_fit", PEERS[1])
    with ThreadPoolExecutor(2) as pool:  # no times are taken, so two at once
        write = partial(run_child, write_tokens)
        list(pool.map(lambda size: write(folders[size], READ_SHARDS[size], False), folders))
        whole = in_turn({"": lambda: run_child(read_speed, folders["400 MB"])[0]}, options.repeat)[
            ""
        ]
        reads = [(size, name) for size in folders for name in names]
        say("memory")
        memory = pool.map(lambda read: run_child(read_memory, read[1], folders[read[0]]), reads)
        grown = dict(zip(reads, memory, strict=True))
    for name in whole[0]:
        own, peer = [speeds[name] for speeds in whole], [speeds["nanoGPT"] for speeds in whole]
        goal = STEP_GOAL if name.startswith("ours") else ""
        share = f"{NEEDED_WINDOWS / statistics.median(own):.2%} of a step"
        yield Row("read", name, "windows/s", own, peer, goal, share)
    for size, name in reads:
        goal = f"value < {grown['100 MB', name][0] + FLAT_MB:.1f}"
        goal = goal if name.startswith("ours") and size == "400 MB" else ""
        peer = grown[size, "nanoGPT"]
        yield Row("memory", f"{name}, {size}", "MB", grown[size, name], peer, goal)


# The start of a run


def import_module(name: str) -> float:
    """Return the seconds that an import takes."""
    ready()
    return timed(lambda: __import__(name))


def start_reader(name: str, folder: str, share: float = 0.0, cached: bool = True) -> float:
    """Return the seconds from opening 10B tokens to the first batch, `share` of an epoch in."""
    for path in () if cached else Path(folder).iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)

    def start() -> None:
        read, windows = open_reader(name, folder)
        read(int(share * windows))

    return timed(start)


def open_plain(folder: str) -> tuple:
    """Return what only opens, reads and closes a random shard for each window, and a number."""
    import numpy as np

    paths = [str(path) for path in sorted(Path(folder).glob("train-*.bin"))]

    def read(first: int) -> np.ndarray:
        ids, places = np.empty((BATCH, T + 1), dtype=np.int64), random.Random(first)
        for row in ids:
            file = os.open(places.choice(paths), os.O_RDONLY)
            start = places.randrange(SHARD_TOKENS - T)
            row[:] = np.frombuffer(os.pread(file, 2 * (T + 1), 2 * start), dtype="<u2")
            os.close(file)
        return ids

    return read, 0


def read_many_files(name: str, folder: str) -> float:
    """Return the windows per second on 10B tokens, of which these were read once before."""
    read, epoch = open_plain(folder) if name == "plain" else open_reader(name, folder)
    first, windows = int(0.9 * epoch), MANY_FILES_BATCHES * BATCH
    for _ in range(2):
        seconds = timed(lambda: list(read_windows(read, first, windows)))
    return windows / seconds


def shuffle_windows(windows: int) -> float:
    """Return the seconds that a shuffle takes which is held in memory."""
    import numpy as np

    return timed(lambda: np.random.default_rng(0).permutation(windows))


def start_readers(folder: str) -> dict[str, float]:
    """Return each row's figure, measured in a fork of its own of a process with the imports."""
    import torch  # noqa: F401

    from pretrain_lib import PackedDataset, open_split  # noqa: F401

    masked = "ours, document_masking"
    figures = {
        "nanoGPT": (start_reader, "nanoGPT", folder),
        "a shuffle in memory": (shuffle_windows, START_SHARDS * SHARD_TOKENS // T),
        "ours": (start_reader, "ours", folder),
        "ours, at 90 %": (start_reader, "ours", folder, 0.9),
        masked: (start_reader, masked, folder),
        f"{masked}, at 90 %": (start_reader, masked, folder, 0.9),
        f"{masked}, at 90 %, uncached": (start_reader, masked, folder, 0.9, False),
        f"plain{READING}": (read_many_files, "plain", folder),
        f"ours{READING}": (read_many_files, "ours", folder),
        f"{masked}{READING}": (read_many_files, masked, folder),
    }
    ready()
    for label, (function, *arguments) in figures.items():
        for _ in range(2):  # the first brings the files into the page cache
            with get_context("fork").Pool(1) as fork:
                figures[label] = fork.apply(function, arguments)
    return figures


def measure_start(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield the rows of the start of a run."""
    sparse = str(folder / "sparse")
    run_child(write_tokens, sparse, START_SHARDS, True)
    modules = ("torch", "pretrain_lib")
    measures = {name: lambda name=name: run_child(import_module, name)[0] for name in modules}
    values = in_turn(measures | {"": lambda: run_child(start_readers, sparse)[0]}, options.repeat)
    for name in modules:
        yield Row("start", f"import {name}", "s", values[name], values["torch"])
    for name in values[""][0]:
        reads = name.endswith(READING)
        unit, goal = ("windows/s", STEP_GOAL) if reads else ("s", "value < 1")
        peer = f"plain{READING}" if reads else "nanoGPT"
        own, other = ([figures[key] for figures in values[""]] for key in (name, peer))
        yield Row("start", name, unit, own, other, goal if name.startswith("ours") else "")


# The whole

SECTIONS = {
    "prepare": measure_prepare,
    "worker": measure_worker,
    "read": measure_read,
    "start": measure_start,
}
HEADERS = {
    "prepare": "Text to tokens: MB/s of text, and how many times bare tiktoken",
    "worker": "Memory of a worker: the peak of `pretrain prepare --workers 1`, in MB",
    "read": "Tokens to batches: windows of 1,024 tokens, and how many times nanoGPT; goal: 1 %",
    "memory": "Memory: growth over an epoch of so much data, and how many times nanoGPT",
    "start": "Start on 10B tokens: until the first batch, and times nanoGPT's (torch's, plain's)",
}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of all sections, or of one."""
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_HOME"] = str(Path(temporary, "cache"))
        for section in [options.only] if options.only else SECTIONS:
            yield from SECTIONS[section](options, Path(temporary))


def main() -> None:
    """Measure the data layer and write the results."""
    parser = build_parser(main.__doc__, "data")
    parser.add_argument(
        "--text", default=INSTALLED, help="a file or folder (default: all installed Python sources)"
    )
    parser.add_argument("--tokenizer", help="a folder (default: a BPE trained on the text)")
    parser.add_argument("--text_megabytes", type=int, default=TEXT_MEGABYTES)
    parser.add_argument("--only", choices=SECTIONS)
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    write_report(measure(options), options, headers=HEADERS, packages=PACKAGES)


if __name__ == "__main__":
    begin(main)
