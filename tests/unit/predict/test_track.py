"""Faces keep their numbers over movement and gaps; smoothing does not depend on the rate of frames."""

import numpy as np
import pytest

from dlfer.predict.predictor import FaceTracker, compute_overlap

NONE = np.zeros((0, 2))


def make_box(x: float, side: float = 20.0):
    return (x, 10.0, x + side, 10.0 + side)


def test_overlap():
    assert compute_overlap(make_box(0), make_box(0)) == 1
    assert compute_overlap(make_box(0), make_box(10)) == pytest.approx(200 / 600)
    assert compute_overlap(make_box(0), make_box(20)) == 0
    assert compute_overlap(None, None) == 1
    assert compute_overlap(None, make_box(0)) == 0


def test_numbers_are_kept_when_faces_move_change_order_and_are_lost_for_a_moment():
    tracker, even = FaceTracker(), np.full((2, 2), 0.5)
    assert tracker.update([make_box(0), make_box(50)], even, 0.0)[0] == [1, 2]
    assert tracker.update([make_box(53), make_box(3)], even, 0.1)[0] == [2, 1]
    assert tracker.update([], NONE, 0.5)[0] == []
    assert tracker.update([make_box(5)], even[:1], 1.0)[0] == [1]
    assert tracker.update([make_box(53)], even[:1], 1.2)[0] == [3]  # unseen for more than a second
    assert tracker.update([make_box(200), make_box(5)], even, 1.3)[0] == [4, 1]


def test_the_greatest_overlap_wins():
    tracker, even = FaceTracker(), np.full((2, 2), 0.5)
    tracker.update([make_box(0)], even[:1], 0.0)
    assert tracker.update([make_box(8), make_box(1)], even, 0.1)[0] == [2, 1]


@pytest.mark.parametrize("rate", [5, 50])
def test_smoothing_is_that_of_the_stated_time_constant_at_any_rate(rate):
    tracker = FaceTracker(smooth=0.5)
    tracker.update([make_box(0)], np.array([[1.0, 0.0]]), 0.0)
    for index in range(1, rate + 1):
        _, smoothed = tracker.update([make_box(0)], np.array([[0.0, 1.0]]), index / rate)
    assert smoothed[0] == pytest.approx([np.exp(-1 / 0.5), 1 - np.exp(-1 / 0.5)])
    assert smoothed.sum() == pytest.approx(1)
