"""The detector against its own publisher's decoding, and what any detector of faces has to do."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from dlfer.data import centerface
from dlfer.errors import EnvironmentProblem

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.asarray(Image.open(ROOT / "docs" / "astronaut.jpg").convert("RGB"))


def tile(image: np.ndarray) -> np.ndarray:
    """Return four copies, two of them flipped, as [512, 512, 3]."""
    small = np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR))
    flipped = small[:, ::-1]
    return np.concatenate([np.concatenate([small, flipped], 1), np.concatenate([flipped, small], 1)], 0)


@pytest.mark.parametrize("name", ["astronaut", "tiled"])
def test_boxes_scores_and_landmarks_are_those_of_another_implementation(photo, name):
    expected = json.loads((ROOT / "tests" / "golden" / "centerface.json").read_text())[name]
    boxes, marks = np.array(expected["boxes"]), np.array(expected["landmarks"]).reshape(-1, 5, 2)
    found = centerface.detect((photo if name == "astronaut" else tile(photo))[None], min_score=0.5)[0]
    assert len(found.scores) == len(boxes)
    order = np.lexsort((found.boxes[:, 0].round(), found.boxes[:, 1].round()))
    other = np.lexsort((boxes[:, 0].round(), boxes[:, 1].round()))
    corners = np.concatenate([found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]], axis=1)
    assert corners[order] == pytest.approx(boxes[other, :4], abs=0.02)
    assert found.scores[order] == pytest.approx(boxes[other, 4], abs=1e-4)
    assert found.landmarks[order] == pytest.approx(centerface.sort_sides(marks[other]), abs=0.02)


def test_images_of_one_size_are_found_together_as_one_by_one(photo):
    images = np.stack([photo, photo[:, ::-1], np.zeros_like(photo)])
    together = centerface.detect(images, min_score=0.5)
    for found, image in zip(together, images, strict=True):
        alone = centerface.detect(image[None], min_score=0.5)[0]
        assert found.boxes == pytest.approx(alone.boxes, abs=1e-2)
        assert found.scores == pytest.approx(alone.scores, abs=1e-5)
    assert [len(found.scores) for found in together] == [1, 1, 0]


@pytest.mark.parametrize("size", [(33, 64), (97, 51), (480, 301), (31, 31)])
def test_any_size_is_taken_and_boxes_stay_within_it(photo, size):
    image = np.asarray(Image.fromarray(photo).resize(size[::-1]))
    found = centerface.detect(image[None], min_score=0.2)[0]
    assert found.boxes.shape == (len(found.scores), 4)
    assert found.landmarks.shape == (len(found.scores), 5, 2)
    assert (found.boxes[:, :2] >= 0).all()
    assert (found.boxes[:, 0] + found.boxes[:, 2] <= size[1] + 1e-6).all()
    assert (found.boxes[:, 1] + found.boxes[:, 3] <= size[0] + 1e-6).all()


def test_eyes_and_corners_of_the_mouth_are_from_left_to_right_in_a_flipped_picture(photo):
    for image in (photo, photo[:, ::-1]):
        marks = centerface.detect(np.ascontiguousarray(image)[None], min_score=0.5)[0].landmarks[0]
        assert marks[0, 0] < marks[1, 0]
        assert marks[3, 0] < marks[4, 0]
        assert marks[:2, 1].max() < marks[2, 1] < marks[3:, 1].min()  # eyes above nose above mouth


def test_faces_below_the_least_size_are_left_out(photo, monkeypatch):
    assert len(centerface.detect(photo[None], min_score=0.5)[0].scores) == 1
    monkeypatch.setattr(centerface, "MIN_SIDE", 100.0)  # the face is 89 pixels wide
    assert len(centerface.detect(photo[None], min_score=0.5)[0].scores) == 0


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


@given(arrays(np.float64, st.tuples(st.integers(0, 12), st.just(5)), elements=st.floats(1, 50)))
def test_suppression_keeps_the_best_of_what_overlaps_and_nothing_else(values):
    boxes, scores = values[:, :4], values[:, 4]
    kept = centerface.suppress(boxes, scores)
    assert list(scores[kept]) == sorted(scores[kept], reverse=True)
    for place, index in enumerate(kept):
        assert all(overlap(boxes[index], boxes[other]) <= centerface.MAX_OVERLAP + 1e-9 for other in kept[:place])
    for index in set(range(len(boxes))) - set(kept.tolist()):
        assert any(
            scores[other] >= scores[index] and overlap(boxes[index], boxes[other]) > centerface.MAX_OVERLAP - 1e-9
            for other in kept
        )


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "centerface.onnx"
    broken.write_bytes(centerface.FILE.read_bytes()[:-1])
    monkeypatch.setattr(centerface, "FILE", broken)
    centerface._load_session.cache_clear()
    try:
        with pytest.raises(EnvironmentProblem, match=r"centerface\.onnx.*damaged"):
            centerface.detect(np.zeros((1, 64, 64, 3), np.uint8), min_score=0.5)
    finally:
        centerface._load_session.cache_clear()
