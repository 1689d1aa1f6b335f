"""The benchmarks of faces: boxes matched with drawn ones, photographs found by their checksum, geometry of a cut."""

import hashlib
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlfer.data.faces import Face
from dlfer.metrics.predictions import Predictions
from dlfer.predict.crops import MARGINS, crop_face_square

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("timing", "detectors", "found_faces")


@pytest.fixture(scope="module")
def modules():
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture
def detectors(modules):
    return modules["detectors"]


@pytest.fixture
def found_faces(modules):
    return modules["found_faces"]


def make_photo(detectors, *, faces=(), ignored=(), size=(100, 80), sha256="", closed=()):
    return detectors.Photo("a/b.png", "some 1.0", sha256, size, tuple(faces), tuple(ignored), closed)


def test_the_table_has_faces_within_their_photographs_and_photographs_without(detectors):
    photos = detectors.read_table(detectors.TABLE)
    with_faces = [photo for photo in photos if photo.faces]
    assert len(with_faces) >= 25
    assert len(photos) - len(with_faces) >= 5
    assert len({photo.sha256 for photo in photos}) == len(photos)
    for photo in photos:
        assert len(photo.sha256) == 64
        assert all(0 <= place < len(photo.faces) for place in photo.closed)
        for left, top, width, height in (*photo.faces, *photo.ignored):
            assert min(left, top) >= 0
            assert min(width, height) > 0
            assert left + width <= photo.size[0]
            assert top + height <= photo.size[1]
        assert all(box[3] >= detectors.MIN_HEIGHT for box in photo.faces)


def test_boxes_are_matched_once_the_greatest_overlap_first(detectors):
    faces = [(0, 0, 10, 10), (5, 0, 10, 10)]
    found = [(4, 0, 10, 10), (0, 0, 10, 10), (60, 60, 10, 10)]
    matched = detectors.match_boxes(faces, found)
    assert matched.pairs == [(0, 1), (1, 0)]
    assert matched.false == [2]
    # 10 x 10 beside 10 x 10, moved by 4.5: 55 / 145 of the union is too little, by 4 it is 60 / 140.
    assert detectors.match_boxes([(0, 0, 10, 10)], [(4.5, 0, 10, 10)]).pairs == []
    assert detectors.match_boxes([(0, 0, 10, 10)], [(4, 0, 10, 10)]).pairs == [(0, 0)]
    assert detectors.match_boxes([], []) == detectors.Matched([], [])


def test_a_box_half_within_an_ignored_area_is_not_false(detectors):
    ignored = [(0, 0, 20, 10)]
    matched = detectors.match_boxes([], [(0, 0, 10, 20), (0, 2, 10, 20), (30, 0, 5, 5)], ignored)
    assert matched.false == [1, 2]


def test_counts_are_over_faces_and_photographs_without_faces_are_told(detectors):
    photos = [make_photo(detectors, faces=[(0, 0, 10, 10), (40, 0, 10, 10)]), make_photo(detectors)]
    counts = detectors.count_faces(photos, [[(1, 0, 10, 10), (70, 0, 9, 9)], [(5, 5, 9, 9)]])
    assert (counts["faces"], counts["found"], counts["missed"]) == (2, 1, 1)
    assert (counts["false"], counts["false_without_faces"]) == (2, 1)
    assert counts["missed_in"] == ["a/b.png: 1"]
    assert counts["interval"][0] < 0.5 < counts["interval"][1]


def test_photographs_are_found_by_their_checksum_and_refused_with_another_size(detectors, tmp_path):
    path = tmp_path / "below" / "renamed.png"
    path.parent.mkdir()
    Image.new("L", (30, 20), 7).save(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    absent = make_photo(detectors, sha256="0" * 64)
    photo = make_photo(detectors, sha256=sha256, size=(30, 20))
    ((found, image),) = detectors.find_photos([absent, photo], tmp_path)
    assert found is photo
    assert image.shape == (20, 30, 3)
    with pytest.raises(SystemExit, match="expected"):
        detectors.find_photos([make_photo(detectors, sha256=sha256)], tmp_path)


def test_faces_that_become_too_small_are_ignored(detectors):
    photo = make_photo(detectors, faces=[(0, 0, 50, 64), (60, 0, 30, 40)], ignored=[(0, 40, 8, 8)], closed=(0,))
    smaller, image = detectors.shrink_photo(photo, np.zeros((80, 100, 3), np.uint8), 4)
    assert image.shape == (20, 25, 3)
    assert smaller.faces == ((0, 0, 12.5, 16),)
    assert smaller.ignored == ((0, 10, 2, 2), (15, 0, 7.5, 10))


def test_a_face_found_in_a_frame_is_told_in_the_pixels_of_the_image(found_faces):
    image = np.arange(48 * 48, dtype=np.uint16).reshape(48, 48, 1).astype(np.uint8)
    framed = found_faces.frame_image(image)
    assert framed.shape == (192, 192, 1)
    assert not framed[:48].any()
    # The image's own edges, and its first pixel's centre.
    marks = np.full((5, 2), 48.5)
    face = found_faces.unframe_face(Face((48.0, 48.0, 96.0, 96.0), 1.0, marks))
    assert face.box == (0, 0, 48, 48)
    assert np.array_equal(face.landmarks, np.zeros((5, 2)))


def test_the_present_scale_and_offset_are_those_of_dlfer(found_faces):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (60, 60, 1), dtype=np.uint8)
    face = Face((10.0, 12.0, 30.0, 36.0), 1.0)
    ours = found_faces.cut_face(image, face, *found_faces.CURRENT, 96)
    assert np.array_equal(ours, crop_face_square(image, face, 96, margin=MARGINS["centerface"], trained_side=48))
    large = found_faces.enlarge_face(replace(face, landmarks=np.zeros((5, 2))), 1.5)
    assert large.box == (15.0, 18.0, 45.0, 54.0)
    assert np.array_equal(large.landmarks, np.full((5, 2), 0.25))
    assert found_faces.move_face(face, 0.5).box == (10.0, 30.0, 30.0, 36.0)


def test_the_geometry_is_in_sides_of_the_cut_square(found_faces):
    # Pixel centres: the square 0..40 begins at -0.5.
    marks = np.array([[9.5, 14.5], [29.5, 14.5], [19.5, 20.0], [12.5, 29.5], [26.5, 29.5]])
    geometry = found_faces.describe_geometry((5.0, 0.0, 30.0, 40.0), marks)
    assert geometry == pytest.approx((20 / 40, 15 / 40, 15 / 40, 30 / 40))
    box = found_faces.get_cut_box(Face((5.0, 0.0, 30.0, 40.0), 1.0, marks), 1.25, 0.1)
    assert box == pytest.approx((-5, -1, 50, 50))
    assert found_faces.describe_geometry(box, marks)[2] == pytest.approx(16 / 50)
    summary = found_faces.summarise_geometry("some", [geometry, geometry])
    assert summary["eye_distance"] == [0.5, 0.5, 0.5]


def test_calm_faces_called_happy_are_counted_among_neutral_and_sad_ones(found_faces):
    labels = ("Happy", "Sad", "Neutral")
    probabilities = np.array([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.1, 0.3, 0.6]])
    ids = np.array([str(row) for row in range(4)])
    found = found_faces.judge(Predictions(ids, labels, np.array([0, 2, 1, 2]), probabilities))
    assert found["calm_called_happy"]["n"] == 3
    assert found["calm_called_happy"]["value"] == pytest.approx(1 / 3)
    assert found["accuracy"]["value"] == 0.75
    assert found["confidence"] == pytest.approx(0.7)
