"""Equalised images: the values of the methods' definitions, the forms of images, and what is refused."""

import sys

import numpy as np
import pytest

from dlfer.data.images import CLIP_LIMIT, TILES, equalize
from dlfer.errors import DataError, EnvironmentProblem


def draw_grey(seed: int, shape=(48, 48)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ramp = np.linspace(rng.integers(0, 120), rng.integers(130, 255), shape[1])
    return (ramp + rng.normal(0, rng.uniform(1, 30), shape)).round().clip(0, 255).astype(np.uint8)


def equalize_by_definition(grey: np.ndarray, clip_limit: float | None) -> np.ndarray:
    """Map each grey level to the share of pixels that are as dark, after its count is limited (None: not limited)."""
    counts = np.bincount(grey.ravel(), minlength=256)
    if clip_limit is None:
        first = counts[grey.min()]
        return ((np.cumsum(counts) - first) * (255 / (grey.size - first)))[grey]
    limit = max(1, int(clip_limit * grey.size / 256))
    excess = np.maximum(counts - limit, 0).sum()
    return (np.cumsum(np.minimum(counts, limit) + excess / 256) * (255 / grey.size))[grey]


@pytest.mark.parametrize("seed", range(6))
def test_histogram_spreads_the_grey_levels(seed):
    grey = draw_grey(seed)
    expected = equalize_by_definition(grey, None)
    assert np.abs(equalize(grey[..., None], "histogram")[..., 0] - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_clahe_equalises_tiles_with_limited_contrast(seed):
    """An image of equal tiles has the same table in each, which no interpolation changes."""
    tile = draw_grey(seed, (128, 128))
    found = equalize(np.tile(tile, (TILES, TILES))[..., None], "clahe")[..., 0]
    expected = np.tile(equalize_by_definition(tile, CLIP_LIMIT), (TILES, TILES))
    # The excess is handed out in whole counts, of which one is worth 1/64 grey level.
    assert np.abs(found - expected).max() < 1.5


@pytest.mark.parametrize("method", ["none", "histogram", "clahe"])
def test_flat_images_and_forms(method):
    flat = np.full((20, 20, 1), 77, np.uint8)
    assert equalize(flat, method).shape == (20, 20, 1)
    assert np.ptp(equalize(flat, method)) == 0
    assert equalize(draw_grey(0).repeat(3).reshape(48, 48, 3), method).dtype == np.uint8
    # A view of every second pixel, as crops may be, and sides that the tiles do not divide.
    wide = draw_grey(1, (50, 94))[:, ::2, None]
    assert np.array_equal(equalize(wide, method), equalize(wide.copy(), method))


def test_colour_keeps_its_chroma():
    rng = np.random.default_rng(0)
    image = (draw_grey(0)[..., None] // 2 + rng.integers(60, 70, (1, 1, 3))).astype(np.uint8)
    evened = equalize(image, "histogram").astype(int)
    inside = (evened > 0).all(axis=-1) & (evened < 255).all(axis=-1)
    assert inside.mean() > 0.5
    difference = evened - image
    assert np.all(difference[inside] == difference[inside][:, :1])


def test_another_method_is_refused():
    with pytest.raises(DataError, match="found 'gamma', expected one of none, histogram, clahe"):
        equalize(np.zeros((8, 8, 1), np.uint8), "gamma")


def test_without_opencv_the_message_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    image = np.zeros((8, 8, 1), np.uint8)
    assert equalize(image, "none") is image
    with pytest.raises(EnvironmentProblem, match=r"needs OpenCV .*pip install 'opencv-python-headless<5'"):
        equalize(image, "clahe")
