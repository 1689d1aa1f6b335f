"""What tests of several packages use: the command, and a classifier and a detector that need no network."""

from __future__ import annotations

import io
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dlfer.cli import main
from dlfer.data.faces import Face
from dlfer.predict.draw import VideoWriter
from dlfer.runs.records import About


@pytest.fixture
def call(capsys, monkeypatch):
    """Run `dlfer` with these arguments in this process; return its exit code, stdout and stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["dlfer", *args])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return call


class BrightnessClassifier:
    """Says Light with the mean brightness of a crop; remembers how it was asked."""

    labels = ("Dark", "Light")
    channels = 1
    image_size = 16
    aspect = "crop"
    crop = None
    takes_any_size = True
    temperature_fit = None

    def __init__(self, about=None) -> None:
        self.about = About.build(about or {})
        self.shapes: list[tuple[int, ...]] = []

    def predict(self, images, *, batch_size=64, calibrated=False):
        assert images.dtype == np.uint8
        assert images.shape[-1] == self.channels
        self.shapes.append(images.shape)
        light = images.mean(axis=(1, 2, 3)) / 255
        return np.stack([1 - light, light], axis=1).astype(np.float32)


def find_blocks(images, *, detector, size=None):
    """Return a face for each grey level above 100, the largest first."""
    found = []
    for image in images:
        grey, faces = image[..., 0], []
        for level in np.unique(grey[grey > 100]):
            rows, columns = np.nonzero(grey == level)
            box = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
            faces.append(Face(tuple(map(float, box)), 0.5))
        found.append(sorted(faces, key=lambda face: -face.box[2] * face.box[3]))
    return found


@pytest.fixture
def classifier() -> BrightnessClassifier:
    return BrightnessClassifier()


@pytest.fixture
def blocks(monkeypatch) -> None:
    """Faces are blocks of one grey level above 100, in any picture."""
    monkeypatch.setattr("dlfer.predict.crops.detect_faces_of_each", find_blocks)


@pytest.fixture
def draw_blocks():
    """Return a function: (x, y, side, level) of each block -> uint8 [60, 80, 3]."""

    def draw(*placed: tuple[int, int, int, int]) -> np.ndarray:
        image = np.zeros((60, 80, 3), np.uint8)
        for x, y, side, level in placed:
            image[y : y + side, x : x + side] = level
        return image

    return draw


@pytest.fixture
def blank_figures(monkeypatch):
    """Let figures be eight pixels wide, with their title and description: saving them takes most of the time of a page."""

    def write(figure, path, *, title, description):
        info = PngInfo()
        for key, text in (("Title", title), ("Description", description), ("Kind", "chart")):
            info.add_text(key, text)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path, pnginfo=info)
        return path

    for module in ("report.figures", "report.pictures", "explain.figures"):
        monkeypatch.setattr(f"dlfer.{module}.write_figure", write)


@pytest.fixture
def drawn_figures(blank_figures, monkeypatch):
    """Draw them after all, in one test of a module whose figures are blank."""
    monkeypatch.undo()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, driven by playwright, which downloads nothing."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright==1.65.2")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def list_scrolled(browser):
    """Return a function: a page -> what scrolls sideways on a phone of 390 pixels: "html" (the page itself), div, figure, pre."""
    script = """[...document.querySelectorAll('html, .scroll, .wide, pre')]
        .filter(element => element.scrollWidth > element.clientWidth).map(element => element.localName)"""

    def find(path) -> list[str]:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto(path.as_uri())
        return page.evaluate(script)

    return find


def make_stdin(text: str) -> io.TextIOWrapper:
    """Return a text as a program's standard input."""
    return io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")


def write_video(path, num_frames=6, rate=5.0):
    """Write a video of frames of 48 x 64 whose red rises by 30; return its path."""
    pytest.importorskip("cv2")
    writer = VideoWriter(path, rate=rate)
    for index in range(num_frames):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[..., 0] = 30 * index  # red
        writer.write(frame)
    writer.close()
    return str(path)
