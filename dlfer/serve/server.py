"""The process: models loaded, a port opened, requests finished before it ends."""

from __future__ import annotations

import copy
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from dlfer.errors import DlferError, EnvironmentProblem, UserError
from dlfer.predict.engines import load_engine
from dlfer.predict.predictor import NOTICE
from dlfer.runs.find import find_model
from dlfer.serve.app import build_app
from dlfer.serve.limits import Limits
from dlfer.serve.models import ServedModel, build_model, choose_names

KEY_VARIABLE = "DLFER_API_KEY"
SHORTEST_KEY = 16
_KEEP_ALIVE = 10
BACKLOG = 512
"""Connections that may wait to be accepted."""


@dataclass(frozen=True)
class ServerOptions:
    """How a server is started.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        faces: "auto", "whole", "centerface", "mtcnn" or "opencv".
        detector_size: longest side in pixels of what faces are searched for in; None: the detector's own.
        limits: of requests.
        window: seconds for which requests are collected.
        drain: seconds that requests have to finish in after the server was told to stop.
        access_log: whether each request is a line on stderr: address, method, path, status.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    faces: str = "auto"
    detector_size: int | None = None
    limits: Limits = field(default_factory=Limits)
    window: float = 0.005
    drain: float = 30.0
    access_log: bool = True


class GracefulServer(uvicorn.Server):
    """Finishes what was begun when it is told to stop, within `drain` seconds, and says meanwhile that it is not ready."""

    def __init__(self, config: uvicorn.Config, *, drain: float) -> None:
        super().__init__(config)
        self.was_cut_short = False
        self._drain = drain
        self._give_up_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; told a second time, stop at once."""
        if self._give_up_at is None:
            self.config.app.state.service.is_stopping = True
            self._give_up_at = time.monotonic() + self._drain
        else:
            self.was_cut_short = self.config.app.state.service.num_requests > 0
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether it is time to end."""
        if self._give_up_at is not None:
            num_left = self.config.app.state.service.num_requests
            is_late = time.monotonic() > self._give_up_at
            if num_left == 0 or is_late:
                self.was_cut_short = num_left > 0
                return True
        return await super().on_tick(counter)


def serve_models(models: Sequence[str], options: ServerOptions, *, say: Callable[[str], None]) -> None:
    """Load models and answer requests until SIGTERM or Ctrl-C.

    Args:
        models: each a model's name, a run or a folder, or NAME=one of these.
        options: how.
        say: is told where the server is, and of what to beware.

    Raises:
        UserError: no such model, a port that is taken, a key that is too short.
        DlferError: requests did not end in time after the server was told to stop.
    """
    key = read_key()
    loaded = load_models(models, faces=options.faces, detector_size=options.detector_size, say=say)
    is_loopback = check_loopback(options.host)
    app = build_app(
        loaded,
        limits=options.limits,
        faces="whole" if options.faces == "whole" else "auto",
        key=key,
        # A page elsewhere may let its own name point to this computer; under that name nothing is answered.
        hosts=("localhost", "127.0.0.1", "[::1]", options.host) if is_loopback else None,
        window=options.window,
    )
    listener = open_listener(options.host, options.port)
    port = listener.getsockname()[1]
    if not is_loopback and key is None:
        say(
            f"WARNING: {options.host} can be reached from other computers, and no key is asked for. "
            f"Set {KEY_VARIABLE} (at least {SHORTEST_KEY} characters), and put TLS before it."
        )
    say(NOTICE)
    shown = f"[{options.host}]" if ":" in options.host else options.host
    say(f"dlfer serves {', '.join(loaded)} at http://{shown}:{port}/ (Ctrl-C stops it)")
    server = GracefulServer(configure(app, options), drain=options.drain)
    with listener:
        server.run(sockets=[listener])
    if server.was_cut_short:
        raise DlferError(f"dlfer serve: requests were cut short; they had not ended within {options.drain:g} seconds.")
    say("dlfer serve: stopped; every request that was begun was answered.")


def load_models(
    names: Sequence[str], *, faces: str, say: Callable[[str], None], detector_size: int | None = None
) -> dict[str, ServedModel]:
    """Return the models by the names that requests know them by.

    Raises:
        UserError, ModelError, EnvironmentProblem: one of them cannot be served.
    """
    given = [_split_name(name) for name in names]
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
    """Return the key from the environment, or None.

    Raises:
        UserError: it is too short, or not of printable ASCII, which headers need.
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
    """Return whether an address is reached from this computer alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split_name(text: str) -> tuple[str | None, str]:
    """Return the name and the model of NAME=MODEL; None and the text where it is a path or has no name."""
    name, sign, rest = text.partition("=")
    if not sign or Path(text).exists():
        return None, text
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
        raise UserError(f"dlfer serve {text}: expected a name of letters, digits, -, _ and . before the =.")
    return name, rest


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 takes a free one.

    It listens from here on, so that a client who reads the address waits a moment instead of being refused.

    Raises:
        EnvironmentProblem: the port is taken, or the address is none of this computer.
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
            "(0 takes a free one), or end what listens there."
        ) from error
    return listener


def configure(app: FastAPI, options: ServerOptions) -> uvicorn.Config:
    """Return uvicorn's settings; all that it says goes to stderr."""
    logs = copy.deepcopy(LOGGING_CONFIG)
    logs["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return uvicorn.Config(
        app,
        log_config=logs,
        log_level="info" if options.access_log else "warning",
        access_log=options.access_log,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 * 1024,
        # Connections, busy or not; beyond it uvicorn itself answers 503.
        limit_concurrency=8 * options.limits.requests,
        backlog=BACKLOG,
    )
