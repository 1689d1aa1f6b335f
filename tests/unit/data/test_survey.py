"""Outliers of size, brightness and contrast by a robust rule."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dlfer.data.survey import compute_light, compute_robust_z, find_outliers
from dlfer.runs.audit_record import OutlierImage, Place


def _places(num):
    return [Place("train", str(row), "a") for row in range(num)]


def test_the_robust_z_is_that_of_the_median_and_scipys_mad():
    values = np.random.default_rng(0).normal(100, 7, 501)
    z, median, scale = compute_robust_z(values, 0.1)
    mad = stats.median_abs_deviation(values, scale="normal")
    assert (median, scale) == (np.median(values), pytest.approx(mad, rel=1e-4))
    assert z == pytest.approx((values - np.median(values)) / mad, rel=1e-4)


def test_equal_values_are_no_outliers_and_rounding_makes_none():
    values = np.full(50, 130.0)
    values[7] += 1.5
    assert find_outliers("brightness", values, _places(50)).n == 0
    values[7] += 100
    found = find_outliers("brightness", values, _places(50))
    assert found.images == [OutlierImage(split="train", id="7", label="a", value=231.5)]
    assert (found.low, found.median, found.high) == (123.0, 130.0, 137.0)


def test_the_furthest_come_first_and_the_bounds_are_kept():
    values = np.concatenate([np.random.default_rng(0).normal(120, 10, 300), [5, 250, 210]])
    found = find_outliers("contrast", values, _places(303))
    assert [image.id for image in found.images] == ["301", "300", "302"]
    assert all(not found.low <= image.value <= found.high for image in found.images)
    assert found.n == np.sum((values < found.low) | (values > found.high))


def test_sizes_are_judged_by_their_ratio():
    sides = np.array([100.0] * 20 + [104, 96, 800, 13])
    found = find_outliers("size", sides, _places(24))
    assert {image.value for image in found.images} == {800, 13}
    assert found.median == 100
    assert found.low * found.high == pytest.approx(100**2, rel=1e-3)


def test_at_most_a_hundred_are_listed_and_all_are_counted():
    values = np.concatenate([np.zeros(500), np.full(150, 200.0)])
    found = find_outliers("brightness", values, _places(650))
    assert (found.n, len(found.images)) == (150, 100)


def test_light_is_mean_and_deviation():
    grey = np.stack([np.full((4, 4), 9), np.tile([0, 10], (4, 2))]).astype(np.float32)
    brightness, contrast, constant = compute_light(grey)
    assert brightness.tolist() == [9, 5]
    assert contrast.tolist() == [0, 5]
    assert constant.tolist() == [True, False]
