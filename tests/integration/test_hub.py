"""hf://ORG/NAME from, and a push to, a small server that answers what huggingface_hub asks: for a download the revision, the
list of files and the files; for an upload the creation of the repository, pre-upload, LFS objects and the commit.

How `dlfer ship` calls it is tested in tests/unit/export/test_ship.py.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, command, environment

COMMIT = "0123456789" * 4
OLD = "9876543210" * 4


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves a folder as the repository org/model; the branch `main` is COMMIT, the tag `v1` OLD."""

    folder: Path
    served: list[str]
    asked: list[tuple[str, str | None]]

    def do_GET(self):
        self.answer()

    do_HEAD = do_GET

    def answer(self):
        path, headers = self.path.partition("?")[0], {"Content-Type": "application/json"}
        start, _, rest = path.partition("org/model/")
        what, _, name = rest.partition("/")
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        if start == "/api/models/" and what == "revision" and name in ("main", "v1", COMMIT, OLD):
            commit = OLD if name in ("v1", OLD) else COMMIT
            siblings = [{"rfilename": file.name} for file in files]
            contents = {
                "_id": "1",
                "id": "org/model",
                "sha": commit,
                "private": False,
                "tags": [],
                "siblings": siblings,
            }
            contents = json.dumps({**contents, "downloads": 0, "likes": 0, "disabled": False}).encode()
        elif start == "/api/models/" and what == "tree":
            contents = json.dumps([self.describe(file) for file in files]).encode()
        elif start == "/" and what == "resolve" and (self.folder / name.partition("/")[2]).is_file():
            commit, _, file = name.partition("/")
            contents = (self.folder / file).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(contents).hexdigest()}"', "X-Repo-Commit": commit}
            self.served.append(file)
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for header, value in {**headers, "Content-Length": str(len(contents))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(contents)

    @staticmethod
    def describe(file):
        contents = file.read_bytes()
        lfs = {"oid": hashlib.sha256(contents).hexdigest(), "size": len(contents), "pointerSize": 130}
        oid = hashlib.sha1(contents).hexdigest()
        return {"type": "file", "path": file.name, "size": len(contents), "oid": oid, "lfs": lfs}

    def do_POST(self):
        """Take what belongs to an upload: small files come in the commit itself, large ones as LFS objects before it."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}"
        self.asked.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            answer = {"url": f"{address}/org/model", "name": "org/model", "id": "1"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif self.path == "/api/models/org/model/preupload/main":
            modes = [
                (file["path"], "lfs" if file["size"] > 1_000_000 else "regular") for file in json.loads(body)["files"]
            ]
            answer = {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}
        elif self.path == "/org/model.git/info/lfs/objects/batch":
            answer = {"transfer": "basic", "objects": []}
            for file in json.loads(body)["objects"]:
                actions = {"upload": {"href": f"{address}/lfs/{file['oid']}"}}
                answer["objects"].append({"oid": file["oid"], "size": file["size"], "actions": actions})
        elif self.path == "/api/models/org/model/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    (self.folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    (self.folder / "lfs" / value["oid"]).rename(self.folder / value["path"])
            answer = {"commitUrl": f"{address}/org/model/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        else:
            self.send_error(404)
            return
        self.reply(json.dumps(answer).encode())

    def do_PUT(self):
        contents = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(contents).hexdigest() == oid
        (self.folder / "lfs").mkdir(exist_ok=True)
        (self.folder / "lfs" / oid).write_bytes(contents)
        self.reply(b"")

    def reply(self, contents):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(contents)))
        self.end_headers()
        self.wfile.write(contents)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub with the default model as org/model, and a function that calls dlfer with it."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "saved_models" / "lite2_96", folder)
    (folder / "MODEL_CARD.md").rename(folder / "README.md")
    (folder / "weights.pkl").write_bytes(b"\x80\x04.")
    handler = type("Handler", (Hub,), {"folder": folder, "served": [], "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def dlfer(*words, code=None, **given):
        address = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), **given}
        return subprocess.run(
            command(*words) if code is None else [sys.executable, "-c", code, *map(str, words)],
            cwd=tmp_path,
            env=environment(**address, HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1"),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    dlfer.folder, dlfer.served, dlfer.asked, dlfer.server = folder, handler.served, handler.asked, server
    yield dlfer
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_model_of_the_hub_predicts_and_is_kept_in_the_cache(hub):
    words = ("predict", ROOT / "docs" / "astronaut.jpg", "--model", "hf://org/model")
    for given in ({}, {"HF_HUB_OFFLINE": "1"}):
        hub.served.clear()
        done = hub(*words, **given)
        assert done.returncode == 0, done.stderr
        assert [row["label"] for row in csv.DictReader(io.StringIO(done.stdout))] == ["Happy"]
        assert "for research only" in done.stderr
        assert ("network.onnx" in hub.served) == (not given)
    assert "weights.pkl" not in hub.served
    hub.server.shutdown()
    hub.server.server_close()
    assert hub(*words).returncode == 0, "without a network the cache is enough"


@pytest.mark.slow
def test_a_revision_is_taken_and_what_the_hub_does_not_have_is_named(hub):
    photo = ROOT / "docs" / "astronaut.jpg"
    assert hub("predict", photo, "--model", "hf://org/model@v1").returncode == 0
    snapshots = hub.folder.parent / "hf" / "hub" / "models--org--model" / "snapshots"
    assert [path.name for path in snapshots.iterdir()] == [OLD]
    for name, words in {
        "hf://org/model@v2": "cannot be downloaded",
        "hf://org/other": "cannot be downloaded",
        "hf://model": "expected hf://ORG/NAME",
    }.items():
        done = hub("predict", photo, "--model", name)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{name}: " in done.stderr
        assert words in done.stderr


def change_weights(folder: Path) -> None:
    contents = bytearray((folder / "network.onnx").read_bytes())
    contents[len(contents) // 2] ^= 1
    (folder / "network.onnx").write_bytes(contents)


def change_range(folder: Path) -> None:
    values = json.loads((folder / "artifact.json").read_text())
    values["temperature"]["value"] = -1
    (folder / "artifact.json").write_text(json.dumps(values))


def leave_the_folder(folder: Path) -> None:
    values = json.loads((folder / "artifact.json").read_text())
    values["onnx"]["file"] = "../../refs/main"
    values["sha256"]["../../refs/main"] = "0" * 64
    (folder / "artifact.json").write_text(json.dumps(values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_weights, r"sha256 is .*damaged or was changed"),
        (change_range, r"temperature\.value: found"),
        (leave_the_folder, "outside of its folder"),
        (lambda folder: (folder / "artifact.json").unlink(), "no model of dlfer"),
    ],
)
def test_a_downloaded_model_is_checked_as_any_other(hub, change, words):
    change(hub.folder)
    done = hub("predict", ROOT / "docs" / "astronaut.jpg", "--model", "hf://org/model")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.search(words, done.stderr), done.stderr


PUSH = """
import sys
from pathlib import Path
from dlfer.export.ship import write_hub_folder
from dlfer.runs.find import push_folder
folder = write_hub_folder(Path(sys.argv[1]), Path("pushed"), "org/model")
print(push_folder(folder, "org/model", private=True))
"""


def test_a_pushed_model_is_there_with_its_card_and_predicts(hub):
    shutil.rmtree(hub.folder)
    hub.folder.mkdir()
    done = hub(ROOT / "saved_models" / "lite2_96", code=PUSH, HF_TOKEN="hf_test", HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    assert "/org/model" in done.stdout
    paths = [path for path, _ in hub.asked]
    assert paths[0] == "/api/repos/create"
    assert paths[-1] == "/api/models/org/model/commit/main"
    assert {token for _, token in hub.asked} == {"Bearer hf_test"}
    ours = {file.name: file.read_bytes() for file in (hub.folder.parent / "pushed").iterdir()}
    theirs = {file.name: file.read_bytes() for file in hub.folder.iterdir() if file.is_file()}
    assert theirs == ours
    assert 'dlfer.load("hf://org/model")' in theirs["README.md"].decode()
    predicted = hub("predict", ROOT / "docs" / "astronaut.jpg", "--model", "hf://org/model")
    assert [row["label"] for row in csv.DictReader(io.StringIO(predicted.stdout))] == ["Happy"]


@pytest.mark.slow
def test_a_push_that_the_hub_refuses_says_so(hub):
    done = hub(ROOT / "saved_models" / "lite2_96", code=PUSH.replace('"org/model", private', '"org/other", private'))
    assert done.returncode != 0
    assert "org/other" in done.stderr
