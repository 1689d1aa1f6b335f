"""Connection handling with time and number limits: uvicorn's HTTP/1.1 protocol, with errors in this server's schema.

A connection is busy from the head of a request to the end of its response, and idle otherwise. An idle connection is closed
after `Limits.head_seconds`, no matter how many bytes arrive meanwhile. It is closed earlier when a new connection needs its
slot: per address, when that address has too many connections, or overall, when all slots are taken. New connections,
health checks included, are therefore always accepted, and a client that has no request in progress loses nothing.

A connection that the server closes is shut down for writing first, and what still arrives is read and discarded for a short
time. Otherwise the kernel would reset it, and a client that is still sending its body would lose the response.
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
"""Connections that the kernel queues until they are accepted."""
GRACE = 1.0
"""Seconds in which a new connection keeps its slot without having sent a request; in this time there may be twice as many."""
LINGER = 2.0
"""Seconds in which a closed connection still reads and discards what the client is sending."""
MAX_HEAD_BYTES = 32 * 1024
"""Size of the head of a request (request line and headers)."""

_LOG = logging.getLogger("uvicorn.error")


class _LingeringTransport:
    """The transport of a connection, whose `close` ends the sending direction only; see `LimitedConnection.linger`."""

    def __init__(self, transport: asyncio.Transport, connection: LimitedConnection) -> None:
        self._transport, self._connection, self._is_closing = transport, connection, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return whether the connection is closed, or closed for sending."""
        return self._is_closing or self._transport.is_closing()

    def close(self) -> None:
        """Send what is buffered, then the end of the stream."""
        if self.is_closing():
            return
        self._is_closing = True
        try:
            self._transport.write_eof()
            self._transport.resume_reading()
            self._connection.linger()
        except (OSError, NotImplementedError):  # the client has reset the connection; TLS has no half-closed state
            self._transport.close()

    def write(self, data: bytes) -> None:
        """Send bytes; after `close` they are discarded, as other transports do."""
        if not self.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        """Close in both directions at once; buffered data is lost."""
        self._is_closing = True
        self._transport.abort()


class LimitedConnection(H11Protocol):
    """One connection; `limits` are those of the server, the other arguments uvicorn's."""

    def __init__(self, *args: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*args, **named)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_lingering = False
        self.address = ""

    @property
    def is_busy(self) -> bool:
        """Whether a request has begun whose response has not ended."""
        return not self._is_lingering and self.cycle is not None and not self.cycle.response_complete

    @property
    def is_open(self) -> bool:
        """Whether a request may still be answered on this connection."""
        return not self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a slot, that of an idle connection if all are taken."""
        super().connection_made(_LingeringTransport(transport, self))
        self.address = find_address({"client": self.client})
        self._start_idle()
        others = [one for one in self.connections if one is not self]
        of_address = [one for one in others if one.address == self.address]
        if len(of_address) >= self._limits.connections_each:
            self._take_slot(of_address, self._limits.connections_each)
        elif len(others) >= self._limits.connections:
            self._take_slot(others, self._limits.connections)

    def _take_slot(self, others: Sequence[LimitedConnection], maximum: int) -> None:
        """Close the connection that has been idle longest, unless it is so new that its request may be on its way."""
        idle = [one for one in others if not one.is_busy]
        oldest = min(idle, key=lambda one: one.idle_since, default=None)
        is_full = len(others) >= 2 * maximum
        if oldest is not None and (self.loop.time() - oldest.idle_since > GRACE or is_full):
            oldest.drop()
        elif is_full:
            self._refuse(503, "All connections of this server are in use; try again later.")
            self.drop()

    def _start_idle(self) -> None:
        self.idle_since = self.loop.time()
        self._set_timer(self._limits.head_seconds, self._close_idle)

    def _set_timer(self, seconds: float, action: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, action)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_idle(self) -> None:
        """Close a connection whose request did not arrive in time; a client that has sent part of it receives an error."""
        has_begun = bool(self.conn.trailing_data[0])
        if has_begun and not self.is_busy:
            self._refuse(408, f"The head of the request did not arrive within {self._limits.head_seconds:g} seconds.")
        else:
            self.drop()

    def drop(self) -> None:
        """Close at once; buffered data is lost."""
        self.connections.discard(self)
        self.transport.abort()

    def linger(self) -> None:
        """Discard what arrives after the last response until the client closes the connection, for a short time."""
        self._is_lingering = True
        self.idle_since = self.loop.time()
        self._set_timer(LINGER, self._end_linger)

    def _end_linger(self) -> None:
        if self.transport.get_write_buffer_size() and self.loop.time() - self.idle_since < self._limits.seconds:
            self._set_timer(LINGER, self._end_linger)  # the client is still receiving the response
        else:
            self.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the slot."""
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process received bytes; they do not restart the timer for the head of a request."""
        if self._is_lingering:
            return
        self.conn.receive_data(data)
        self.handle_events()

    def handle_events(self) -> None:
        """Process received events, and stop the timer once the head of a request is complete."""
        super().handle_events()
        if self.is_busy:
            self._stop_timer()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        if not self.transport.is_closing():
            self._start_idle()
        super().on_response_complete()
        self._unset_keepalive_if_required()  # our own timer replaces uvicorn's
        if self.is_busy:
            self._stop_timer()

    def pause_writing(self) -> None:
        """Limit the time in which a client may leave its response unread."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.seconds, self.drop)

    def resume_writing(self) -> None:
        """Continue after the client has read some of its response."""
        super().resume_writing()
        self._stop_write_timer()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not valid HTTP, in the schema of all errors."""
        if self.conn.their_state is h11.ERROR and len(self.conn.trailing_data[0]) > MAX_HEAD_BYTES:
            self._refuse(431, f"The head of the request is larger than {MAX_HEAD_BYTES:,} bytes.")
        else:
            self._refuse(400, "The request is not valid HTTP/1.1.")

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: a request to upgrade the protocol is answered in HTTP/1.1."""

    def _refuse(self, status: int, message: str) -> None:
        """Send an error that belongs to no request, and close."""
        body = json.dumps({"error": message}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *([(b"retry-after", b"1")] if status == 503 else []),
        ]
        _LOG.debug("A connection was refused with %d: %s", status, message)
        try:
            parts = (
                h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(part) for part in parts))
        except h11.LocalProtocolError:  # a response has begun already, and nothing can be inserted into it
            pass
        if self.is_busy:  # let the handler of the request know that it has nobody to answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
