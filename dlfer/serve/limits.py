"""What one request and all together may cost: limits, how a refusal is told, and budgets.

The processes that read requests import this file, so that it imports nothing that is large.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass


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


MAX_PIXELS = 25_000_000
"""Of the pictures of a request together: a photo of a telephone has 12 million, or 24."""

BYTES_PER_PIXEL = 8
"""In memory while a picture is decoded: Pillow's four, and as many while it is turned, or three of the result."""


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
        requests_each: the same of one address; an IPv6 address counts by its first 64 bits (503).
        explanations: begun and not answered occlusion maps, each of which is some hundred predictions (503).
        all_bytes: of all bodies in memory (503).
        decode_bytes: that decoding the pictures of a request may take (413), and all requests together (more wait).
        connections: open at a time; a new one closes the one that waits longest without a request.
        connections_each: the same of one address.
        head_seconds: for the head of a request, and for the next one to begin.
        read_seconds: of processor time in which a worker reads what was sent, each time (413).
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
        while self._waiting:
            amount, turn = self._waiting[0]
            if not turn.cancelled():  # who was cancelled and does not know it yet gets nothing
                if self.used + amount > self.total:
                    return
                self.used += amount
                turn.set_result(None)
            self._waiting.popleft()


def estimate_wait(num_requests: int, seconds_each: float) -> int:
    """Return the value of Retry-After, 1 to 30 seconds: when what waits now will be done."""
    return int(min(30, max(1, math.ceil(num_requests * seconds_each))))
