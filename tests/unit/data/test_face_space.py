"""Distance from face space: what is drawn otherwise than the rest lies far."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from dlfer.config.sections import DataConfig
from dlfer.data.duplicates import compute_signatures, group_duplicates, to_grey
from dlfer.data.survey import compute_face_distances, compute_light, find_no_faces
from dlfer.data.synthetic.faces import load_synthetic_faces
from dlfer.runs.audit_record import Place


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    config = DataConfig(source="synthetic_faces", num_images={"train": 560, "validation": 7, "test": 7})
    return load_synthetic_faces(config).train.images


def _places(num):
    return [Place("train", str(row), "a") for row in range(num)]


def _find(images):
    signatures, contrast = compute_signatures(images)[0], compute_light(to_grey(images))[1]
    return find_no_faces(signatures, contrast, group_duplicates(images), _places(len(images)))


def test_the_distance_is_what_scikit_learns_components_of_the_others_leave():
    signatures = np.random.default_rng(0).normal(size=(700, 256)).astype(np.float32)
    signatures /= np.linalg.norm(signatures, axis=1, keepdims=True)
    use, groups = np.arange(700) % 9 > 0, np.arange(700) // 2
    found = compute_face_distances(signatures, use, groups)
    for fold in (0, 3):
        judged = groups % 5 == fold
        model = PCA(int(use.sum()) // 25, svd_solver="covariance_eigh").fit(
            signatures[use & ~judged].astype(np.float64)
        )
        rest = signatures[judged] - model.inverse_transform(model.transform(signatures[judged].astype(np.float64)))
        assert found[judged] == pytest.approx((rest**2).sum(axis=1), abs=1e-5)


def test_what_is_no_face_is_listed_first(faces):
    images = faces.copy()
    side = images.shape[1]
    lines = np.zeros((side, side), np.uint8)
    lines[::6] = lines[1::6] = 255
    images[3] = lines[..., None]
    images[40] = (
        np.random.default_rng(0).integers(0, 256, (16, 16)).repeat(side // 16, 0).repeat(side // 16, 1)[..., None]
    )
    found = _find(images)
    assert {image.id for image in found.images[:2]} == {"3", "40"}
    assert all(image.distance > found.threshold for image in found.images)
    assert found.n < 0.05 * len(images)


def test_flat_images_are_not_judged_and_few_are_not_enough(faces):
    images = faces[:510].copy()
    images[:11] = 7
    assert _find(images) is None
    images[0] = faces[0]
    images[1] = faces[1]
    images[:11] = faces[:11]
    images[5] = 7
    listed = _find(images)
    assert "5" not in {image.id for image in listed.images}


def test_an_outsider_that_occurs_often_is_listed(faces):
    images = faces.copy()
    images[100:130] = np.tile([0, 0, 255, 255], (48, 12))[..., None].astype(np.uint8)
    listed = {image.id for image in _find(images).images}
    assert {str(row) for row in range(100, 130)} <= listed


def test_images_that_are_all_alike_have_no_outsider(faces):
    assert _find(np.repeat(faces[:2], 300, axis=0)) is None
