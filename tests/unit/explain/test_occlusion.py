"""Occlusion finds what a classifier looks at, and nothing where it looks at nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlfer.errors import ModelError
from dlfer.explain.occlusion import compute_occlusion


class OneRegion:
    """Class 1 to the extent that one region is bright; counts its images."""

    def __init__(self, top: int, left: int, side: int) -> None:
        self.region = (slice(top, top + side), slice(left, left + side))
        self.num_images = 0

    def predict(self, images):
        assert images.dtype == np.uint8
        self.num_images += len(images)
        bright = images[(slice(None), *self.region)].mean(axis=(1, 2, 3)) / 255
        return np.stack([1 - bright, bright], axis=1)


def draw_image(top: int, left: int, side: int, shape=(32, 32, 1)) -> np.ndarray:
    image = np.full(shape, 20, np.uint8)
    image[top : top + side, left : left + side] = 255
    return image


@settings(max_examples=40)
@given(top=st.integers(0, 26), left=st.integers(0, 26), size=st.integers(2, 9), data=st.data())
def test_the_map_peaks_where_the_classifier_looks(top, left, size, data):
    stride = data.draw(st.integers(1, size))
    model = OneRegion(top, left, 6)
    found = compute_occlusion(model.predict, draw_image(top, left, 6), 1, size=size, stride=stride, fill=0)
    inside = np.zeros((32, 32), bool)
    inside[model.region] = True
    peak = np.unravel_index(found.sensitivity.argmax(), found.sensitivity.shape)
    near = np.zeros((32, 32), bool)
    near[max(0, top - size + 1) : top + 5 + size, max(0, left - size + 1) : left + 5 + size] = True
    assert near[peak]
    assert np.all(found.sensitivity[~near] == 0)
    assert np.all(found.sensitivity[inside] > 0)
    assert not found.flips[~near].any()
    assert found.probability == pytest.approx(1)
    assert found.predicted == 1


def test_a_square_over_the_whole_region_flips_the_answer_and_a_small_one_does_not():
    model = OneRegion(8, 16, 8)
    image = draw_image(8, 16, 8)
    whole = compute_occlusion(model.predict, image, 1, size=8, stride=8, fill=0)
    expected = np.zeros((32, 32), bool)
    expected[8:16, 16:24] = True
    assert np.array_equal(whole.flips, expected)
    assert np.array_equal(whole.sensitivity, expected.astype(float))
    assert not compute_occlusion(model.predict, image, 1, size=4, stride=4, fill=0).flips.any()


@settings(max_examples=40)
@given(
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    channels=st.sampled_from([1, 3]),
    fill=st.sampled_from(["mean", 0, 255]),
)
def test_a_constant_classifier_has_an_empty_map(height, width, channels, fill):
    image = np.random.default_rng(0).integers(0, 256, (height, width, channels)).astype(np.uint8)
    found = compute_occlusion(lambda images: np.tile([0.2, 0.8], (len(images), 1)), image, 0, fill=fill)
    assert found.sensitivity.shape == found.flips.shape == (height, width)
    assert not found.sensitivity.any()
    assert not found.flips.any()
    assert found.probability == 0.2


@settings(max_examples=40)
@given(height=st.integers(8, 40), width=st.integers(8, 40), size=st.integers(1, 8), data=st.data())
def test_every_pixel_is_covered_and_the_image_is_left_as_it_is(height, width, size, data):
    stride = data.draw(st.integers(1, size))
    seen = np.zeros((height, width), bool)
    images_seen = 0

    def predict(images):
        nonlocal images_seen
        images_seen += len(images)
        assert len(images) <= 128
        seen[...] |= (images[..., 0] == 0).any(axis=0)
        return np.tile([1.0], (len(images), 1))

    image = np.full((height, width), 9, np.uint8)
    found = compute_occlusion(predict, image, 0, size=size, stride=stride, fill=0)
    assert seen.all()
    assert (image == 9).all()
    assert found.num_predictions == images_seen


def test_the_mean_of_a_colour_image_is_a_colour():
    image = np.zeros((12, 12, 3), np.uint8)
    image[..., 0] = 200
    # Covered by its own colour nothing changes.
    found = compute_occlusion(OneRegion(0, 0, 12).predict, image, 1)
    assert not found.sensitivity.any()


def test_probability_that_rises_is_negative():
    model = OneRegion(8, 8, 8)
    found = compute_occlusion(model.predict, draw_image(8, 8, 8), 0, size=8, stride=8, fill=0)
    assert found.sensitivity[8:16, 8:16].max() == -1


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"size": 4, "stride": 5}, "size 4 and stride 5"),
        ({"size": 40}, "32x32 pixels"),
        ({"size": 0}, "size 0"),
        ({"fill": 256}, "fill 256"),
        ({"fill": "black"}, "fill 'black'"),
        ({"target": 2}, "target 2, expected 0..1"),
        ({"target": -1}, "target -1"),
        ({"image": np.zeros((8, 8), np.float32)}, "float32"),
        ({"image": np.zeros((2, 8, 8, 1), np.uint8)}, "expected uint8"),
    ],
)
def test_what_cannot_be_done_is_refused(given_, message):
    values = {"image": draw_image(0, 0, 8), "target": 1, **given_}
    with pytest.raises(ModelError, match=message):
        compute_occlusion(OneRegion(0, 0, 8).predict, values.pop("image"), values.pop("target"), **values)
