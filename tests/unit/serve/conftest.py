"""A server without a network behind it: a classifier of three labels that answers by the brightness of a crop."""

from __future__ import annotations

import base64
import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from dlfer.predict.crops import Crop
from dlfer.runs.records import About
from dlfer.serve.app import build_app
from dlfer.serve.guard import Policy
from dlfer.serve.limits import Limits
from dlfer.serve.models import ServedModel
from dlfer.serve.schemas import Card
from dlfer.serve.server import GracefulServer, ServerOptions, configure, open_listener

LABELS = ("dark", "grey", "bright")


class Brightness:
    """An engine: the label is the third of 0..255 in which the mean of a crop lies."""

    labels = LABELS
    channels = 1
    image_size = 16
    aspect = "crop"
    crop = None
    takes_any_size = True
    temperature_fit = None

    def __init__(self) -> None:
        self.about = About()
        self.sizes: list[int] = []
        self.shapes: set[tuple[int, ...]] = set()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def predict(self, images, *, batch_size=64, calibrated=False):
        if not self.may_go_on.wait(20):
            raise TimeoutError("the test forgot to let the engine go on")
        self.sizes.append(len(images))
        self.shapes.add(images.shape[1:])
        mean = images.reshape(len(images), -1).astype(np.float64).mean(axis=1, keepdims=True)
        raw = np.exp(-(((mean - np.array([[42.0, 127.0, 212.0]])) / 40) ** 2)) + 1e-6
        return (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)


def find_halves(images):
    """A detector: the left and the right half of a picture as wide as two squares are faces; no other has any."""
    found = []
    for image in images:
        height, width = image.shape[:2]
        boxes = [(0.0, 0.0, height, height), (float(height), 0.0, width, height)] if width == 2 * height else []
        found.append(
            [
                Crop(box, 0.9, image[:, int(box[0]) : int(box[2]), :1].mean(axis=-1, keepdims=True).astype(np.uint8))
                for box in boxes
            ]
        )
    return found


def take_whole(images):
    return [[Crop(None, None, image)] for image in images]


def make_model(name: str, engine: Brightness) -> ServedModel:
    card = Card(
        name=name,
        family="transfer",
        labels=list(LABELS),
        backbone="none",
        optimizer="adam",
        accuracy=None,
        protocol=None,
        banner=None,
        image_size=16,
        probabilities="not calibrated",
        research_only=True,
    )
    return ServedModel(name, engine, card=card, croppers={"auto": find_halves, "whole": take_whole})


def encode(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def make_png_of(width: int, height: int) -> bytes:
    """Return the head of a PNG that declares a size; its pixels are missing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def make_two_faces() -> np.ndarray:
    """A picture in which `find_halves` finds a dark and a bright face."""
    image = np.full((40, 80, 3), 30, np.uint8)
    image[:, 40:] = 230
    return image


@pytest.fixture
def two_faces() -> bytes:
    return encode(make_two_faces())


@pytest.fixture
def as_base64():
    return lambda contents: base64.b64encode(contents).decode()


@pytest.fixture
def huge_png() -> bytes:
    return make_png_of(20000, 10000)


@pytest.fixture
def png():
    return encode


@pytest.fixture
def engine() -> Brightness:
    return Brightness()


@pytest.fixture
def make_served(engine):
    """Return a function that gives two models by name; the first asks `engine`."""
    return lambda: {"one": make_model("one", engine), "two": make_model("two", Brightness())}


def make_client(models, limits: Limits | None, **options) -> TestClient:
    app = build_app(models, limits=limits or Limits(), **options)
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client():
    """One server for all refusals of a module: starting its decoder takes longer than answering them."""
    with make_client({name: make_model(name, Brightness()) for name in ("one", "two")}, None) as client:
        yield client


@pytest.fixture
def serve(engine, make_served):
    """Return a function that gives a client of a server with these limits and options."""
    clients = []

    def serve(limits: Limits | None = None, **options) -> TestClient:
        client = make_client(make_served(), limits, **options)
        client.__enter__()
        clients.append(client)
        engine.sizes.clear()
        return client

    yield serve
    engine.may_go_on.set()
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def start(make_served):
    """Return a function that starts a server in a thread, and gives it and its port."""
    begun = []

    def start(
        limits: Limits | None = None, *, drain: float = 20, key: str | None = None
    ) -> tuple[GracefulServer, int, threading.Thread]:
        options = ServerOptions(port=0, limits=limits or Limits(), access_log=False)
        app = build_app(make_served(), limits=options.limits, policy=Policy(key=key))
        listener = open_listener("127.0.0.1", 0)
        server = GracefulServer(configure(app, options), drain=drain)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        begun.append((server, thread))
        while not server.started:
            time.sleep(0.02)
        return server, listener.getsockname()[1], thread

    yield start
    for server, thread in begun:
        server.should_exit = True
        thread.join(20)
