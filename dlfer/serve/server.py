"""The server process: it loads the models, listens on a port, limits connections, and answers accepted requests before it ends.

Connections use uvicorn's HTTP/1.1 protocol, with limits of time and number and with errors in this server's schema. A
connection is busy from the head of a request to the end of its response, and idle otherwise. An idle connection is
closed after `Limits.head_seconds`, no matter how many bytes arrive meanwhile. It is closed earlier when a new
connection needs its slot: per address, when that address has too many connections, or overall, when all slots are
taken. A new connection, also for a health check, is therefore refused only if twice as many as allowed are all busy.

A connection that the server closes is shut down for writing first, and what still arrives is read and discarded for a short
time. Otherwise the kernel would reset it, and a client that is still sending its body would lose the response.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import ipaddress
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from dlfer.errors import DlferError, EnvironmentProblem, UserError
from dlfer.predict.engines import load_engine
from dlfer.predict.predictor import NOTICE, SMOKE
from dlfer.runs.find import find_model
from dlfer.runs.machine import return_freed_memory
from dlfer.serve.app import build_app
from dlfer.serve.guard import LOOPBACK_NAMES, MAX_HEAD_BYTES, Policy, find_address
from dlfer.serve.limits import Limits
from dlfer.serve.models import ServedModel, build_model, check_names, choose_names

KEY_VARIABLE = "DLFER_API_KEY"
SHORTEST_KEY = 16


@dataclass(frozen=True)
class ServerOptions:
    """The options with which a server is started.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        faces: "auto", "whole", "centerface", "mtcnn" or "opencv".
        detector_size: longest side in pixels to which pictures are shrunk for detection; None: see `build_cropper`.
        limits: of requests.
        hosts: allowed names in the Host header, besides those of this computer and `host`.
        origins: origins of other sites whose pages may send requests.
        insecure: whether other computers may send requests without an API key.
        root_path: path prefix that a proxy adds.
        proxy_headers: whether a trusted proxy gives the client's address in X-Forwarded-For.
        window: seconds for which requests are collected into a batch.
        drain: seconds in which requests in progress may finish after the signal to stop.
        access_log: whether each request is logged on stderr: address, method, path, status.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    faces: str = "auto"
    detector_size: int | None = None
    limits: Limits = field(default_factory=Limits)
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    insecure: bool = False
    root_path: str = ""
    proxy_headers: bool = False
    window: float = 0.005
    drain: float = 30.0
    access_log: bool = True


BACKLOG = 512
"""Connections that the kernel queues until they are accepted."""
GRACE = 1.0
"""Seconds in which a new connection keeps its slot without a request; up to twice as many as allowed are open then."""
LINGER = 2.0
"""Seconds in which a closed connection still reads and discards what the client is sending."""

_LOG = logging.getLogger("uvicorn.error")


class _LingeringTransport:
    """A transport whose `close` ends only the sending direction of a connection; see `LimitedConnection.linger`."""

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
    """An HTTP/1.1 connection with limits; `limits` are those of the server, the other arguments are uvicorn's."""

    def __init__(self, *args: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*args, **named)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_lingering = False
        self.address = ""

    @property
    def is_busy(self) -> bool:
        """Whether a request has begun and its response has not ended."""
        return not self._is_lingering and self.cycle is not None and not self.cycle.response_complete

    @property
    def is_open(self) -> bool:
        """Whether a request may still be answered on this connection."""
        return not self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a slot; if all are taken, that of an idle connection."""
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
        """Close the longest idle connection, unless it is so new that its request may be on its way."""
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
        """Start the timer for the next request."""
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
        """Stop the timer after the client has read some of its response."""
        super().resume_writing()
        self._stop_write_timer()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not valid HTTP, with this server's error schema."""
        # uvicorn calls this while it handles the error, whose hint tells a long head from others.
        if getattr(sys.exc_info()[1], "error_status_hint", 400) == 431:
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
        if self.is_busy:  # tell the handler of the request that the client is disconnected
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


class GracefulServer(uvicorn.Server):
    """A server that answers every accepted request before it ends.

    After the signal to stop it keeps listening until no prediction is in progress, or `drain` seconds have passed; new
    predictions and `/readyz` are answered with 503, and every response closes its connection. Then it accepts the
    kernel's queued connections, closes the port, and gives connections without a request `GRACE` seconds to send one.
    """

    def __init__(self, config: uvicorn.Config, *, drain: float) -> None:
        super().__init__(config)
        self.num_cut_short = 0
        self._drain = drain
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; at a second signal, stop at once."""
        service = self.config.app.state.service
        if self._deadline is None:
            service.is_stopping = True
            self._deadline = time.monotonic() + self._drain
        else:
            self.num_cut_short = service.num_requests
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether it is time to end."""
        if self._deadline is not None:
            num_left = self.config.app.state.service.num_requests
            if num_left == 0 or time.monotonic() > self._deadline:
                self.num_cut_short = num_left
                return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, answer what was accepted, and end."""
        await self._close_port(sockets or [])
        end = time.monotonic() + GRACE
        while time.monotonic() < end and not self.force_exit and not self.num_cut_short:
            if not any(connection.is_open for connection in self.server_state.connections):
                break
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    async def _close_port(self, sockets: list[socket.socket]) -> None:
        """Accept the connections in the kernel's queue, which would be reset otherwise, and stop listening."""
        loop, accepted = asyncio.get_running_loop(), []
        for listener in sockets:
            # OSError: the queue is empty, or a client has left it already, or there are no file descriptors left.
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listener.accept()[0])
        for server in self.servers:
            server.close()
        for connection in accepted:
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._make_protocol, connection)

    def _make_protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def serve_models(models: Sequence[str], options: ServerOptions, *, say: Callable[[str], None]) -> None:
    """Load models and answer requests until SIGTERM or Ctrl-C.

    Args:
        models: each a model's name, a run or a folder, or NAME=one of these.
        options: the server's options.
        say: receives messages for the user: the address of the server, and warnings.

    Raises:
        UserError: no such model, a port that is in use, an API key that is too short, or no key on a public address.
        DlferError: requests did not finish in time after the signal to stop.
    """
    return_freed_memory()
    allow_connections(2 * options.limits.connections + 256)
    policy = choose_policy(options, say=say)
    with open_listener(options.host, options.port) as listener:
        loaded = load_models(models, faces=options.faces, detector_size=options.detector_size, say=say)
        server = _serve(loaded, options, policy, listener, say=say)
    if server.num_cut_short:
        raise DlferError(
            f"dlfer serve: {server.num_cut_short} requests were cut short: they did not finish within {options.drain:g} seconds "
            "after the signal to stop, or a second signal came."
        )
    say("dlfer serve: stopped; every accepted request was answered.")


def _serve(
    loaded: dict[str, ServedModel],
    options: ServerOptions,
    policy: Policy,
    listener: socket.socket,
    *,
    say: Callable[[str], None],
) -> GracefulServer:
    """Answer requests at a socket until SIGTERM or Ctrl-C, and return the server."""
    app = build_app(
        loaded,
        limits=options.limits,
        faces="whole" if options.faces == "whole" else "auto",
        policy=policy,
        window=options.window,
    )
    port = listener.getsockname()[1]
    say(NOTICE)
    for name in [name for name, model in loaded.items() if model.card.smoke]:
        say(f"{name}: {SMOKE}")
    shown = f"[{options.host}]" if ":" in options.host else options.host
    say(f"dlfer serves {', '.join(loaded)} at http://{shown}:{port}/ (Ctrl-C stops it)")
    server = GracefulServer(configure(app, options), drain=options.drain)
    server.run(sockets=[listener])
    return server


def allow_connections(number: int) -> None:
    """Raise the limit of open connections of this process, as far as the system allows it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def choose_policy(options: ServerOptions, *, say: Callable[[str], None] = lambda text: None) -> Policy:
    """Return the access policy according to the options and the API key in the environment.

    Raises:
        UserError: other computers could send requests without a key, or a name, an origin or a prefix is invalid.
    """
    key = read_key()
    if not check_loopback(options.host) and key is None:
        if not options.insecure:
            raise UserError(
                f"dlfer serve --host {options.host}: other computers could send requests, and no API key is set. Set {KEY_VARIABLE} "
                f"(at least {SHORTEST_KEY} characters), or use --insecure if something else controls access."
            )
        say(
            f"WARNING: {options.host} can be reached from other computers, and no API key is set. "
            f"Set {KEY_VARIABLE} (at least {SHORTEST_KEY} characters), and use a proxy with TLS."
        )
    own = f"[{options.host}]" if ":" in options.host else options.host
    hosts = [host.lower().removesuffix(".") for host in options.hosts]
    for host in hosts:
        if not re.fullmatch(r"(\*\.)?[a-z0-9._-]+|\[[0-9a-f:.]+\]", host):
            raise UserError(
                f"--allow-host {host}: expected a name without a port, e.g. faces.example.org or *.example.org."
            )
    origins = [origin.lower().removesuffix("/") for origin in options.origins]
    for origin in origins:
        if not re.fullmatch(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?", origin):
            raise UserError(
                f"--allow-origin {origin}: expected an origin, e.g. https://example.org or http://localhost:3000."
            )
    root = options.root_path.rstrip("/")
    if root and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", root):
        raise UserError(f"--root-path {options.root_path}: expected a path, e.g. /faces.")
    return Policy(
        key=key,
        # A page of another site may let its own name resolve to this computer (DNS rebinding); that name is not allowed.
        hosts=(*LOOPBACK_NAMES, own.lower(), *hosts),
        origins=tuple(origins),
        root_path=root,
        proxy_headers=options.proxy_headers,
    )


def load_models(
    names: Sequence[str], *, faces: str, say: Callable[[str], None], detector_size: int | None = None
) -> dict[str, ServedModel]:
    """Load models, and return them by the names that requests use.

    Raises:
        UserError, ModelError, EnvironmentProblem: one of them cannot be served.
    """
    given = [_split_name(name) for name in names]
    check_names([name for name, _ in given if name])
    folders = [find_model(path) for _, path in given]
    classifiers = []
    for folder in folders:
        say(f"loading {folder}")
        classifiers.append(load_engine(str(folder)))
    chosen = choose_names(
        [(name, folder, one.about) for (name, _), folder, one in zip(given, folders, classifiers, strict=True)]
    )
    return {
        name: build_model(name, classifier, folder=folder, faces=faces, detector_size=detector_size)
        for name, classifier, folder in zip(chosen, classifiers, folders, strict=True)
    }


def read_key() -> str | None:
    """Return the API key from the environment, or None.

    Raises:
        UserError: it is too short, or not printable ASCII, which headers require.
    """
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        return None
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or key != key.strip():
        raise UserError(
            f"{KEY_VARIABLE}: found {len(key)} characters, expected at least {SHORTEST_KEY} printable ones of ASCII. "
            "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return key


def check_loopback(host: str) -> bool:
    """Return whether an address can be reached from this computer only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split_name(text: str) -> tuple[str | None, str]:
    """Split NAME=MODEL into name and model; return None and the text if it is an existing path or has no name."""
    name, sign, rest = text.partition("=")
    if not sign or Path(text).exists():
        return None, text
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
        raise UserError(f"dlfer serve {text}: expected a name of letters, digits, -, _ and . before the =.")
    return name, rest


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 takes a free one.

    It listens from here on, so that a client that connects while the server starts waits instead of being refused.

    Raises:
        EnvironmentProblem: the port is in use, or the address does not belong to this computer.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise EnvironmentProblem(
            f"dlfer serve: cannot listen at {host}, port {port} ({error.strerror or error}). Choose another --port "
            "(0 chooses a free one), or stop the program that uses the port."
        ) from error
    return listener


def configure(app: FastAPI, options: ServerOptions) -> uvicorn.Config:
    """Return uvicorn's settings; all its log messages go to stderr."""
    logs = copy.deepcopy(LOGGING_CONFIG)
    logs["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return uvicorn.Config(
        app,
        http=functools.partial(LimitedConnection, limits=options.limits),
        log_config=logs,
        log_level="info" if options.access_log else "warning",
        access_log=options.access_log,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        backlog=BACKLOG,
    )
