"""The drawing board: each step against an independent computation."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dlfer.data.synthetic.drawing import (
    SUPERSAMPLE,
    Sketch,
    compute_blur,
    compute_ellipse,
    compute_jpeg,
    compute_soft_noise,
    reduce_canvas,
    round_pixels,
)


def keep(points, lifts):
    return points


def paint(sketch, *, mode="L", background=0, size=16):
    canvas = Image.new(mode, (size * SUPERSAMPLE, size * SUPERSAMPLE), background)
    sketch.paint(canvas, keep)
    return reduce_canvas(canvas)


def test_polygon_covers_its_area_and_later_ones_lie_above():
    sketch = Sketch()
    sketch.fill(np.array([(2, 2), (14, 2), (14, 14), (2, 14)]), 100.0)
    sketch.fill(np.array([(6, 6), (10, 6), (10, 10), (6, 10)]), 200.0)
    image = paint(sketch)
    assert image[4, 4] == 100
    assert image[8, 8] == 200
    assert image[0, 0] == 0
    assert image.sum() == pytest.approx(144 * 100 + 16 * 100, rel=0.12)


def test_lifts_reach_the_projection_with_their_outline():
    sketch, seen = Sketch(), {}
    sketch.fill(np.zeros((3, 2)), 1.0, lift=2.0)
    sketch.line(np.ones((2, 2)), 1.0, width=1, lift=-1.0)

    def project(points, lifts):
        seen["points"], seen["lifts"] = points, lifts
        return points

    sketch.paint(Image.new("L", (48, 48)), project)
    assert seen["points"].shape == (5, 2)
    assert seen["lifts"].tolist() == [2, 2, 2, -1, -1]


def test_tones_outside_the_range_are_clipped():
    sketch = Sketch()
    sketch.fill(np.array([(0, 0), (16, 0), (16, 16), (0, 16)]), (300.0, -20.0, 127.6))
    assert paint(sketch, mode="RGB")[8, 8].tolist() == [255, 0, 128]


def test_fourth_channel_is_the_coverage():
    sketch = Sketch()
    sketch.fill(np.array([(4, 4), (11.5, 4), (11.5, 11.5), (4, 11.5)]), (0.0, 0.0, 0.0))
    cover = paint(sketch, mode="RGBX", background=(0, 0, 0, 0))[:, :, 3]
    assert cover[7, 7] == 255
    assert cover[2, 2] == cover[14, 14] == 0
    assert 0 < cover[7, 11] < 255


def test_ellipse_lies_on_its_equation_and_an_arc_ends_where_it_should():
    points = compute_ellipse((1, 2), (3, 4), num_points=20)
    np.testing.assert_allclose(((points - (1, 2)) ** 2 / (9, 16)).sum(axis=1), 1)
    arc = compute_ellipse((0, 0), (1, 1), num_points=5, start=0.0, turn=0.5)
    np.testing.assert_allclose(arc[[0, 2, -1]], [(1, 0), (0, 1), (-1, 0)], atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 24), (24, 24, 3)])
def test_blur_equals_scipys(shape):
    from scipy.ndimage import gaussian_filter

    image = np.random.default_rng(0).uniform(0, 255, shape)
    sigma = (0.8, 0.8, 0)[: len(shape)]
    expected = gaussian_filter(image, sigma, mode="nearest", radius=2)
    np.testing.assert_allclose(compute_blur(image, sigma=0.8), expected, atol=1e-3)


def test_jpeg_at_full_quality_keeps_the_image_and_is_exact_without_quantisation():
    from scipy.fft import dctn, idctn

    image = np.random.default_rng(0).uniform(0, 255, (16, 16))
    assert np.abs(compute_jpeg(image, quality=100) - image).max() < 4
    step = 8.0 + 7.0 * np.add.outer(np.arange(8), np.arange(8))
    block = np.round(dctn(image[8:, :8] - 128, norm="ortho") / step) * step
    np.testing.assert_allclose(compute_jpeg(image, quality=50)[8:, :8], idctn(block, norm="ortho") + 128, atol=1e-9)


def test_jpeg_loses_more_at_lower_quality():
    image = 128 + 60 * np.sin(np.add.outer(np.arange(48) * 0.9, np.arange(48) * 0.4))
    errors = [np.abs(compute_jpeg(image, quality=q) - image).mean() for q in (95, 60, 30, 12)]
    assert errors == sorted(errors)


def test_soft_noise_is_smooth_and_of_the_right_size():
    noise = np.stack([compute_soft_noise(48, cells=6, rng=np.random.default_rng(seed)) for seed in range(60)])
    assert noise.shape == (60, 48, 48)
    assert abs(noise.mean()) < 0.15
    assert 0.5 < noise.std() < 1.2
    assert np.abs(np.diff(noise, axis=2)).mean() < 0.2


def test_pixels_are_rounded_and_clipped():
    assert round_pixels(np.array([-5.0, 0.4, 0.6, 254.7, 300.0])).tolist() == [0, 0, 1, 255, 255]
