"""A folder of one's own pictures, from `dlfer init` to a server, with what dlfer brings and no network."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlfer.data.synthetic.faces import draw_face
from tests.integration.conftest import command, environment

OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
"""A proxy that nobody answers at: whatever is fetched fails."""
LABELS = ("happy", "sad", "surprise")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("own")
    for number in range(20):
        for label in LABELS:
            face = draw_face(label.capitalize(), rng=np.random.default_rng(number))
            path = place / "my faces" / label / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(face).resize((56, 56)).save(path)
    return place


def call(work: Path, *words: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*words),
        cwd=work,
        env=environment(**OFFLINE, DLFER_CACHE=str(work / "cache")),
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_from_a_folder_to_a_server(work):
    file = call(work, "init", "my faces").stdout.strip()
    assert file == "my_faces.yaml"
    assert "ok  my_faces.yaml" in call(work, "check", file).stderr
    call(work, "run", file, "--smoke")
    [folder, report] = call(work, "run", file, "--set", "finetune.epochs=1").stdout.split("\n")[:2]
    assert (work / report).is_file()
    rows = json.loads(call(work, "show", "runs", "--filter", "finished", "--sort", "accuracy", "--json").stdout)
    assert [8 <= row["n"] <= 16 for row in rows if folder.endswith(row["run"])] == [True]
    call(work, "evaluate", folder, "--data", "my faces", "--html", "result.html")
    assert "60 images" in (work / "result.html").read_text() or "n = 60" in (work / "result.html").read_text()
    table = call(work, "predict", "my faces/happy", "--model", folder, "--faces", "whole").stdout
    assert len(table.splitlines()) == 21
    call(work, "export", folder, "--to", "onnx")
    assert list((work / "exports").rglob("*.onnx"))
    call(work, "ship", folder, "mine")
    compared = call(work, "compare", folder, "mine")
    assert "matched by id" in compared.stdout
    assert ask_server(work, "mine")["images"][0]["faces"][0]["label"].casefold() in (*LABELS, "uncertain")


def ask_server(work: Path, model: str) -> dict:
    """Serve a model, send one picture, and return the answer."""
    server = subprocess.Popen(
        command("serve", model, "--port", "0", "--faces", "whole"),
        cwd=work,
        env=environment(**OFFLINE),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = next(
            found[1]
            for line in server.stderr
            if (found := re.search(r"at (http://127\.0\.0\.1:\d+)/", line)) is not None
        )
        picture = base64.b64encode((work / "my faces" / "happy" / "0.jpg").read_bytes()).decode()
        request = urllib.request.Request(
            f"{address}/v1/predict",
            json.dumps({"images": [{"base64": picture}]}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return json.load(response)
    finally:
        server.terminate()
        server.communicate(timeout=60)
