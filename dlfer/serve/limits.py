"""Limits of single requests and of the whole server, the exception that refuses a request, and budgets.

Worker processes import this module, so it must not import large packages.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass


class Refusal(Exception):
    """Raised to answer a request with an error.

    Attributes:
        status: HTTP status of the response.
        retry_after: seconds after which the client may try again; None: the same request would fail again.
    """

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


MAX_PIXELS = 25_000_000
"""Maximum total of pixels in the pictures of a request; phone photos have 12 or 24 million."""

BYTES_PER_PIXEL = 8
"""Memory for decoding a picture: four for Pillow's image, and four for its rotated copy or three for the result."""


@dataclass(frozen=True)
class Limits:
    """The limits of a server; in parentheses, the HTTP status of the response to a request that exceeds the limit.

    Attributes:
        body_bytes: size of a request's body (413).
        pixels: total of the pictures in a request (413).
        pictures: number per request (400).
        images_in_tensor: number of images in a tensor of the KServe protocol (413).
        faces: number predicted per picture, the largest first; the response says how many were found.
        seconds: until a body has arrived (408), and again until the response is ready (504).
        requests: number in progress at a time (503).
        requests_each: the same per address; IPv6 addresses count by their /64 network (503).
        explanations: number of occlusion maps in progress, each of which takes some hundred predictions (503).
        all_bytes: total size of all bodies in memory (503).
        decode_bytes: memory for decoding the pictures of a request (413), and of all requests together (further ones wait).
        connections: number open at a time; beyond that, a new one closes the connection that has been idle longest.
        connections_each: the same per address.
        head_seconds: until the head of a request is complete, and until the next request on the same connection.
        read_seconds: processor time for each task of a worker, such as decoding a picture (413).
    """

    body_bytes: int = 20 * 2**20
    pixels: int = MAX_PIXELS
    pictures: int = 16
    images_in_tensor: int = 256
    faces: int = 32
    seconds: float = 30.0
    requests: int = 64
    requests_each: int = 48
    explanations: int = 4
    all_bytes: int = 48 * 2**20
    decode_bytes: int = BYTES_PER_PIXEL * MAX_PIXELS
    connections: int = 512
    connections_each: int = 256
    head_seconds: float = 10.0
    read_seconds: float = 5.0


class Budget:
    """A shared amount, such as memory, of which requests reserve parts, at most `total` at a time."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Future]] = deque()

    def take(self, amount: int) -> bool:
        """Reserve an amount without waiting; return False if it is not available."""
        if self._waiting or self.used + amount > self.total:
            return False
        self.used += amount
        return True

    async def wait_for(self, amount: int) -> None:
        """Wait until an amount, at most the total, is available, and reserve it; callers are served in order."""
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
        """Release an amount that was reserved."""
        self.used -= amount
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            amount, turn = self._waiting[0]
            if not turn.cancelled():
                if self.used + amount > self.total:
                    return
                self.used += amount
                turn.set_result(None)
            self._waiting.popleft()


def estimate_wait(num_requests: int, seconds_each: float) -> int:
    """Return the value of Retry-After, 1 to 30 seconds: the estimated time for the requests that are waiting now."""
    return int(min(30, max(1, math.ceil(num_requests * seconds_each))))
