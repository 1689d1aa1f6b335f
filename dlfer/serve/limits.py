"""What one request, and all requests together, may cost."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass

from starlette.requests import Request

from dlfer.data.images import MAX_PIXELS


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
    pixels: int = MAX_PIXELS
    pictures: int = 16
    images_in_tensor: int = 256
    faces: int = 32
    seconds: float = 30.0
    requests: int = 64
    explanations: int = 4
    all_bytes: int = 256 * 2**20
    all_pixels: int = 2 * MAX_PIXELS


class Budget:
    """An amount that requests take from and give back.

    Args:
        total: the amount.
    """

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
