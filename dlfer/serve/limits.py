"""Who may send a request, what one request and all together may cost, and the counters that /metrics shows."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlfer.data.images import UPLOAD_PIXELS


class Refusal(Exception):
    """A request is answered with an error.

    Attributes:
        status: of the answer.
        retry_after: in seconds, when it may be tried again; None: the same request would fail again.
    """

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True)
class Limits:
    """The limits of a server; what is above one is refused with a status of its own.

    Attributes:
        body_bytes: of one request (413).
        pixels: of the pictures in one request together (413).
        pictures: in one request (400).
        images_in_tensor: of a tensor of the KServe protocol (413).
        faces: of a picture that are predicted, the largest first; the number found is told.
        seconds: for the arrival of a body (408), and again for the answer (504).
        requests: begun and not answered, at a time (503).
        explanations: the same of occlusion maps, each of which is some hundred predictions (503).
        all_bytes: of all bodies in memory (503).
        all_pixels: of all decoded pictures in memory; more wait.
    """

    body_bytes: int = 20 * 2**20
    pixels: int = UPLOAD_PIXELS
    pictures: int = 16
    images_in_tensor: int = 256
    faces: int = 32
    seconds: float = 30.0
    requests: int = 64
    explanations: int = 4
    all_bytes: int = 256 * 2**20
    all_pixels: int = 2 * UPLOAD_PIXELS


class Budget:
    """An amount, `total`, that requests take from and give back."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Future]] = deque()

    def take(self, amount: int) -> bool:
        """Take an amount at once, or return False."""
        if self._waiting or self.used + amount > self.total:
            return False
        self.used += amount
        return True

    async def wait_for(self, amount: int) -> None:
        """Take an amount, at most the total, as soon as it is there, in the order of the callers."""
        if self.take(amount):
            return
        turn = asyncio.get_running_loop().create_future()
        entry = (amount, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            elif turn.done() and not turn.cancelled():
                self.used -= amount
            self._wake()
            raise

    def give_back(self, amount: int) -> None:
        """Return what was taken."""
        self.used -= amount
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self.used + self._waiting[0][0] <= self.total:
            amount, turn = self._waiting.popleft()
            self.used += amount
            turn.set_result(None)


def estimate_wait(num_requests: int, seconds_each: float) -> int:
    """Return the value of Retry-After, 1 to 30 seconds: when what waits now will be done."""
    return int(min(30, max(1, math.ceil(num_requests * seconds_each))))


async def read_body(request: Request, limits: Limits, budget: Budget) -> tuple[bytes, int]:
    """Return the body of a request, and what it took from the budget, which the caller gives back.

    Raises:
        Refusal: 413 before anything is read where the length is told, else as soon as it is too much;
            408 where it does not come in time; 400 where it is cut short; 503 where memory is short.
    """
    told = request.headers.get("content-length")
    if told is not None and told.isdecimal() and int(told) > limits.body_bytes:
        raise _too_large(limits)
    parts, size, taken = [], 0, 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                if not budget.take(len(part)):
                    raise Refusal(503, "The server has no memory left for this request; try again.", retry_after=1)
                taken += len(part)
                parts.append(part)
    except BaseException as error:
        budget.give_back(taken)
        if isinstance(error, TimeoutError):
            raise Refusal(408, f"The body of the request did not arrive within {limits.seconds:g} seconds.") from error
        raise
    return b"".join(parts), taken


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"The body of the request is larger than {limits.body_bytes:,} bytes; shrink the pictures.")


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
        app: the application behind it.
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
                status, words = refused
                challenge = {"www-authenticate": "Bearer"} if status == 401 else None
                await JSONResponse({"error": words}, status, challenge)(scope, receive, send_on)
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
