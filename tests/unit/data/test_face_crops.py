"""data.faces as a step of loading: what is found is counted, the rest stays, and nothing is done twice."""

import numpy as np
import pytest
from pydantic import ValidationError

from dlfer.config.sections import DataConfig, FacesConfig
from dlfer.data import faces as face_crops
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.faces import Face, prepare_face, prepare_faces
from dlfer.data.images import equalize
from dlfer.data.sources import load_data


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLFER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Faces in bright images alone; how many images were looked at in each call."""
    counted = []

    def detect(images, *, detector, size):
        counted.append(len(images))
        eyes = np.array([[12.0, 20.0], [36.0, 20.0], [24, 28], [16, 38], [32, 38]])
        face = Face((8.0, 6.0, 32.0, 36.0), 0.9, eyes)
        return [[face] if image.mean() > 100 else [] for image in images]

    monkeypatch.setattr(face_crops, "detect_faces_of_each", detect)
    return counted


def make_bundle(num: int = 6) -> DataBundle:
    rng = np.random.default_rng(0)

    def make(name):
        images = rng.integers(0, 90, (num, 48, 48, 1)).astype(np.uint8)
        images[: num // 2] += 120
        return Split(name, images, np.arange(num) % 2, np.array([f"{name}/{i}" for i in range(num)]))

    return DataBundle("arrays", ("a", "b"), make("train"), make("validation"), None)


def test_found_faces_are_cut_out_and_counted_and_the_others_stay(calls):
    bundle = make_bundle()
    found = prepare_faces(bundle, FacesConfig(detect="mtcnn"))
    assert np.array_equal(found.train.images[3:], bundle.train.images[3:])
    assert not np.array_equal(found.train.images[0], bundle.train.images[0])
    assert found.notes == ("faces: found in 6 of 12 images (50.0%) by mtcnn and cut out; the others are used whole.",)
    assert found.test is None
    assert np.array_equal(found.train.ids, bundle.train.ids)


def test_what_was_done_is_done_once_for_the_same_images_and_section(calls):
    bundle = make_bundle()
    first = prepare_faces(bundle, FacesConfig(detect="mtcnn", align=True))
    again = prepare_faces(bundle, FacesConfig(detect="mtcnn", align=True))
    assert calls == [6, 6]
    assert np.array_equal(first.train.images, again.train.images)
    assert first.notes == again.notes
    prepare_faces(bundle, FacesConfig(detect="mtcnn"))
    assert calls == [6] * 4


def test_a_damaged_cache_is_written_anew(calls, tmp_path):
    bundle = make_bundle()
    first = prepare_faces(bundle, FacesConfig(detect="mtcnn"))
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"PK nonsense")
    again = prepare_faces(bundle, FacesConfig(detect="mtcnn"))
    assert np.array_equal(first.train.images, again.train.images)
    assert len(calls) == 4


def test_a_cache_that_cannot_be_written_is_a_note(calls, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DLFER_CACHE", str(tmp_path / "file"))
    assert any("could not be kept" in note for note in prepare_faces(make_bundle(), FacesConfig(detect="mtcnn")).notes)


def test_light_alone_needs_no_detector(calls):
    bundle = make_bundle()
    found = prepare_faces(bundle, FacesConfig(equalize="clahe"))
    assert calls == []
    assert np.array_equal(found.train.images[2], equalize(bundle.train.images[2], "clahe"))
    assert found.notes == ("faces: the contrast of every image is equalised (clahe).",)


def test_one_image_is_treated_as_those_of_a_split(calls):
    bundle, config = make_bundle(), FacesConfig(detect="mtcnn", align=True, equalize="histogram")
    prepared = prepare_faces(bundle, config)
    for row in (0, 5):
        image, found = prepare_face(bundle.train.images[row], config)
        assert np.array_equal(image, prepared.train.images[row])
        assert found == (row == 0)


def test_chunks_are_the_whole(calls, monkeypatch):
    whole = prepare_faces(make_bundle(), FacesConfig(detect="mtcnn"))
    monkeypatch.setattr(face_crops, "_CHUNK", 4)
    said = []
    monkeypatch.setattr(face_crops, "_TALK_SECONDS", -1.0)
    parts = prepare_faces(make_bundle(), FacesConfig(detect="mtcnn"), say=said.append)
    assert np.array_equal(whole.train.images, parts.train.images)
    assert said[0].startswith("faces: train, 4 of 6 images")


def test_load_data_does_it_after_the_draw_and_before_the_size(calls):
    faces = FacesConfig(detect="mtcnn", equalize="histogram")
    config = DataConfig(
        source="synthetic_faces", faces=faces, size=24, num_images={"train": 20, "validation": 14, "test": 7}
    )
    bundle = load_data(config, image_size=24)
    assert bundle.train.images.shape[1:] == (24, 24, 1)
    assert any(note.startswith("faces: found in") for note in bundle.notes)
    assert max(calls) == 20


def test_a_streamed_source_has_no_faces_step():
    with pytest.raises(ValidationError, match="faces: found faces with source tfds and random crops"):
        DataConfig(source="tfds", name="imagenet2012", faces=FacesConfig(equalize="clahe"))


def test_a_section_that_does_nothing_is_refused():
    with pytest.raises(ValidationError, match="nothing to do"):
        FacesConfig()
    with pytest.raises(ValidationError, match="only centerface and mtcnn find the eyes"):
        FacesConfig(detect="opencv", align=True)
