"""Who may send a request, and the counters that /metrics shows."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "dlfer_requests", "Requests that were answered.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "dlfer_request_seconds",
            "Seconds from the head of a request to the end of its answer.",
            ["route"],
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.faces = Counter("dlfer_faces", "Faces that were predicted.", ["model"], registry=self.registry)
        self.batch = Histogram(
            "dlfer_batch_images",
            "Images, or crops, that were predicted together.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.waiting = Gauge("dlfer_requests_in_progress", "Requests begun and not answered.", registry=self.registry)

    def write(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self.registry)


FREE = frozenset(
    ("/", "/page.css", "/page.js", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/openapi.json")
)
"""What needs no key: the page, which holds nothing, and what tells whether the server lives."""

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


class Guard:
    """Answers what may not pass, and counts everything.

    Args:
        app: what stands behind.
        key: of the interface; None: none is asked for.
        metrics: that count.
        name_route: (method, path) -> a name for the counters; unknown paths share one.
    """

    def __init__(self, app: ASGIApp, *, key: str | None, metrics: Metrics, name_route: Callable[[Scope], str]) -> None:
        self._app = app
        self._key = key.encode() if key else None
        self._metrics = metrics
        self._name_route = name_route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        refused = self._judge(scope)
        try:
            if refused is None:
                await self._app(scope, receive, send_on)
            else:
                await _answer(send_on, *refused)
        finally:
            route = self._name_route(scope)
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - start)

    def _judge(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the words of a refusal, or None."""
        headers = Headers(scope=scope)
        # A page of another site may send a form here without asking; it shall not use this computer's server.
        if scope["method"] not in ("GET", "HEAD") and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return 403, "This server does not take requests from pages of other sites."
        if self._key is None or scope["path"] in FREE:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        if hmac.compare_digest(given.strip().encode(), self._key):
            return None
        return 401, "This server asks for a key: Authorization: Bearer KEY, or X-API-Key: KEY."


async def _answer(send: Send, status: int, words: str) -> None:
    body = json.dumps({"error": words}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
