"""What may not pass: too much, too many, too slow, without the key, from elsewhere; and nothing goes to the disk."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dlfer.runs.records import About
from dlfer.serve.guard import Policy
from dlfer.serve.limits import Budget, Limits, estimate_wait

KEY = "a-key-of-many-letters"
_written: list[str] = []
_watch = threading.Event()


def _note_writes(event: str, args: tuple) -> None:
    if event == "open" and _watch.is_set():
        path, mode, flags = args
        # 3: O_WRONLY or O_RDWR; temporary files are opened by flags, not by a mode.
        if isinstance(path, int):
            return  # a pipe, say, that is open already
        if (mode and set(str(mode)) & set("wax+")) or (isinstance(flags, int) and flags & 3):
            _written.append(str(path))


@pytest.fixture
def written():
    """Names of the files that this process opens for writing during the test."""
    if not getattr(_note_writes, "is_there", False):
        sys.addaudithook(_note_writes)
        _note_writes.is_there = True
    _written.clear()
    _watch.set()
    yield _written
    _watch.clear()


def send(client, contents, **more):
    return client.post("/v1/predict", files={"file": ("a.png", contents)}, **more)


def test_no_upload_touches_the_disk(serve, png, written):
    noise = png(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3)).astype(np.uint8))
    assert len(noise) > 4 * 2**20  # parsers of forms put a file above one megabyte on the disk
    client = serve()
    assert send(client, noise).status_code == 200
    assert send(client, b"x" * 5 * 2**20).status_code == 415
    assert written == []


def test_the_watch_sees_a_temporary_file(written, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with tempfile.SpooledTemporaryFile(max_size=10) as file:
        file.write(b"more than ten bytes")
    assert str(tmp_path) in written


def test_the_log_says_nothing_of_a_picture(serve, engine, two_faces, caplog, capfd):
    client = serve()
    engine.about = About(name="x")
    with caplog.at_level(logging.DEBUG):
        send(client, two_faces)
        client.post("/v1/predict", files={"file": ("secret_name.png", b"secret bytes")})
    out = caplog.text + "".join(capfd.readouterr())
    assert "secret" not in out
    assert "PNG" not in out


def test_a_body_that_is_too_large_is_refused_before_it_is_read(serve):
    client = serve(Limits(body_bytes=1000))
    read = []

    def body():
        for number in range(100):
            read.append(number)
            yield b"x" * 100

    kind = {"content-type": "application/json"}
    chunked = client.post("/v1/predict", content=body(), headers=kind)
    assert (chunked.status_code, chunked.headers["connection"]) == (413, "close")
    assert client.post("/v1/predict", content=b"x", headers={**kind, "content-length": "9" * 12}).status_code == 413


def test_memory_of_bodies_is_given_back(serve, two_faces):
    client = serve(Limits(all_bytes=2 * len(two_faces) + 2000))
    for _ in range(10):
        assert send(client, two_faces).status_code == 200
        assert send(client, b"words").status_code == 415
    service = client.app.state.service
    assert (service.bytes.used, service._memory.used, service.num_requests) == (0, 0, 0)
    assert send(serve(Limits(all_bytes=50)), two_faces).status_code == 503


def test_too_many_requests_are_told_when_to_come_again(serve, engine, two_faces):
    client = serve(Limits(requests=2))
    engine.may_go_on.clear()
    with ThreadPoolExecutor(2) as threads:
        begun = [threads.submit(send, client, two_faces) for _ in range(2)]
        service = client.app.state.service
        while service.num_requests < 2:
            threading.Event().wait(0.01)
        refused = send(client, two_faces)
        engine.may_go_on.set()
        assert [one.result().status_code for one in begun] == [200, 200]
    assert refused.status_code == 503
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert send(client, two_faces).status_code == 200


def test_explanations_are_counted_apart(serve, engine, two_faces):
    client = serve(Limits(explanations=1))
    engine.may_go_on.clear()
    with ThreadPoolExecutor(1) as threads:
        begun = threads.submit(client.post, "/v1/explain", files={"file": ("a", two_faces)})
        while client.app.state.service.num_requests < 1:
            threading.Event().wait(0.01)
        refused = client.post("/v1/explain", files={"file": ("a", two_faces)})
        engine.may_go_on.set()
        assert begun.result().status_code == 200
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)


def test_what_takes_too_long_is_given_up(serve, engine, two_faces):
    client = serve(Limits(seconds=0.2))
    engine.may_go_on.clear()
    late = send(client, two_faces)
    explained = client.post("/v1/explain", files={"file": ("a", two_faces)})
    engine.may_go_on.set()
    assert (late.status_code, explained.status_code) == (504, 504)
    assert client.app.state.service.num_requests == 0


def test_a_failing_network_is_an_error_without_details_and_the_next_is_answered(serve, engine, two_faces, monkeypatch):
    client = serve()

    def fail(*args, **kwargs):
        raise RuntimeError("secret path")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "predict", fail)
        broken = send(client, two_faces)
    assert broken.status_code == 500
    assert broken.json() == {"error": "Internal server error; the server's log has the details."}
    assert broken.headers["x-content-type-options"] == "nosniff"
    assert send(client, two_faces).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"x-api-key": KEY + "x"}, 401),
        ({"x-api-key": "ä".encode()}, 401),
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {KEY}"}, 200),
        ({"x-api-key": KEY}, 200),
    ],
)
def test_the_key_opens(serve, two_faces, headers, status):
    client = serve(policy=Policy(key=KEY))
    assert send(client, two_faces, headers=headers).status_code == status
    assert client.get("/v1/models", headers=headers).status_code == status
    assert client.get("/metrics", headers=headers).status_code == status


def test_without_the_key_the_page_and_the_health_are_there(serve):
    client = serve(policy=Policy(key=KEY))
    for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz", "/v2/health/live", "/openapi.json"):
        assert client.get(path).status_code == 200, path
    refused = client.get("/v2/models/one")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert "content-security-policy" in refused.headers
    operations = client.get("/openapi.json").json()["paths"]
    assert operations["/v1/predict"]["post"]["security"] == [{"key": []}]
    assert "security" not in operations["/healthz"]["get"]


def test_pages_of_other_sites_are_refused(serve, two_faces):
    client = serve()
    foreign = send(client, two_faces, headers={"sec-fetch-site": "cross-site", "origin": "https://example.org"})
    assert foreign.status_code == 403
    assert send(client, two_faces, headers={"sec-fetch-site": "same-origin"}).status_code == 200
    answer = client.options(
        "/v1/predict", headers={"origin": "https://example.org", "access-control-request-method": "POST"}
    )
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_under_another_name_nothing_is_answered(serve):
    client = serve()
    assert client.get("/healthz", headers={"host": "rebound.example.org"}).status_code == 400
    assert client.get("/healthz", headers={"host": "localhost:8000"}).status_code == 200


def test_a_budget_is_taken_in_order_and_given_back():
    async def run() -> list[str]:
        budget, order = Budget(10), []

        async def use(name: str, amount: int) -> None:
            await budget.wait_for(amount)
            order.append(name)

        await use("a", 8)
        tasks = [asyncio.create_task(use(name, amount)) for name, amount in (("b", 9), ("c", 1))]
        await asyncio.sleep(0)
        assert not budget.take(1)  # b waits, and nobody passes it
        tasks[0].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (order, budget.used) == (["a", "c"], 9)
        budget.give_back(9)
        assert budget.used == 0
        return order

    assert asyncio.run(run()) == ["a", "c"]


def test_a_budget_survives_that_all_give_up_at_the_same_moment():
    async def run() -> None:
        budget = Budget(10)
        await budget.wait_for(8)
        tasks = [asyncio.create_task(budget.wait_for(9)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        budget.give_back(8)  # before the tasks have run again
        await asyncio.gather(*tasks, return_exceptions=True)
        assert budget.used == 0
        assert budget.take(10)

    asyncio.run(run())


def test_the_wait_is_within_reason():
    assert [estimate_wait(*given) for given in ((0, 1.0), (10, 0.35), (1000, 1.0))] == [1, 4, 30]
