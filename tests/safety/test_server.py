"""A real server under requests that are made to cost it much: memory, /healthz and the answer to a normal request.

The server is a process of its own with the model that comes with dlfer; `watch.py` looks at it from a third one.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "docs" / "astronaut.jpg"
MODEL = "lite2_96"
MAX_MEMORY = 300
"""Megabytes above rest."""
SLOWEST_HEALTH = 1.0
JSON, FORM = {"Content-Type": "application/json"}, {"Content-Type": "multipart/form-data; boundary=b"}

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is read from /proc, as Linux has it"
)


class Server:
    """A server in a process of its own."""

    def __init__(self, *options: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("DLFER_API_KEY", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dlfer", "serve", MODEL, "--port", "0", "--no-access-log", *options],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r" at http://[^:]+:(\d+)/", line):
                self.port = int(found[1])
                break
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        while self.send("GET", "/readyz")[0] != 200:
            time.sleep(0.1)

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> tuple[int | str, dict]:
        """Return the status and the JSON of an answer; a status in words where none came."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before the body was read
                connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__, {}
        finally:
            connection.close()

    def predict_photo(self) -> tuple[int | str, dict]:
        """Return the answer to a normal request."""
        return self.send("POST", "/v1/predict", make_form(PHOTO.read_bytes()), FORM)

    def answers_as_before(self) -> bool:
        """Return whether a normal request has its answer, within three tries."""
        return any(self.predict_photo() == self.expected for _ in range(3))

    def infer(self, body: bytes) -> tuple[int | str, dict]:
        return self.send("POST", f"/v2/models/{MODEL}/infer", body, JSON)


@pytest.fixture(scope="module")
def server():
    server = Server()
    server.predict_photo()
    server.expected = server.predict_photo()
    assert server.expected[0] == 200
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert "Traceback" not in "".join(server.lines)


@pytest.fixture
def watched(server):
    """The server, whose memory and health are watched during the test, and which answers afterwards as before."""
    watch = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("watch.py")), str(server.port), str(server.process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    watch.stdout.readline()
    yield server
    told = json.loads(watch.communicate(timeout=60)[0])
    print(told)
    assert told["most"] - told["rest"] <= MAX_MEMORY, told
    assert told["slowest"] <= SLOWEST_HEALTH, told
    assert server.answers_as_before()


def make_form(contents: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return head + contents + b"\r\n--b--\r\n"


def make_picture(side: int, kind: str, mode: str = "RGB", **options) -> bytes:
    small = np.random.default_rng(0).integers(0, 256, (side // 16, side // 16, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize((side, side)).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def make_tensor(data: bytes, shape: bytes = b"[1,8,8]") -> bytes:
    return b'{"inputs":[{"name":"images","shape":' + shape + b',"datatype":"UINT8","data":' + data + b"}]}"


MEGA = 10**6
JSON_ATTACKS = {
    "long and short strings": make_tensor(b'["' + b"a" * 10_000 + b'"' + b',""' * 60_000 + b"]"),
    "many strings": make_tensor(b'["a"' + b',"a"' * 4 * MEGA + b"]"),
    "nested lists": make_tensor(b"[" * 9 * MEGA + b"]" * 9 * MEGA),
    "uneven lists": make_tensor(b"[[1,2],[3]" + b",[]" * 6 * MEGA + b"]"),
    "numbers of another shape": make_tensor(b"[1" + b",1" * 9 * MEGA + b"]"),
    "a huge shape": make_tensor(b"[1]", b"[256,100000,100000]"),
    "a negative shape": make_tensor(b"[1]", b"[-1,8,8]"),
    "floats": make_tensor(b"[0.5" + b",0.5" * 4 * MEGA + b"]"),
    "a long number": make_tensor(b"[" + b"9" * 19 * MEGA + b"]"),
    "a long exponent": make_tensor(b"[1e" + b"9" * 19 * MEGA + b"]"),
    "many outputs": make_tensor(b"[" + b"1," * 63 + b"1]")[:-1]
    + b',"outputs":[{"name":"labels"}'
    + b',{"name":"labels"}' * MEGA
    + b"]}",
    "many inputs": b'{"inputs":[{}' + b",{}" * 6 * MEGA + b"]}",
    "many keys": b"{" + b",".join(b'"%d":0' % number for number in range(MEGA)) + b"}",
    "one key many times": b"{" + b'"inputs":[],' * MEGA + b'"inputs":[]}',
    "deep objects": b'{"a":' * 3 * MEGA + b"0" + b"}" * 3 * MEGA,
    "one long text": b'{"id":"' + b"a" * 19 * MEGA + b'","inputs":[]}',
    "one long key": b'{"' + b"a" * 19 * MEGA + b'":1}',
    "escapes": b'{"id":"' + b"\\u0000" * 3 * MEGA + b'"}',
    "a text without an end": b'{"id":"' + b"\\\\" * 9 * MEGA,
    "blanks": b" " * 19 * MEGA,
    "half a text in UTF-8": b'{"id":"\xff\xfe"}',
    "no text at all": b"\x00" * 19 * MEGA,
}


@pytest.mark.parametrize("name", JSON_ATTACKS)
def test_json_costs_little(watched, name):
    status, answer = watched.infer(JSON_ATTACKS[name])
    assert status in (400, 413), answer
    assert len(answer["error"]) < 1500
    status, _ = watched.send("POST", "/v1/predict", JSON_ATTACKS[name], JSON)
    assert status == 400


def test_the_first_five_problems_are_told(watched):
    wrong = json.dumps({"images": [{"bse64": "a"}] * 1000}).encode()
    status, answer = watched.send("POST", "/v1/predict", wrong, JSON)
    assert status == 400
    assert answer["error"].count("images.") <= 5


def make_pictures() -> dict[str, tuple[bytes, set[int]]]:
    """Return, by name, pictures and the statuses that they may have; made late, for they take a while."""
    noise = np.random.default_rng(0).integers(0, 256, 4 * MEGA).astype(np.uint8).tobytes()
    return {
        "a comment of 19 MB": (b"P6 #" + b"x" * 19 * MEGA, {415}),
        "comments without end": (b"P6 " + b"#\n" * 9 * MEGA, {415}),
        "a slow PGM": (b"P5 2000 2000 200\n" + noise, {200, 413}),
        "a PGM in text": (b"P2 2000 2000 255\n" + b"1 " * 4 * MEGA, {200, 413}),
        "25 megapixels": (make_picture(4992, "JPEG"), {200, 504}),
        "25 megapixels, RGBA": (make_png_of_one_colour(4992), {200}),
        "too many for a progressive one": (make_picture(4992, "JPEG", progressive=True), {413}),
        "16 megapixels, progressive": (make_picture(4000, "JPEG", progressive=True, subsampling=0), {200}),
        "too many for WebP": (make_picture(4800, "WEBP", quality=10, method=0), {413}),
        "12 megapixels, WebP": (make_picture(3488, "WEBP", quality=10, method=0), {200}),
        "a head of 200 megapixels": (
            b"BM"
            + (54).to_bytes(4, "little")
            + bytes(4)
            + (54).to_bytes(4, "little")
            + (40).to_bytes(4, "little")
            + (20000).to_bytes(4, "little")
            + (10000).to_bytes(4, "little")
            + b"\1\0\x18\0"
            + bytes(24),
            {413},
        ),
        "a GIF of many frames": (make_gif(), {200}),
        "words": (b"only words " * MEGA, {415}),
    }


def make_png_of_one_colour(side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGBA", (side, side), (10, 200, 30, 100)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def make_gif() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("P", (2000, 2000), colour) for colour in range(40)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


@pytest.mark.slow
def test_pictures_cost_what_is_stated(watched):
    for name, (contents, statuses) in make_pictures().items():
        status, answer = watched.send("POST", "/v1/predict", make_form(contents), FORM)
        assert status in statuses, (name, status, answer.get("error"))


@pytest.mark.slow
def test_many_large_pictures_at_a_time_wait_for_each_other(watched):
    body = make_form(make_picture(4992, "JPEG", quality=30))
    with ThreadPoolExecutor(16) as threads:
        answers = [threads.submit(watched.send, "POST", "/v1/predict", body, FORM) for _ in range(16)]
        assert {answer.result()[0] for answer in answers} <= {200, 503, 504}
    several = json.dumps({"images": [{"base64": base64.b64encode(make_picture(1200, "JPEG")).decode()}] * 16}).encode()
    assert watched.send("POST", "/v1/predict", several, JSON)[0] in (200, 504)


FORM_ATTACKS = {
    "many parts": b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 300_000 + b"--b--\r\n",
    "half boundaries": b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    + b"\r\n--" * 4 * MEGA,
    "line ends": make_form(b"\r\n" * 9 * MEGA),
    "a long head": b"--b\r\nX: " + b"a" * 19 * MEGA + b"\r\n\r\n1\r\n--b--\r\n",
    "many heads": b"--b\r\n" + b"X: a\r\n" * 3 * MEGA + b"\r\n1\r\n--b--\r\n",
    "a long field": b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
    + b"a" * 19 * MEGA
    + b"\r\n--b--\r\n",
    "no boundary at all": b"a" * 19 * MEGA,
    "boundaries alone": b"--b\r\n" * 3 * MEGA,
}


@pytest.mark.parametrize("name", FORM_ATTACKS)
def test_forms_cost_little(watched, name):
    status, _ = watched.send("POST", "/v1/predict", FORM_ATTACKS[name], FORM)
    assert status in (400, 413, 415)


def test_many_large_bodies_at_a_time(watched):
    body = make_form(bytes(19 * MEGA))
    with ThreadPoolExecutor(24) as threads:
        answers = [threads.submit(watched.send, "POST", "/v1/predict", body, FORM) for _ in range(24)]
        assert {answer.result()[0] for answer in answers} <= {408, 415, 503, "ConnectionResetError", "BrokenPipeError"}


def connect(server: Server, number: int, text: bytes = b"") -> list[socket.socket]:
    connections = []
    for _ in range(number):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        connection.sendall(text)
        connections.append(connection)
    return connections


def trickle(connections: list[socket.socket], seconds: float, text: bytes = b"a") -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for connection in connections:
            try:
                connection.sendall(text)
            except OSError:
                continue
        time.sleep(0.5)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        pytest.param(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nX: ", marks=pytest.mark.slow),
        pytest.param(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /", marks=pytest.mark.slow),
    ],
    ids=["silent", "slow", "slow after an answer"],
)
def test_600_connections_shut_nobody_out(watched, text):
    connections = connect(watched, 600, text)
    try:
        trickle(connections if text else [], 4)
        assert watched.answers_as_before()
    finally:
        for connection in connections:
            connection.close()


def test_slow_bodies_leave_places_to_others(watched):
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9000000\r\n\r\n{"
    connections = connect(watched, 200, head)
    try:
        trickle(connections, 3, b" " * 1000)
        assert watched.send("GET", "/v1/models")[0] == 200
        assert watched.predict_photo()[0] == 503  # all are of this address
    finally:
        for connection in connections:
            connection.close()
    for _ in range(50):
        if watched.predict_photo()[0] == 200:
            break
        time.sleep(0.1)


def test_answers_that_nobody_takes(watched):
    text = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500
    connections = connect(watched, 100)
    for connection in connections:
        connection.settimeout(0.2)
        try:
            connection.sendall(text)
        except OSError:
            continue
    assert watched.answers_as_before()
    for connection in connections:
        connection.close()


def test_clients_that_leave_are_no_errors(watched):
    body = make_form(make_picture(2000, "JPEG"))
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n"
    for text in (head % len(body) + body[:1000], head % len(body) + body):
        for connection in connect(watched, 40, text):
            connection.close()
    time.sleep(1)
    counted = http.client.HTTPConnection("127.0.0.1", watched.port, timeout=20)
    counted.request("GET", "/metrics")
    text = counted.getresponse().read().decode()
    assert 'status="499"' in text
    assert 'status="500"' not in text
    assert "Traceback" not in "".join(watched.lines)


@pytest.mark.parametrize(
    "text",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000,
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nBad Header: 1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nzz\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nOrigin: https://elsewhere.example\r\nContent-Length: 0\r\n\r\n",
        b"BREW /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /healthz/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_every_error_is_json(server, text):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(text)
        answer = b""
        while b'"}' not in answer and (part := connection.recv(65536)):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert 400 <= int(head.split()[1]) < 500
    assert b"application/json" in head
    assert set(json.loads(body)) == {"error"}


GET_ROUTES = [
    "/", "/page.css", "/page.js", "/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/models", "/v2", "/v2/health/live",
    "/v2/health/ready", f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/ready", f"/v2/models/{MODEL}/versions/1",
    f"/v2/models/{MODEL}/versions/1/ready",
]  # fmt: skip
ABSENT = [
    "/nothing",
    "/v2/",
    "/docs",
    "//",
    "/%00",
    "/v2/models/none",
    f"/v2/models/{MODEL}/versions/2",
    "/v2/models/" + "a" * 5000,
]
POST_ROUTES = ["/v1/predict", "/v1/explain", f"/v2/models/{MODEL}/infer", f"/v2/models/{MODEL}/versions/1/infer"]


def ask(server: Server, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", [*GET_ROUTES, *ABSENT, *POST_ROUTES])
def test_head_is_get_without_the_body(server, path):
    status, headers, _ = ask(server, "GET", path)
    told, told_headers, body = ask(server, "HEAD", path)
    assert (told, body) == (status, b"")
    assert told == (200 if path in GET_ROUTES else 404 if path in ABSENT else 405)
    for name in ("content-type", "content-length"):
        if path != "/metrics":  # it counts the requests before
            assert told_headers[name] == headers[name]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "POST"])
def test_other_methods_are_refused_in_the_same_schema(server, method):
    for path in [*GET_ROUTES, *ABSENT, *(() if method == "POST" else POST_ROUTES)]:
        status, headers, body = ask(server, method, path, b"{}" if method == "POST" else None)
        # A path of a model is a route, whether or not there is the model.
        assert status == (404 if path in ABSENT and "/models/" not in path else 405), path
        assert set(json.loads(body)) == {"error"}
        assert status == 404 or headers["allow"]


@pytest.mark.slow
def test_sigterm_under_load_loses_nothing():
    server = Server()
    answers, is_over = [], threading.Event()

    def send() -> None:
        while not is_over.is_set():
            answers.append(server.predict_photo()[0])

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    while answers.count(200) < 20:
        time.sleep(0.05)
        assert server.process.poll() is None
    num_before = answers.count(200)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    is_over.set()
    for thread in threads:
        thread.join()
    # Every connection that was accepted has its answer, and none is reset or closed without one. After the end nobody listens.
    assert set(answers) <= {200, 503, "ConnectionRefusedError"}, {
        answer: answers.count(answer) for answer in set(answers)
    }
    assert answers.count(200) > num_before  # those that were in progress at the signal
    assert "every accepted request was answered" in "".join(server.lines)


@pytest.mark.slow
def test_under_load_with_a_fifth_of_bad_requests_every_answer_is_one_that_is_stated(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/serve_load.py", MODEL, "--seconds", "90", "--json", str(tmp_path / "load.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "load.json").read_text())
    means = figures["resident_mb"]["mean_of_each_tenth"]
    assert means[-1] - means[1] < 60, means
    assert not figures["not_stated"]


def test_tritons_own_client_talks_to_it(server):
    if "CI" not in os.environ:  # there, what requirements-dev.txt names is installed, and its absence is an error
        pytest.importorskip("tritonclient.http", reason="not installed: pip install -r requirements-dev.txt")
    import tritonclient.http as triton

    ask_as_triton(triton, server.port)


def ask_as_triton(triton, port: int) -> None:
    """Ask for what Triton's client asks, of a server with the model that comes with dlfer."""
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 48)).astype(np.uint8)
    with triton.InferenceServerClient(f"localhost:{port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL, "1")
        assert client.get_server_metadata()["name"] == "dlfer"
        metadata = client.get_model_metadata(MODEL)
        assert [one["datatype"] for one in metadata["inputs"]] == ["UINT8"]
        tensor = triton.InferInput("images", list(images.shape), "UINT8")
        tensor.set_data_from_numpy(images, binary_data=False)
        outputs = [triton.InferRequestedOutput(name, binary_data=False) for name in ("probabilities", "labels")]
        for version in ("", "1"):
            answer = client.infer(MODEL, [tensor], model_version=version, outputs=outputs, request_id="7")
            probabilities = answer.as_numpy("probabilities")
            assert probabilities.shape == (3, 7)
            np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
            assert answer.get_response()["id"] == "7"
            assert len(answer.as_numpy("labels")) == 3
        # Without names of outputs all come; a tensor of an odd size is resized; a model that is not there is an error.
        one = np.ascontiguousarray(images[:1, :31, :]).repeat(2, axis=0)
        tensor = triton.InferInput("images", [*one.shape, 1], "UINT8")
        tensor.set_data_from_numpy(one[..., None], binary_data=False)
        assert {each["name"] for each in client.infer(MODEL, [tensor]).get_response()["outputs"]} == {
            "probabilities",
            "labels",
        }
        with pytest.raises(triton.InferenceServerException, match="no model"):
            client.infer("none", [tensor])
        tensor.set_data_from_numpy(one[..., None], binary_data=True)
        with pytest.raises(triton.InferenceServerException, match="binary_data=False"):
            client.infer(MODEL, [tensor])
