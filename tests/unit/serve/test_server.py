"""The process at a real port: slow and greedy clients, and the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dlfer.errors import EnvironmentProblem
from dlfer.serve.limits import Limits
from dlfer.serve.server import open_listener

ROOT = Path(__file__).parents[4]


def get(port: int, path: str, data: bytes | None = None, headers: dict | None = None) -> tuple[int, dict]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def talk(port: int, text: bytes) -> bytes:
    """Send bytes, and return the first bytes that come back."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(text)
        return connection.recv(4000)


def test_it_finishes_what_it_began_and_says_meanwhile_that_it_is_not_ready(start, engine, two_faces, as_base64):
    server, port, thread = start()
    body = json.dumps({"images": [{"base64": as_base64(two_faces)}]}).encode()
    kind = {"content-type": "application/json"}
    engine.may_go_on.clear()
    with ThreadPoolExecutor(1) as threads:
        begun = threads.submit(get, port, "/v1/predict", body, kind)
        while server.config.app.state.service.num_requests < 1:
            time.sleep(0.02)
        assert get(port, "/readyz")[0] == 200
        server.handle_exit(signal.SIGTERM, None)
        assert get(port, "/readyz")[0] == 503
        assert get(port, "/healthz")[0] == 200
        assert get(port, "/v1/predict", body, kind)[0] == 503
        engine.may_go_on.set()
        status, answer = begun.result(20)
    assert (status, len(answer["images"][0]["faces"])) == (200, 2)
    thread.join(20)
    assert not thread.is_alive()
    assert server.num_cut_short == 0


def test_a_second_signal_does_not_wait(start, engine, two_faces, as_base64):
    server, port, thread = start()
    body = json.dumps({"images": [{"base64": as_base64(two_faces)}]}).encode()
    engine.may_go_on.clear()
    with ThreadPoolExecutor(1) as threads:
        begun = threads.submit(get, port, "/v1/predict", body, {"content-type": "application/json"})
        while server.config.app.state.service.num_requests < 1:
            time.sleep(0.02)
        server.handle_exit(signal.SIGINT, None)
        server.handle_exit(signal.SIGINT, None)
        assert server.num_cut_short == 1
        engine.may_go_on.set()
        status, answer = begun.result(20)
        thread.join(20)
    assert status == 503
    assert "stopped before" in answer["error"]


def test_a_large_head_is_refused_even_if_it_arrives_at_once_and_a_large_body_is_no_head(start):
    _, port, _ = start()
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Long: "
    assert talk(port, head + b"a" * 60_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431")
    assert talk(port, head + b"a" * 20_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 200")
    twice = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nContent-Length: 8\r\n\r\n"
    assert talk(port, twice + b"a" * 40_000).startswith(b"HTTP/1.1 400")


def test_a_greedy_body_is_refused_by_its_head_alone(start):
    _, port, _ = start()
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = talk(port, head + b"Content-Length: 10000000000\r\nExpect: 100-continue\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")  # and not 100, which would ask for it


def test_a_body_that_does_not_come_is_given_up(start):
    server, port, _ = start(Limits(seconds=0.3))
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert talk(port, head + b"Content-Length: 100\r\n\r\n{").startswith(b"HTTP/1.1 408")
    assert server.config.app.state.service.num_requests == 0


def ask_raw(port: int, text: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(text)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the server closes; ConnectionResetError if it does not close in an orderly way."""
    parts = []
    with connection:
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


PREDICT = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"


def test_at_shutdown_accepted_connections_without_a_request_are_answered(start):
    server, port, thread = start()
    early, silent = ask_raw(port, b""), ask_raw(port, b"")
    while len(server.server_state.connections) < 2:
        time.sleep(0.02)
    server.handle_exit(signal.SIGTERM, None)
    while server.servers[0].sockets:  # until the port is closed
        time.sleep(0.01)
    early.sendall(PREDICT + b'{"a": 1}\n')
    answer = read_all(early)
    assert answer.startswith(b"HTTP/1.1 503")
    assert answer.lower().count(b"connection: close") == 1
    assert read_all(silent) == b""  # closed, not reset
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("path", [b"/healthz", b"/readyz", b"/nothing", b"/v1/models", b"/"])
def test_a_server_that_stops_closes_each_connection_with_its_response(start, engine, two_faces, as_base64, path):
    server, port, _ = start()
    engine.may_go_on.clear()
    body = json.dumps({"images": [{"base64": as_base64(two_faces)}]}).encode()
    with ThreadPoolExecutor(1) as threads:
        begun = threads.submit(get, port, "/v1/predict", body, {"content-type": "application/json"})
        while server.config.app.state.service.num_requests < 1:
            time.sleep(0.02)
        server.handle_exit(signal.SIGTERM, None)
        answer = read_all(ask_raw(port, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        assert answer.lower().count(b"\r\nconnection: close\r\n") == 1
        engine.may_go_on.set()
        assert begun.result(20)[0] == 200


def test_at_shutdown_the_kernels_queue_is_answered(start):
    server, port, thread = start()
    is_blocked = threading.Event()

    async def block(counter: int) -> bool:
        # While the event loop is busy, connections wait in the kernel; none is accepted before the server closes its port.
        is_blocked.set()
        time.sleep(1)
        return True

    server.on_tick = block
    assert is_blocked.wait(5)
    server.handle_exit(signal.SIGTERM, None)
    asked = [ask_raw(port, PREDICT + b'{"a": 1}\n') for _ in range(100)]
    for connection in asked:
        assert read_all(connection).startswith(b"HTTP/1.1 503")
    thread.join(20)
    assert not thread.is_alive()


def test_a_refusal_reaches_a_client_that_is_still_sending(start):
    _, port, _ = start(Limits(body_bytes=1000))
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 8000000\r\n\r\n"
    for _ in range(5):
        connection = ask_raw(port, head)
        for _ in range(80):  # more than the kernel buffers
            connection.sendall(b" " * 100_000)
        assert read_all(connection).startswith(b"HTTP/1.1 413")


def test_a_client_that_goes_on_sending_after_a_refusal_is_cut_off(start):
    server, port, _ = start(Limits(body_bytes=1000))
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 8000000000\r\n\r\n"
    connection = ask_raw(port, head)

    def send_on() -> None:
        for _ in range(400):
            connection.sendall(b" " * 100_000)
            time.sleep(0.05)

    with connection, pytest.raises(ConnectionError):
        send_on()
    while server.server_state.connections:
        time.sleep(0.02)


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EnvironmentProblem, match="Choose another --port"):
            open_listener("127.0.0.1", taken.getsockname()[1])


def test_a_client_who_comes_before_the_server_answers_waits():
    with open_listener("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname(), timeout=10) as one:
        assert one.getpeername() == listener.getsockname()


@pytest.mark.slow
def test_the_command_serves_a_model_warns_and_ends_well(tmp_path, png, as_base64):
    from dlfer.config.sections import ModelConfig
    from dlfer.model.classifier import TransferClassifier
    from dlfer.model.stage_network import build_transfer_network

    config = ModelConfig(backbone="efficientnet_nano")
    network = build_transfer_network(config, num_labels=2, image_size=32, channels=3)
    TransferClassifier(network, ("a", "b"), config=config, channels=3).save(tmp_path / "m")
    environment = {key: value for key, value in os.environ.items() if key != "DLFER_API_KEY"}
    command = [sys.executable, "-m", "dlfer", "serve", str(tmp_path / "m"), "--host", "0.0.0.0", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--faces", "whole", "--insecure"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if "startup complete" in line:
                break
        told = "".join(lines)
        assert "WARNING: 0.0.0.0 can be reached from other computers" in told
        port = int(told.partition("http://0.0.0.0:")[2].partition("/")[0])
        import numpy as np

        body = {"images": [{"base64": as_base64(png(np.zeros((40, 40, 3), np.uint8)))}]}
        status, answer = get(port, "/v1/predict", json.dumps(body).encode(), {"content-type": "application/json"})
        assert (status, set(answer["images"][0]["faces"][0]["probabilities"])) == (200, {"a", "b"})
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0
        assert "every accepted request was answered" in rest
        assert '"POST /v1/predict HTTP/1.1" 200' in rest
    finally:
        process.kill()
