"""Who may call: names, pages of other sites, prefixes and proxies; and what is refused at the start."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from dlfer.errors import UserError
from dlfer.serve.guard import Guard, Policy, find_address
from dlfer.serve.server import ServerOptions, choose_policy

KEY = "a-key-of-many-letters"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("localhost.", 200),
        ("faces.example.org", 200),
        ("a.b.example.net:443", 200),
        ("example.net", 400),
        ("evilexample.net", 400),
        ("localhost.evil.example", 400),
        ("10.0.0.9", 400),
        ("", 400),
        ("[::1", 400),
    ],
)
def test_it_answers_under_its_names_alone(serve, host, status):
    policy = choose_policy(ServerOptions(hosts=("Faces.example.org", "*.example.net")))
    answer = serve(policy=policy).get("/healthz", headers={"host": host})
    assert answer.status_code == status
    assert status == 200 or "--allow-host" in answer.json()["error"]


def test_the_address_that_was_connected_to_is_a_name():
    scope = {"server": ("10.0.0.5", 8000), "method": "GET"}
    assert Policy()._is_own_name("10.0.0.5", scope)
    assert not Policy()._is_own_name("10.0.0.6", scope)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 415),
        ({"origin": "http://localhost"}, 415),
        ({"origin": "https://page.example"}, 415),
        ({"origin": "https://page.example", "sec-fetch-site": "cross-site"}, 415),
        ({"origin": "https://other.example"}, 403),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[::1"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_pages_of_other_sites_call_by_leave_alone(serve, headers, status):
    client = serve(policy=choose_policy(ServerOptions(origins=("https://page.example",))))
    answer = client.post("/v1/predict", content=b"x", headers={**headers, "content-type": "text/plain"})
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == ("https://page.example" if "page" in headers.get("origin", "") else None)


def test_a_page_asks_before_it_calls_and_needs_no_key_for_that(serve):
    client = serve(policy=Policy(key=KEY, origins=("https://page.example",)))
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answer = client.options("/v1/predict", headers={**asks, "origin": "https://page.example"})
    assert answer.status_code == 204
    assert "Authorization" in answer.headers["access-control-allow-headers"]
    assert client.options("/v1/predict", headers={**asks, "origin": "https://other.example"}).status_code == 403


@pytest.mark.parametrize("path", ["/faces/healthz", "/healthz", "/faces/"])
def test_a_prefix_may_be_there_or_not(serve, path):
    client = serve(policy=Policy(key=KEY, root_path="/faces"))
    assert client.get(path).status_code == 200
    assert client.get("/faces", follow_redirects=False).headers["location"] == "/faces/"
    assert client.get("/faces/v1/models").status_code == 401
    assert client.get("/v1/models").status_code == 401
    assert client.get("/facesv1/models", headers={"x-api-key": KEY}).status_code == 404


def test_clients_count_by_their_address():
    assert find_address({"client": ("10.0.0.1", 5)}) == "10.0.0.1"
    assert find_address({"client": ("2001:db8:1:2:3::4", 5)}) == find_address({"client": ("2001:db8:1:2::9", 5)})
    assert find_address({"client": ("2001:db8:1:3::4", 5)}) != find_address({"client": ("2001:db8:1:2::9", 5)})
    assert find_address({"client": ("::ffff:10.0.0.1", 5)}) == "10.0.0.1"
    assert find_address({"client": None}) == "unknown"


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("9.9.9.9, 1.2.3.4", "1.2.3.4"),
        ("1.2.3.4:5", "1.2.3.4"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
        ("garbage", "10.0.0.1"),
        ("", "10.0.0.1"),
    ],
)
def test_a_proxy_gives_an_address_with_or_without_a_port(forwarded, client):
    guard = Guard(None, policy=Policy(proxy_headers=True), metrics=None, name_route=None, is_stopping=None)
    scope = {"path": "/", "client": ("10.0.0.1", 5)}
    guard._place(scope, Headers({"x-forwarded-for": forwarded}))
    assert scope["client"][0] == client


@pytest.mark.parametrize("method", ["get", "head"])
def test_head_says_what_get_says(serve, method):
    client = serve()
    for path, status in (("/healthz", 200), ("/", 200), ("/v1/models", 200), ("/nothing", 404), ("/v1/predict", 405)):
        answer = getattr(client, method)(path)
        assert answer.status_code == status
        assert bool(answer.content) is (method == "get")


def test_other_computers_need_a_key_or_insecure(monkeypatch):
    monkeypatch.delenv("DLFER_API_KEY", raising=False)
    with pytest.raises(UserError, match="--insecure"):
        choose_policy(ServerOptions(host="0.0.0.0"))
    told = []
    assert choose_policy(ServerOptions(host="0.0.0.0", insecure=True), say=told.append).key is None
    assert "WARNING" in told[0]
    monkeypatch.setenv("DLFER_API_KEY", KEY)
    assert choose_policy(ServerOptions(host="0.0.0.0")).key == KEY


@pytest.mark.parametrize(
    "options",
    [
        {"hosts": ("a:80",)},
        {"hosts": ("http://a",)},
        {"hosts": ("*",)},
        {"origins": ("example.org",)},
        {"origins": ("https://a/b",)},
        {"origins": ("*",)},
        {"root_path": "faces"},
        {"root_path": "/a/../b?"},
    ],
)
def test_a_wrong_option_is_told(options):
    with pytest.raises(UserError, match="expected"):
        choose_policy(ServerOptions(**options))
