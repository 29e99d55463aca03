"""Uploads to a small server on this machine that answers as the hub does, and refusals."""

import base64
import json
import shlex
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pretrain_lib import GPT2, GPT2Config, save_pretrained
from pretrain_lib.commands.cli import main
from pretrain_lib.export.export import export_checkpoint
from tests.conftest import run_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = GPT2Config(vocabulary_size=50, context_length=16, num_layers=1, num_heads=2, width=8)
    save_pretrained(GPT2(config).initialize(0), folder, tokenizer=None)
    return folder


class Hub(BaseHTTPRequestHandler):
    """The calls of an upload; `server.calls` holds what was sent, `server.files` the repository."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://127.0.0.1:{self.server.server_port}/owner/name"
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.calls[self.path] = (self.headers["Authorization"], lines)
        if self.path == "/api/repos/create":
            self.answer(403 if self.server.refuses else 200, {"url": address})
        elif self.path.endswith("/preupload/main"):
            files = lines[0]["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": file["path"], **mode} for file in files]})
        elif self.path.endswith("/commit/main"):
            for line in lines:
                if line["key"] == "deletedFile":
                    del self.server.files[line["value"]["path"]]
                elif line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            commit = {"commitUrl": f"{address}/commit/0", "commitOid": "0"}
            self.answer(200, commit)
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            is_known = self.headers["Authorization"] == "Bearer hf_secret"
            self.answer(200 if is_known else 401, {"name": "owner"})
        elif "/tree/main" in self.path:
            fields = {"type": "file", "size": 0, "oid": "0"}
            self.answer(200, [{"path": name} | fields for name in self.server.files])
        else:
            self.answer(404, {})

    def answer(self, code, content):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.files, server.refuses = {}, {}, False
    threading.Thread(target=server.serve_forever).start()
    yield server
    server.shutdown()
    server.server_close()


def run(*command, home, **variables):
    environment = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_HOME": str(home)} | variables
    return run_command(*command, environment=environment)


def call(code, *, home, **variables):
    """Run a line of Python in a process of its own: the hub's client reads variables once."""
    lines = "from pathlib import Path; from pretrain_lib.export.hub import check_hub, push_to_hub\n"
    return run(sys.executable, "-c", lines + code, home=home, **variables).stderr


def address(hub):
    return {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_secret"}


@pytest.mark.slow
def test_all_files_of_an_export_arrive_in_one_commit(folder, hub, tmp_path):
    out = tmp_path / "out"
    flags = ["--push_to_hub", "owner/name", "--private", "--max_shard_size", "2KB"]
    command = ["pretrain", "export", folder, "--out", out, *flags]
    done = run(*command, home=tmp_path / "home", **address(hub))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"uploaded to {address(hub)['HF_ENDPOINT']}/owner/name\n")
    token, (created,) = hub.calls["/api/repos/create"]
    assert token == "Bearer hf_secret"
    assert created == {"name": "name", "organization": "owner", "visibility": "private"}
    assert "README.md" in hub.files and "model-00001-of-00004.safetensors" in hub.files
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}


def test_an_upload_leaves_nothing_of_an_earlier_export(folder, hub, tmp_path):
    own = {"LICENSE": b"MIT", "onnx/model.safetensors": b"other", ".gitattributes": b"lfs"}
    old = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "curves.png"]
    old += ["model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    hub.files = own | dict.fromkeys(old, b"old")
    export_checkpoint(folder, tmp_path / "one")
    export_checkpoint(folder, tmp_path / "several", max_shard_bytes=2048)
    for name in ("one", "several"):
        out = tmp_path / name
        code = f"print(push_to_hub(Path({str(out)!r}), 'owner/name', private=False))"
        assert call(code, home=tmp_path, **address(hub)) == ""
        assert hub.files == own | {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(("reachable", "message"), [(True, "403"), (False, "onnect")])
def test_an_upload_that_fails_says_what_to_do(reachable, message, folder, hub, tmp_path):
    hub.refuses = True
    variables = address(hub) | ({} if reachable else {"HF_ENDPOINT": "http://127.0.0.1:1"})
    code = f"push_to_hub(Path({str(folder)!r}), 'owner/name', private=False)"
    error = call(code, home=tmp_path, **variables).strip().splitlines()[-1]
    assert error.startswith(f"ValueError: push_to_hub=owner/name: the upload of {folder} failed")
    assert message in error and "check the network" in error
    if reachable:
        _, (created,) = hub.calls["/api/repos/create"]
        assert created == {"name": "name", "organization": "owner"}  # as the owner's default is
    assert f"`hf upload owner/name {folder} --delete model.safetensors" in error
    private = call(code.replace("False", "True"), home=tmp_path, **variables)
    assert f"`hf upload owner/name {folder} --private --delete" in private


def test_the_command_that_is_told_uploads_as_the_export_would_have(folder, hub, tmp_path):
    out = tmp_path / "with a space"
    shutil.copytree(folder, out)
    hub.refuses = True
    code = f"push_to_hub(Path({str(out)!r}), 'owner/name', private=False)"
    command = call(code, home=tmp_path, **address(hub)).strip().split("`")[-2]
    hub.refuses, hub.files = False, {"curves.png": b"old", "LICENSE": b"MIT"}
    words = [str(Path(sys.executable).with_name("hf")), *shlex.split(command)[1:]]
    done = run(*words, home=tmp_path, **address(hub))
    assert done.returncode == 0, done.stderr
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.files == files | {"LICENSE": b"MIT"}


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("owner/name", {}, "needs a token: set HF_TOKEN"),
        ("owner/name", {"HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("a/b/c", {"HF_TOKEN": "hf_x"}, "push_to_hub=a/b/c must be OWNER/NAME"),
    ],
)
def test_what_cannot_be_uploaded_is_refused(name, variables, message, tmp_path):
    error = call(f"check_hub({name!r})", home=tmp_path, **variables).strip().splitlines()[-1]
    assert error.startswith("ValueError: push_to_hub=") and message in error


def test_a_token_that_the_hub_does_not_know_is_refused_before_the_export(folder, hub, tmp_path):
    out, flags = tmp_path / "out", ["--push_to_hub", "owner/name"]
    variables = address(hub) | {"HF_TOKEN": "hf_wrong"}
    done = run("pretrain", "export", folder, "--out", out, *flags, home=tmp_path, **variables)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: --push_to_hub owner/name: the hub has not accepted the token" in done.stderr
    assert "Invalid user token" in done.stderr and not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--push_to_hub", "owner/name"], "--push_to_hub owner/name: HF_HUB_OFFLINE is set"),
        (["--private"], "give --push_to_hub OWNER/NAME"),
        (["--max_shard_size", "2"], "--max_shard_size 2 must be a size of at least 1, such"),
    ],
)
def test_a_refused_flag_is_one_line_before_anything_is_written(
    flags, message, folder, tmp_path, capsys
):
    with pytest.raises(SystemExit) as end:
        main(["export", str(folder), "--out", str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error and not (tmp_path / "out").exists()
