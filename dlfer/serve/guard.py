"""Access control (Host, Origin, API key), security headers, and the counters of /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
MAX_HEAD_BYTES = 32 * 1024
"""Maximum size of the head of a request (request line and headers)."""


class Metrics:
    """The Prometheus metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("dlfer_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "dlfer_request_seconds",
            "Seconds from the head of a request to the end of its response.",
            ["route"],
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.faces = Counter("dlfer_faces", "Faces predicted.", ["model"], registry=self.registry)
        self.batch = Histogram(
            "dlfer_batch_images",
            "Images or crops per predicted batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.waiting = Gauge("dlfer_requests_in_progress", "Requests in progress.", registry=self.registry)

    def write(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


PUBLIC_PATHS = frozenset(
    ("/", "/page.css", "/page.js", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/openapi.json")
)
"""Paths that need no key: the page, which contains no data, and the health checks."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
STATUS_DISCONNECTED = 499
"""Status under which /metrics counts requests whose client disconnected before the response; it is never sent."""


@dataclass(frozen=True)
class Policy:
    """The rules that decide which requests are allowed.

    Attributes:
        key: the API key; None: no key is required.
        hosts: allowed names in the Host header, besides the address that was connected to; "*.example.org" allows all
            subdomains.
        origins: origins of other sites whose pages may send requests (CORS), e.g. "https://example.org".
        root_path: path prefix that a proxy adds, e.g. "/faces"; requests are accepted with it and without it.
        proxy_headers: whether the last entry of X-Forwarded-For is the client's address, as a trusted proxy appends it.
    """

    key: str | None = None
    hosts: Sequence[str] = LOOPBACK_NAMES
    origins: Sequence[str] = ()
    root_path: str = ""
    proxy_headers: bool = False

    def judge(self, scope: Scope, headers: Headers, path: str) -> tuple[int, str] | None:
        """Return the status and the message of a refusal, or None if the request is allowed."""
        host = headers.get("host", "")
        if not self._is_own_name(_strip_port(host), scope):
            return (
                400,
                "The Host header names a host that is not allowed; the server's option --allow-host NAME adds one.",
            )
        if not self.takes_origin(headers) and scope["method"] not in ("GET", "HEAD"):
            return (
                403,
                "Cross-site request refused; the server's option --allow-origin ORIGIN allows the pages of a site.",
            )
        if self.key is None or path in PUBLIC_PATHS or not path:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        if hmac.compare_digest(given.strip().encode(), self.key.encode()):
            return None
        return 401, "The API key is missing or wrong; expected Authorization: Bearer KEY, or X-API-Key: KEY."

    def _is_own_name(self, name: str, scope: Scope) -> bool:
        server = scope.get("server")
        if server is not None and name.strip("[]") == str(server[0]):
            return True
        return any(name == host or (host.startswith("*.") and name.endswith(host[1:])) for host in self.hosts)

    def takes_origin(self, headers: Headers) -> bool:
        """Return whether a request comes from no page, a page of this server, or a page of an allowed origin.

        Browsers send forms to other sites without a preflight request, so that CORS alone does not stop them.
        """
        origin = headers.get("origin")
        if origin is not None and origin.lower() in self.origins:
            return True
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return False
        return origin is None or _strip_scheme(origin) == headers.get("host", "").lower()


def _strip_port(host: str) -> str:
    """Return the name in a Host header, in lower case and without its port."""
    name = host.strip().lower()
    head, _, port = name.rpartition(":")
    name = head if head and port.isdecimal() and (head.endswith("]") or ":" not in head) else name
    return name.removesuffix(".")


def _strip_scheme(origin: str) -> str:
    """Return host and port of an origin, as a browser writes them into the Host header."""
    try:
        return urlsplit(origin.lower()).netloc
    except ValueError:
        return ""


def find_address(scope: Scope) -> str:
    """Return the address of a client; for IPv6 its /64 network, all of which belongs to one client."""
    text = (scope.get("client") or ("unknown", 0))[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    if address.version == 4:
        return text
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)).network_address)


def _read_address(text: str) -> str | None:
    """Return an IP address, with or without a port behind it, as an address alone; None for other text."""
    for candidate in (text, text.rpartition(":")[0], text.rpartition(":")[0].strip("[]"), text.strip("[]")):
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(candidate))
    return None


def _measure_head(scope: Scope) -> int:
    """Return the bytes of a request's path, query and headers; the protocol limits only heads that arrive in pieces."""
    fields = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"") + fields


class Guard:
    """Middleware that refuses requests which the policy does not allow, adds security headers, and counts all requests.

    Args:
        app: the application.
        policy: which requests are allowed.
        metrics: updated for each request.
        name_route: returns the name of a request's route for the metrics; unknown paths share one.
        is_stopping: whether the server was told to stop; each response then closes its connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        policy: Policy,
        metrics: Metrics,
        name_route: Callable[[Scope], str],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._app = app
        self._policy = policy
        self._metrics = metrics
        self._name_route = name_route
        self._is_stopping = is_stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, headers, method = time.monotonic(), 500, Headers(scope=scope), scope["method"]
        path, is_answered = self._place(scope, headers), False

        async def send_on(message: Message) -> None:
            nonlocal status, is_answered
            if message["type"] == "http.response.start":
                status, is_answered = message["status"], True
                self._add_headers(MutableHeaders(scope=message), headers)
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        answer = self._respond_directly(scope, headers, path)
        if method == "HEAD":
            scope["method"] = "GET"  # the response to GET, without its body
        try:
            await (answer or self._app)(scope, receive, send_on)
        except ClientDisconnect:
            status = STATUS_DISCONNECTED
        except asyncio.CancelledError:  # a second signal to stop
            if not is_answered:
                failure = {"error": "The server was stopped before the response was ready."}
                await JSONResponse(failure, 503)(scope, receive, send_on)
        except Exception:
            # The framework would respond outside this middleware, without these headers. It still logs the error.
            if not is_answered:
                failure = {"error": "Internal server error; the server's log has the details."}
                await JSONResponse(failure, 500)(scope, receive, send_on)
            raise
        finally:
            route = self._name_route(scope)
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - start)

    def _place(self, scope: Scope, headers: Headers) -> str:
        """Set the root path and the client address as the proxy gives them, and return the path without the prefix."""
        root, path = self._policy.root_path, scope["path"]
        if root:
            path = path[len(root) :] if path == root or path.startswith(f"{root}/") else path
            scope["root_path"], scope["path"] = root, root + path
        forwarded = headers.getlist("x-forwarded-for")
        if self._policy.proxy_headers and forwarded:
            address = _read_address(forwarded[-1].rpartition(",")[2].strip())
            scope["client"] = scope["client"] if address is None else (address, 0)
        return path

    def _respond_directly(self, scope: Scope, headers: Headers, path: str) -> Response | None:
        """Return the response to a refused request, a CORS preflight or the bare prefix; None for other requests."""
        if _measure_head(scope) > MAX_HEAD_BYTES:
            return JSONResponse({"error": f"The head of the request is larger than {MAX_HEAD_BYTES:,} bytes."}, 431)
        refused = self._policy.judge(scope, headers, path)
        is_question = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if is_question and (refused is None or refused[0] == 401):
            return Response(status_code=204)
        if refused is not None:
            status, words = refused
            return JSONResponse({"error": words}, status, {"www-authenticate": "Bearer"} if status == 401 else None)
        return RedirectResponse(f"{self._policy.root_path}/", 308) if not path else None

    def _add_headers(self, given: MutableHeaders, headers: Headers) -> None:
        for name, value in _HEADERS.items():
            given[name] = value
        if self._is_stopping():
            given["connection"] = "close"
        if not self._policy.origins:
            return
        given.add_vary_header("Origin")
        if headers.get("origin", "").lower() in self._policy.origins:
            given["access-control-allow-origin"] = headers["origin"]
            given["access-control-expose-headers"] = "Retry-After"
            if "access-control-request-method" in headers:
                given["access-control-allow-methods"] = "GET, HEAD, POST"
                given["access-control-allow-headers"] = "Authorization, Content-Type, X-API-Key"
                given["access-control-max-age"] = "600"
