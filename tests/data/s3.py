"""A real S3 server on loopback, which fails for a while when it is told to."""

import http.client
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from moto.server import ThreadedMotoServer

SECRETS = {"AWS_ACCESS_KEY_ID": "an-access-key", "AWS_SECRET_ACCESS_KEY": "a-secret-key"}


class Faulty(ThreadingHTTPServer):
    """A proxy of a server that answers 500 to the next `failures` requests for `failing` paths."""

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), _Forward)
        self.port, self.failures, self.failed = port, 0, 0
        self.passing = 0  # requests that are let through before
        self.failing = "jsonl"


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fails = self.server.failing in self.path and not self.server.passing
        if self.server.failing in self.path and self.server.passing:
            self.server.passing -= 1
        if fails and self.server.failures:
            self.server.failures -= 1
            self.server.failed += 1
            self._answer(500, [], b"")
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port)
        connection.request(self.command, self.path, body, dict(self.headers))
        found = connection.getresponse()
        self._answer(found.status, found.getheaders(), found.read())
        connection.close()

    do_HEAD = do_PUT = do_POST = do_GET

    def _answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """Write no log."""


@contextmanager
def serve_bucket():
    """Yield the proxy of a server that holds `s3://corpus`, which the environment names."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    proxy = Faulty(server.get_host_and_port()[1])
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{proxy.server_address[1]}"
    settings = SECRETS | {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": url}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        fsspec.filesystem("s3").makedirs("corpus", exist_ok=True)  # moto keeps them
        yield proxy
    fsspec.filesystem("s3").clear_instance_cache()
    proxy.shutdown()
    server.stop()


def upload(folder, key):
    """Copy a local folder to `s3://corpus/KEY`."""
    storage = fsspec.filesystem("s3")
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put_file(str(path), f"corpus/{key}/{path.relative_to(folder)}")
