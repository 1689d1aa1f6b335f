"""Light evened out as OpenCV does it."""

import numpy as np
import pytest

from dlfer.data.equalize import equalize, equalize_histogram, equalize_tiles
from dlfer.errors import DataError


def draw_grey(seed: int, shape=(48, 48)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ramp = np.linspace(rng.integers(0, 120), rng.integers(130, 255), shape[1])
    return (ramp + rng.normal(0, rng.uniform(1, 30), shape)).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(6))
def test_histogram_is_opencvs(seed):
    cv2 = pytest.importorskip("cv2")
    grey = draw_grey(seed)
    assert np.array_equal(equalize_histogram(grey), cv2.equalizeHist(grey))


@pytest.mark.parametrize("shape", [(48, 48), (64, 96), (50, 47), (48, 50), (9, 33)])
@pytest.mark.parametrize(("clip_limit", "tiles"), [(2.0, 4), (4.0, 8), (40.0, 3)])
def test_clahe_is_opencvs(shape, clip_limit, tiles):
    cv2 = pytest.importorskip("cv2")
    for seed in range(3):
        grey = draw_grey(seed, shape)
        expected = cv2.createCLAHE(clipLimit=clip_limit, tileGridSize=(tiles, tiles)).apply(grey)
        found = equalize_tiles(grey, clip_limit=clip_limit, tiles=tiles)
        # Ties between two grey levels, common where tiles are small, may round the other way.
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert (found == expected).mean() > 0.9


@pytest.mark.parametrize("method", ["none", "histogram", "clahe"])
def test_flat_images_and_forms(method):
    flat = np.full((20, 20, 1), 77, np.uint8)
    assert equalize(flat, method).shape == (20, 20, 1)
    assert np.ptp(equalize(flat, method)) == 0
    assert equalize(draw_grey(0).repeat(3).reshape(48, 48, 3), method).dtype == np.uint8


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
