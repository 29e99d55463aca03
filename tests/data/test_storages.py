"""Storages behind URLs: versions, listings that fail, the order and names of files, and servers."""

import functools
import gzip
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from pretrain_lib.data import remote
from pretrain_lib.data.prepare.job import Job
from pretrain_lib.data.remote import version_of
from pretrain_lib.data.text.opening import open_source
from pretrain_lib.data.tokens.foreign import open_foreign

MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    """Keep blocks in a folder of the test, and ask again at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0, 0))
    MEMORY.store.clear()
    MEMORY.pseudo_dirs[:] = [""]


def texts_of(url):
    source = open_source(str(url))
    return [d.text for unit in source.units() for d in source.documents(unit)]


class Quiet(SimpleHTTPRequestHandler):
    """Python's server of files: with Last-Modified, without ETag and Range."""

    def log_message(self, *_):
        """Write no log."""


@pytest.fixture
def serve():
    """Return what starts a server with a handler, and returns its URL."""
    servers = []

    def start(handler):
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["http", "memory", "file"])
def test_a_changed_file_is_another_job_and_its_blocks_are_not_mixed(tmp_path, serve, kind):
    url = {
        "http": lambda: serve(functools.partial(Quiet, directory=tmp_path)),
        "memory": lambda: "memory://changing",
        "file": lambda: f"file://{tmp_path}",
    }[kind]()

    def write(name, content, time):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (time, time))
        MEMORY.pipe_file(f"/changing/{name}", content)

    seen = []
    for number in (1, 2):
        write("a.jsonl", json.dumps({"text": f"text {number}"}).encode(), 10**9 * number)
        write("a.bin", np.full(500, number, "<u2").tobytes(), 10**9 * number)
        tokens = open_foreign(f"{url}/a.bin", vocabulary_size=None)
        assert tokens.read(0, 500).tolist() == [number] * 500
        job = Job((f"{url}/a.jsonl",), train_tokenizer=300)
        assert job.record() == job.record()
        seen.append(job.record())
    assert seen[0] != seen[1]


def test_versions_are_what_the_storage_says_best():
    for info, version in (
        ({"ETag": '"a"', "LastModified": "today"}, '"a"'),  # S3
        ({"md5Hash": "b", "mtime": 1, "generation": "3"}, "b"),
        ({"mtime": 5.5, "created": 3}, "5.5"),
        ({"mtime": 0}, "0"),
        ({"LastModified": "today", "Last-Modified": "then"}, "today"),
        ({"Last-Modified": "then", "created": 3}, "then"),
        ({"generation": "3", "updated": "today"}, "3"),
        ({"ETag": None, "etag": "", "last_modified": "today"}, "today"),
        ({"size": 3, "type": "file", "name": "a"}, ""),
    ):
        assert version_of(info) == version


class Unversioned(AbstractFileSystem):
    """Files in memory, of which no version is stated."""

    protocol, cachable = "unversioned", False

    def ls(self, path, detail=True, **_):
        return [self.info(name) for name in MEMORY.ls(path, detail=False)]

    def info(self, path, **_):
        return {key: value for key, value in MEMORY.info(path).items() if key != "created"}

    def cat_file(self, path, start=None, end=None, **_):
        return MEMORY.cat_file(path, start, end)


def test_a_file_without_a_version_is_refused_by_name():
    fsspec.register_implementation("unversioned", Unversioned, clobber=True)
    MEMORY.pipe_file("/in/a.jsonl", b'{"text": "a"}')
    MEMORY.pipe_file("/in/notes.csv", b"not read")
    MEMORY.pipe_file("/in/a.bin", bytes(100))
    rule = "its storage states neither a checksum nor a time.*; download it"
    for url in ("unversioned:///in", "unversioned:///in/a.jsonl"):
        with pytest.raises(ValueError, match=f"data.source=unversioned:///in/a.jsonl: {rule}"):
            open_source(url)
    with pytest.raises(ValueError, match=f"data.path=unversioned:///in/a.bin: {rule}"):
        open_foreign("unversioned:///in/a.bin", vocabulary_size=None)


class Flaky(AbstractFileSystem):
    """Files in memory, of which a listing fails `failures` times."""

    protocol, cachable = "flaky", False
    failing, failures, error = "", 0, OSError("connection reset")

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.partition("://")[2].strip("/") if "://" in path else path

    def ls(self, path, detail=True, **_):
        if path == Flaky.failing and Flaky.failures:
            Flaky.failures -= 1
            raise Flaky.error
        return MEMORY.ls(path, detail=detail)

    def info(self, path, **_):
        return MEMORY.info(path)

    def cat_file(self, path, start=None, end=None, **_):
        return MEMORY.cat_file(path, start, end)


class AsyncFlaky(AsyncFileSystem):
    """The same, asynchronously."""

    protocol, cachable = "flaky", False
    _strip_protocol = Flaky._strip_protocol

    async def _ls(self, path, detail=True, **_):
        return Flaky().ls(path, detail=detail)

    async def _info(self, path, **_):
        return MEMORY.info(path)

    async def _cat_file(self, path, start=None, end=None, **_):
        return MEMORY.cat_file(path, start, end)


@pytest.mark.parametrize("storage", [Flaky, AsyncFlaky])
@pytest.mark.parametrize("folder", ["/in", "/in/a", "/in/a/deeper"])
def test_a_listing_that_fails_is_asked_again_then_refused(monkeypatch, storage, folder):
    fsspec.register_implementation("flaky", storage, clobber=True)
    names = ("a/x", "a/deeper/y", "b/z")
    for name in names:
        MEMORY.pipe_file(f"/in/{name}.jsonl", json.dumps({"text": name}).encode())
    MEMORY.pipe_file("/in/.hidden/deeper/y.jsonl", b"")
    monkeypatch.setattr(Flaky, "failing", folder)
    monkeypatch.setattr(Flaky, "failures", 2)
    assert sorted(texts_of("flaky:///in")) == sorted(names)
    assert not Flaky.failures
    assert open_source("flaky:///in").skipped == (("hidden", 1),)
    for error in (OSError("connection reset"), PermissionError("denied")):
        monkeypatch.setattr(Flaky, "failures", 10)
        monkeypatch.setattr(Flaky, "error", error)
        with pytest.raises(ValueError, match=f"flaky://{folder} cannot be read .*{error}"):
            open_source("flaky:///in")


NAMES = (
    "B.txt",
    "a/x.txt",
    "a b/z.txt",
    "a-b/y.txt",
    "a-b.d/y.txt",
    "a.txt",
    "a0.txt",
    "a/b/y.txt",
)
MARKED = ("p#1.txt", "q?v=2.txt", "r%20s.txt", "s;x.txt", "#.txt", "ä.txt", "u?.d/v#.txt")


@pytest.mark.parametrize("names", [NAMES, MARKED])
def test_files_are_read_in_the_order_of_a_local_folder_whatever_their_names(tmp_path, names):
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
        MEMORY.pipe_file(f"/in/{name}", name.encode())
    local = texts_of(tmp_path / "in")
    assert sorted(local) == sorted(names)
    assert texts_of("memory:///in") == texts_of(f"file://{tmp_path}/in") == local
    for name in names:
        assert (
            texts_of(f"memory:///in/{name}") == texts_of(f"file://{tmp_path}/in/{name}") == [name]
        )


def test_a_pattern_matches_hidden_files_only_if_it_asks_for_them(tmp_path):
    for number, name in enumerate(("a.bin", "._a.bin", ".b.bin", "c.bin")):
        MEMORY.pipe_file(f"/in/{name}", np.full(100, 7 + number, "<u2").tobytes())
    MEMORY.pipe_file("/in/folder.bin/a", b"")
    for pattern, found in (
        ("*.bin", {0, 3}),
        (".*.bin", {1, 2}),
        (".b.bin", {2}),
        ("?*.bin", {0, 3}),
    ):
        tokens = open_foreign(f"memory:///in/{pattern}", vocabulary_size=None)
        assert {id - 7 for id in tokens.read(0, len(tokens)).tolist()} == found
        assert len(tokens) == 100 * len(found)


class Stream(BaseHTTPRequestHandler):
    """A server that sends its answer without its length, or compressed."""

    headers_sent = ()
    body = b'{"text": "hello"}\n' * 50

    def do_GET(self):
        if not self.path.endswith((".jsonl", ".bin")):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", '"a"')
        for name, value in self.headers_sent:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.body)

    do_HEAD = do_GET

    def log_message(self, *_):
        """Write no log."""


class Compressed(Stream):
    body = gzip.compress(Stream.body)
    headers_sent = (("Content-Encoding", "gzip"), ("Content-Length", str(len(body))))


@pytest.mark.parametrize("handler", [Stream, Compressed])
def test_a_server_that_states_no_size_is_named(serve, handler):
    url = serve(handler)
    rule = "its server does not say how large the file is .*; download it"
    with pytest.raises(ValueError, match=f"data.source={url}/a.jsonl: {rule}"):
        open_source(f"{url}/a.jsonl")
    with pytest.raises(ValueError, match=f"data.path={url}/a.bin: {rule}"):
        open_foreign(f"{url}/a.bin", vocabulary_size=None)


class Failing(Stream):
    """A server that answers 503 a number of times to each request, then as it should."""

    failures = 0
    headers_sent = (("Content-Length", str(len(Stream.body))),)

    def do_GET(self):
        if type(self).failures > 0:
            type(self).failures -= self.command == "GET"
            self.send_error(503)
        else:
            super().do_GET()

    do_HEAD = do_GET


@pytest.mark.parametrize("setting", ["data.source", "data.path"])
def test_a_failing_server_of_http_is_not_taken_for_a_missing_file(serve, setting):
    class Own(Failing):
        """Counts its own failures."""

    url, name = serve(Own), "a.jsonl" if setting == "data.source" else "a.bin"

    def size():
        if setting == "data.source":
            return open_source(f"{url}/{name}").estimated_bytes()
        return len(open_foreign(f"{url}/{name}", vocabulary_size=None, dtype="uint8"))

    Own.failures = 2
    assert size() == len(Stream.body)
    Own.failures = 1000
    with pytest.raises(remote.Unreachable, match=rf"^{setting}: {url}/{name} .*503"):
        size()
    Own.failures = 0
    with pytest.raises(ValueError, match="there is no such file") as missing:
        open_source(f"{url}/missing.txt")
    assert not isinstance(missing.value, remote.Unreachable)


class Signing(Stream):
    """A server that sends on to a URL which holds a secret, and refuses that."""

    def do_GET(self):
        if "?" in self.path:
            self.send_error(403)
        else:
            self.send_response(302)
            self.send_header("Location", f"{self.path}?X-Amz-Signature=a-secret&Expires=9")
            self.end_headers()

    do_HEAD = do_GET


def test_the_secret_of_a_url_that_a_server_sends_on_to_is_not_said(serve):
    url = serve(Signing)
    for name, start in (
        ("a.jsonl", open_source),
        ("a.bin", functools.partial(open_foreign, vocabulary_size=None)),
    ):
        with pytest.raises(remote.Unreachable, match=rf"{url}/{name} .*403.*\?\.\.\.") as error:
            start(f"{url}/{name}")
        assert "secret" not in str(error.value)


def test_a_server_of_http_that_is_gone_is_not_taken_for_a_missing_file():
    with pytest.raises(remote.Unreachable, match="ConnectorError.*once it can, start the same"):
        open_source("http://127.0.0.1:9/a.jsonl")


@pytest.mark.parametrize(
    "url",
    ["zip://b::https://me:secret@host/NAME", "filecache::s3://corpus/NAME", "zip://NAME"],
)
def test_urls_that_are_joined_are_refused(url):
    for name, start in (
        ("a.jsonl", open_source),
        ("a.bin", functools.partial(open_foreign, vocabulary_size=None)),
    ):
        with pytest.raises(ValueError, match=r"^data\.\w+=(zip|filecache):") as error:
            start(url.replace("NAME", name))
        assert "secret" not in str(error.value)


def test_a_server_that_sends_no_parts_is_named(tmp_path, serve, monkeypatch):
    url = serve(functools.partial(Quiet, directory=tmp_path))
    monkeypatch.setattr(remote, "BLOCK_BYTES", 2**12)
    line = json.dumps({"text": "some words"}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 10)
    (tmp_path / "large.jsonl").write_text(line * 100_000)
    (tmp_path / "large.bin").write_bytes(bytes(3 * 2**20))
    assert texts_of(f"{url}/a.jsonl?download=true") == ["some words"] * 10
    rule = "sends the whole file where a part is asked for .*; download it"
    with pytest.raises(ValueError, match=f"data.source: the server of {url}/large.jsonl {rule}"):
        texts_of(f"{url}/large.jsonl")
    with pytest.raises(ValueError, match=f"data.path: the server of {url}/large.bin {rule}"):
        open_foreign(f"{url}/large.bin", vocabulary_size=None).read(10**6, 4)
