"""Pictures as a caller in Python has them: what is clear is taken, what is not is described."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import dlfer
from dlfer.data.pictures import to_pictures
from dlfer.errors import DataError, ModelError, UserError
from dlfer.predict import engines
from dlfer.predict.predictor import NOTICE, SMOKE, FacePredictor, describe_predictions
from dlfer.runs.records import About

EXPORT = SimpleNamespace(
    labels=["Dark", "Light"],
    input=SimpleNamespace(shape=[None, None, None, 1], network_size=16, aspect="crop", faces=None),
    temperature=SimpleNamespace(value=None),
    about=SimpleNamespace(trained=None),
)
GREY = np.arange(48 * 40, dtype=np.uint8).reshape(48, 40)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
OPAQUE = np.concatenate([COLOUR, np.full((48, 40, 1), 255, np.uint8)], axis=-1)


@pytest.fixture
def path(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (GREY, GREY[..., None]),
        (GREY[..., None], GREY[..., None]),
        (COLOUR, COLOUR),
        (OPAQUE, COLOUR),
        (OPAQUE * np.array([1, 1, 1, 0], np.uint8), np.full_like(COLOUR, 255)),
        (Image.fromarray(COLOUR), COLOUR),
        (Image.fromarray(OPAQUE), COLOUR),
        (Image.fromarray(GREY), np.repeat(GREY[..., None], 3, axis=-1)),
    ],
)
def test_one_picture_is_one(given, expected):
    for found in (to_pictures(given), to_pictures([given])):
        assert len(found) == 1
        assert found[0].dtype == np.uint8
        assert np.array_equal(found[0], expected)


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (np.stack([GREY] * 5), (5, 48, 40, 1)),
        (np.stack([COLOUR] * 2), (2, 48, 40, 3)),
        (np.stack([OPAQUE] * 2), (2, 48, 40, 3)),
        (np.zeros((0, 8, 8, 3), np.uint8), (0, 8, 8, 3)),
    ],
)
def test_several_of_one_size_stay_an_array(given, shape):
    assert to_pictures(given).shape == shape


@pytest.mark.parametrize(
    "given",
    [
        GREY[:7],
        [COLOUR[:7]],
        OPAQUE[None, :7],
        np.zeros((1, 40, 7), np.uint8).transpose(0, 2, 1),
        Image.fromarray(GREY[:7]),
        [Image.fromarray(COLOUR[:7])],
    ],
)
def test_a_picture_with_a_short_side_is_refused(given):
    with pytest.raises(DataError, match=r"images(\[0\])?: found 40 x 7 pixels, expected at least 8 on each side"):
        to_pictures(given)


@pytest.mark.parametrize("shape", [(4, 4), (1, 7, 7), (2, 5, 5), (1, 7, 7, 3)])
def test_small_arrays_are_not_taken_for_channels(shape):
    with pytest.raises(DataError, match="expected at least 8 on each side") as refused:
        to_pictures(np.zeros(shape, np.uint8))
    assert "moveaxis" not in str(refused.value)


def test_a_list_may_mix_sizes_and_kinds(path):
    found = to_pictures((GREY, COLOUR[:20], Image.fromarray(COLOUR), path, str(path)))
    assert [picture.shape for picture in found] == [(48, 40, 1), (20, 40, 3), *[(48, 40, 3)] * 3]
    assert np.array_equal(found[3], COLOUR)


class OnAnotherDevice:
    def __array__(self, dtype=None, copy=None):
        raise TypeError("copy it to the host first")


BAD = [
    (OnAnotherDevice(), "an OnAnotherDevice, which cannot be converted to an array .copy it to the host first"),
    (".", "IsADirectoryError|not a file"),
    (COLOUR / 255, r"float64 of shape \[48, 40, 3\] with values 0 to 1.*\* 255"),
    ((COLOUR / 255).astype(np.float32)[None], r"float32.*\* 255"),
    (np.full((48, 40), np.nan), "NaN"),
    (COLOUR.astype(np.int64), r"int64.*astype\('uint8'\)"),
    (COLOUR.astype(np.uint16) * 200, "uint16.*with values"),
    (COLOUR[..., :2], r"shape \[48, 40, 2\]"),
    ([COLOUR[..., :2]], r"images\[0\].*\[48, 40, 2\]"),
    (np.zeros((48, 40, 5), np.uint8), r"\[48, 40, 5\]"),
    (np.zeros((2, 48, 40, 5), np.uint8), r"\[2, 48, 40, 5\]"),
    (np.zeros((2, 3, 48, 40), np.uint8), "moveaxis"),
    (np.zeros((1, 2, 48, 40, 3), np.uint8), r"\[1, 2, 48, 40, 3\]"),
    (np.zeros((0, 40), np.uint8), r"\[0, 40\]"),
    (np.zeros((2, 0, 40, 3), np.uint8), r"\[2, 0, 40, 3\]"),
    (np.zeros(7, np.uint8), r"\[7\]"),
    (np.array(COLOUR, dtype=object), "object"),
    (np.array([COLOUR, GREY[:20]], dtype=object), "object"),
    (COLOUR > 3, "bool"),
    ([], "empty list"),
    ((), "empty tuple"),
    (None, "None"),
    (5, "an int"),
    (b"...", "a bytes"),
    ({"a": COLOUR}, "a dict"),
    ([[1, 2], [3, 4]], r"images\[0\]: found a list"),
    ([COLOUR, None], r"images\[1\]: found None"),
    ([np.stack([COLOUR] * 2)], r"images\[0\].*\[2, 48, 40, 3\]"),
    (iter([COLOUR]), "iterator"),
    ("no such file.png", "no such file"),
    (["no such file.png"], "no such file"),
    (Image.fromarray(GREY.astype(np.float32)), "mode F"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_what_is_no_picture_is_described_with_what_is_expected(given, message):
    with pytest.raises(DataError, match=message):
        to_pictures(given)


@pytest.mark.parametrize("faces", ["whole", "opencv"])
def test_a_predictor_takes_one_picture_as_it_takes_a_list_of_one(classifier, blocks, draw_blocks, faces, tmp_path):
    picture = draw_blocks((5, 5, 20, 250), (40, 10, 30, 130))
    Image.fromarray(picture).save(tmp_path / "a.png")
    predictor = FacePredictor(classifier, faces=faces)
    expected = predictor.predict([picture])
    grey = picture[..., 0]
    several = (picture, grey, grey[..., None], Image.fromarray(picture), tmp_path / "a.png", str(tmp_path / "a.png"))
    for given in several:
        assert predictor.predict(given) == expected
    assert predictor.predict(list(several)) == expected * len(several)
    assert predictor.predict(np.stack([picture] * 3)) == expected * 3


@pytest.mark.parametrize(("given", "message"), BAD)
def test_a_predictor_refuses_what_is_no_picture(classifier, given, message):
    with pytest.raises(UserError, match=message):
        FacePredictor(classifier, faces="whole").predict(given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classifier": "lite2_96"}, "dlfer.load"),
        ({"classifier": None}, "dlfer.load"),
        ({"abstain": "high"}, "abstain"),
        ({"abstain": float("nan")}, "abstain"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
    ],
)
def test_a_predictor_refuses_wrong_options(classifier, values, message):
    with pytest.raises(UserError, match=message):
        FacePredictor(**{"classifier": classifier, "faces": "whole", **values})


@pytest.mark.parametrize("name", [None, 5, "", ["lite2_96"], b"lite2_96"])
def test_load_takes_names_and_paths_alone(name):
    with pytest.raises(UserError, match="expected the name of a model"):
        dlfer.load(name)


@pytest.mark.parametrize("source", [None, 5, COLOUR, ["a.png"]])
def test_read_image_takes_paths_and_bytes_alone(source):
    with pytest.raises(UserError, match="expected a file's path"):
        dlfer.read_image(source)


@pytest.mark.parametrize("path", [None, 5, ["a.yaml"]])
def test_load_experiment_takes_paths_alone(path):
    with pytest.raises(UserError, match="path of an experiment file"):
        dlfer.load_experiment(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_export_whose_answers_are_not_finite_is_refused_when_opened(monkeypatch, value):
    def answer(images):
        return np.full((len(images), 2), value, np.float32)

    monkeypatch.setattr(engines, "read_export", lambda folder: EXPORT)
    monkeypatch.setattr(engines, "open_export", lambda folder, runtime: answer)
    with pytest.raises(ModelError, match="NaN or infinite for 1 of 1 images"):
        engines.ExportedModel("exports/a")


def test_an_export_takes_what_a_classifier_takes(monkeypatch):
    monkeypatch.setattr(engines, "read_export", lambda folder: EXPORT)
    monkeypatch.setattr(engines, "open_export", lambda folder, runtime: lambda images: np.full((len(images), 2), 0.5))
    export = engines.ExportedModel("exports/a")
    assert export.predict(GREY).shape == (1, 2)
    assert export.predict([GREY, COLOUR[:20]]).shape == (2, 2)
    with pytest.raises(DataError, match="expected uint8"):
        export.predict(COLOUR / 255)


def test_predictions_of_a_smoke_model_say_so_first(classifier):
    about = describe_predictions(FacePredictor(classifier, faces="whole"), faces="whole", smooth=None)
    assert (about["notice"].startswith(NOTICE), about["smoke"]) == (True, None)
    classifier.about = About(smoke=True)
    about = describe_predictions(FacePredictor(classifier, faces="whole"), faces="whole", smooth=None)
    assert (about["notice"].startswith(SMOKE), about["smoke"]) == (True, True)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("", "found an empty text, expected the path"),
        (["  "], r"images\[0\]: found an empty text"),
        (np.ma.masked_array(COLOUR, mask=COLOUR > 9), "found a masked array"),
    ],
)
def test_what_only_looks_like_a_picture_is_refused(given, problem):
    with pytest.raises(DataError, match=problem):
        to_pictures(given)


@pytest.mark.parametrize("size", ["big", 5, 4097, 640.0, True])
def test_a_size_for_the_detector_that_is_none_is_told(classifier, size):
    with pytest.raises(UserError, match="detector size: found"):
        FacePredictor(classifier, detector_size=size)
