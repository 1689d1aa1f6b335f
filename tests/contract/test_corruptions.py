"""What every corruption must do: keep the form, repeat itself, hang on the id alone, and hurt more with strength."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dlfer.data.augment import CORRUPTIONS, STRENGTHS, corrupt_images
from dlfer.errors import DataError

IDS = np.array([f"Training/{number}" for number in range(8)])


def draw_images(height: int = 48, width: int = 48, channels: int = 1) -> np.ndarray:
    """Noise whose strength grows with its size, as in photographs, around a middling grey: uint8 [8, H, W, C]."""
    generator = np.random.default_rng(0)
    images = generator.normal(110, 6, (8, height, width, channels))
    for size in (3, 6, 12, 24):
        for image in images:
            for channel in range(channels):
                noise = Image.fromarray(generator.normal(0, 90 / size, (size, size)).astype(np.float32))
                image[..., channel] += np.asarray(noise.resize((width, height), Image.Resampling.BILINEAR))
    return np.clip(images, 0, 255).astype(np.uint8)


def measure_damage(images: np.ndarray, name: str, strength: int, seed: int = 0) -> float:
    worse = corrupt_images(images, IDS[: len(images)], corruption=name, strength=strength, seed=seed)
    return float(np.abs(worse.astype(int) - images.astype(int)).mean())


def test_there_are_the_six_that_were_promised():
    assert set(CORRUPTIONS) == {"noise", "blur", "low_resolution", "brightness", "contrast", "occlusion"}


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(48, 48, 1), (30, 50, 3), (8, 8, 1), (224, 224, 3)])
@pytest.mark.parametrize("strength", [1, 5])
def test_shape_and_dtype_stay_and_the_original_is_untouched(name, shape, strength):
    images = draw_images(*shape)
    before = images.copy()
    worse = corrupt_images(images, IDS, corruption=name, strength=strength)
    assert worse.shape == images.shape
    assert worse.dtype == np.uint8
    # A hundredth of eight pixels is no blur.
    assert not np.array_equal(worse, images) or min(shape[:2]) == 8
    assert np.array_equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(48, 48, 1), (64, 40, 3)])
def test_damage_grows_with_strength(name, shape):
    damages = [measure_damage(draw_images(*shape), name, strength) for strength in STRENGTHS]
    assert all(weaker < stronger for weaker, stronger in itertools.pairwise(damages)), damages
    assert damages[0] > 0.2


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_does_not_know_its_neighbours(name):
    images = draw_images()
    together = corrupt_images(images, IDS, corruption=name, strength=3, seed=5)
    order = np.array([6, 2, 3])
    assert np.array_equal(
        corrupt_images(images[order], IDS[order], corruption=name, strength=3, seed=5), together[order]
    )
    assert np.array_equal(corrupt_images(images, IDS, corruption=name, strength=3, seed=5), together)


@pytest.mark.parametrize("name", ["noise", "occlusion"])
def test_seed_and_id_change_what_is_random(name):
    images = np.repeat(draw_images()[:1], 2, axis=0)
    first = corrupt_images(images, IDS[:2], corruption=name, strength=3, seed=0)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(corrupt_images(images, IDS[:2], corruption=name, strength=3, seed=1)[0], first[0])


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("strength", [0, 6, 2.5, -1])
def test_other_strengths_are_refused(name, strength):
    with pytest.raises(DataError, match="strength 1 to 5"):
        corrupt_images(draw_images(), IDS, corruption=name, strength=strength)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_image_is_no_problem_and_constant_ones_stay_images(name):
    assert corrupt_images(draw_images()[:0], IDS[:0], corruption=name, strength=2).shape == (0, 48, 48, 1)
    for value in (0, 255):
        flat = np.full((2, 48, 48, 1), value, np.uint8)
        assert corrupt_images(flat, IDS[:2], corruption=name, strength=5).shape == flat.shape


def test_unknown_names_and_other_arrays_are_refused():
    images = draw_images()
    with pytest.raises(DataError, match="found 'fog' at strength 1, expected one of noise"):
        corrupt_images(images, IDS, corruption="fog", strength=1)
    for other, ids in ((images.astype(np.float32), IDS), (images[..., 0], IDS), (images, IDS[:3])):
        with pytest.raises(DataError, match="expected uint8"):
            corrupt_images(other, ids, corruption="noise", strength=1)


def test_parameters_are_what_they_say():
    flat = np.full((8, 48, 48, 1), 100, np.uint8)
    noise = corrupt_images(flat, IDS, corruption="noise", strength=2).astype(float) - 100
    assert noise.std() == pytest.approx(255 * 0.08, rel=0.03)
    assert abs(noise.mean()) < 0.5
    assert (corrupt_images(flat, IDS, corruption="brightness", strength=2) == 151).all()
    square = corrupt_images(flat, IDS, corruption="occlusion", strength=3) != 100
    assert (square.sum(axis=(1, 2, 3)) == round(0.35 * 48) ** 2).all()
    images = draw_images()
    contrast = corrupt_images(images, IDS, corruption="contrast", strength=2)
    assert contrast.std(axis=(1, 2, 3)) == pytest.approx(0.4 * images.std(axis=(1, 2, 3)), rel=0.02)


def test_blur_is_pillows_up_to_its_approximation():
    images = draw_images()
    found = corrupt_images(images, IDS, corruption="blur", strength=4)[0, 8:-8, 8:-8, 0]
    pillow = Image.fromarray(images[0, ..., 0]).filter(ImageFilter.GaussianBlur(0.045 * 48))
    assert np.abs(found.astype(int) - np.asarray(pillow)[8:-8, 8:-8]).mean() < 2
