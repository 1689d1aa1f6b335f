"""Connections that cost little and cannot shut others out: uvicorn's, with times, numbers and errors of our own.

A connection is busy from the head of a request to the end of its answer, and waits otherwise. One that waits is closed after
`Limits.head_seconds`, however many bytes come meanwhile; earlier where another one needs its place: of the same address, when
that has too many, or of any, when all have. So newcomers always come in, health checks among them, and who sends
nothing loses nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from dlfer.serve.guard import find_address
from dlfer.serve.limits import Limits

BACKLOG = 512
"""Connections that may wait to be accepted."""
GRACE = 1.0
"""Seconds that a new connection has for its request before its place may be taken; meanwhile there may be twice as many."""
MOST_HEAD = 32 * 1024
"""Bytes of the head of a request."""

_LOG = logging.getLogger("uvicorn.error")


class LimitedConnection(H11Protocol):
    """One connection; `limits` are those of the server, the other arguments uvicorn's."""

    def __init__(self, *args: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*args, **named)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._is_stuck: asyncio.TimerHandle | None = None
        self.address = ""

    @property
    def is_busy(self) -> bool:
        """Whether a request has begun whose answer has not ended."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a place, of one that waits where there is no other."""
        super().connection_made(transport)
        self.address = find_address({"client": self.client})
        self._begin_waiting()
        others = [one for one in self.connections if one is not self]
        of_address = [one for one in others if one.address == self.address]
        if len(of_address) >= self._limits.connections_each:
            self._take_place(of_address, self._limits.connections_each)
        elif len(others) >= self._limits.connections:
            self._take_place(others, self._limits.connections)

    def _take_place(self, others: Sequence[LimitedConnection], most: int) -> None:
        """Close the one of several that waits longest; one that came just now may have its request on the way."""
        waiting = [one for one in others if not one.is_busy]
        oldest = min(waiting, key=lambda one: one.waits_since, default=None)
        if oldest is not None and (self.loop.time() - oldest.waits_since > GRACE or len(others) >= 2 * most):
            oldest.drop()
        elif len(others) >= 2 * most:
            self._refuse(503, "The server has all the connections that it can take; try again.")

    def _begin_waiting(self) -> None:
        self.waits_since = self.loop.time()
        self._stop_timer()
        self._timer = self.loop.call_later(self._limits.head_seconds, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        """Close a connection whose request did not come; one that has begun to send one is told."""
        has_begun = bool(self.conn.trailing_data[0])
        if has_begun and not self.is_busy:
            self._refuse(408, f"The head of the request did not arrive within {self._limits.head_seconds:g} seconds.")
        else:
            self.drop()

    def drop(self) -> None:
        """Close at once, whatever was not sent."""
        self.connections.discard(self)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        self._stop_timer()
        self._stop_stuck()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, of which the timer for the head takes no notice."""
        self.conn.receive_data(data)
        self.handle_events()

    def handle_events(self) -> None:
        """Go on, and stop the timer where the head of a request is whole."""
        super().handle_events()
        if self.is_busy:
            self._stop_timer()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._begin_waiting()
        super().on_response_complete()
        self._unset_keepalive_if_required()  # the timer above does it
        if self.is_busy or self.transport.is_closing():
            self._stop_timer()

    def pause_writing(self) -> None:
        """Give a client who does not take its answer as long as it had for its body."""
        super().pause_writing()
        self._is_stuck = self.loop.call_later(self._limits.seconds, self.drop)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self._stop_stuck()

    def _stop_stuck(self) -> None:
        if self._is_stuck is not None:
            self._is_stuck.cancel()
            self._is_stuck = None

    def send_400_response(self, msg: str) -> None:
        """Say that a request is no HTTP, in the schema of all errors."""
        found = self.conn.their_state is h11.ERROR and len(self.conn.trailing_data[0]) > MOST_HEAD
        if found:
            self._refuse(431, f"The head of the request is larger than {MOST_HEAD:,} bytes.")
        else:
            self._refuse(400, "The request is no valid HTTP/1.1.")

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: requests to speak another protocol are answered in this one."""

    def _refuse(self, status: int, words: str) -> None:
        """Answer without a request, and close."""
        body = json.dumps({"error": words}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *([(b"retry-after", b"1")] if status == 503 else []),
        ]
        _LOG.debug("A connection was refused with %d: %s", status, words)
        try:
            parts = (
                h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(part) for part in parts))
        except h11.LocalProtocolError:  # in the middle of an answer nothing can be said
            pass
        self.connections.discard(self)
        self.transport.close()
