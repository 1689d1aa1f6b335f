"""Exports answer as classifiers do: sizes, batches, sums and temperature; another format is refused."""

import json

import numpy as np
import pytest

from dlfer.errors import ModelError, UserError
from dlfer.metrics.confidence import apply_temperature
from dlfer.predict import engines
from dlfer.predict.engines import ExportedModel, find_export, load_engine
from dlfer.predict.predictor import FacePredictor, describe_predictions
from dlfer.runs.artifact import ExportRecord

RECORD = {
    "version": 1,
    "file": "model.onnx",
    "format": "onnx",
    "labels": ["Dark", "Light"],
    "input": {"shape": [None, 16, 16, 1], "network_size": 16, "faces": None},
    "temperature": {"value": 2.0, "note": "..."},
    "about": {"trained": {"name": "a", "face_size": 12}},
}


@pytest.fixture
def export(tmp_path, monkeypatch):
    """A folder with an export of brightness; returns the folder, the record and the shapes it was asked with."""
    folder, shapes, record = tmp_path / "exports" / "onnx", [], json.loads(json.dumps(RECORD))
    folder.mkdir(parents=True)
    (folder / "export.json").write_text("{}")

    def answer(images):
        shapes.append(images.shape)
        light = images.mean(axis=(1, 2, 3)) / 255
        return np.stack([1 - light, light], axis=1) * 1.01  # as eight bits do, not quite one

    monkeypatch.setattr(engines, "read_export", lambda place: ExportRecord.build(record))
    monkeypatch.setattr(engines, "open_export", lambda place, runtime: answer)
    return folder, record, shapes


def test_batches_of_the_size_that_it_takes_with_sums_of_one(export):
    folder, _, shapes = export
    model = ExportedModel(folder)
    images = np.full((5, 20, 20, 1), 51, np.uint8)
    answers = model.predict(images, batch_size=2)
    assert shapes[1:] == [(2, 16, 16, 1), (2, 16, 16, 1), (1, 16, 16, 1)]
    assert answers == pytest.approx(np.tile([0.8, 0.2], (5, 1)), abs=1e-6)
    assert answers.dtype == np.float32
    assert model.predict(images, calibrated=True) == pytest.approx(apply_temperature(answers, 2.0), abs=1e-6)
    assert model.predict(images[:0]).shape == (0, 2)


def test_an_engine_is_a_runtime_of_the_export(export, monkeypatch):
    def answer(images):
        return np.full((len(images), 2), 0.5, np.float32)

    opened = []
    monkeypatch.setattr(engines, "open_export", lambda place, runtime: opened.append((place, runtime)) or answer)
    for engine in ("onnx", "openvino"):
        load_engine(str(export[0].parent), engine)
    assert opened == [(export[0], None), (export[0], "openvino")]


def test_a_predictor_takes_it(export):
    folder, record, _ = export
    record["input"]["shape"] = [None, None, None, 1]
    predictor = FacePredictor(load_engine(str(folder.parent), "onnx"), faces="whole")
    (face,) = predictor.predict([np.full((30, 30, 3), 255, np.uint8)])[0]
    assert face.label == "Light"
    assert export[2][1:] == [(1, 12, 12, 1)]  # the resolution of its training images
    assert "2.000" in describe_predictions(predictor, faces="whole", smooth=0)["probabilities"]


def test_what_is_no_export_for_an_engine(export, tmp_path):
    folder = export[0]
    assert find_export(str(folder), "onnx") == folder
    assert find_export(str(folder.parent), "onnx") == find_export(str(folder.parent), "openvino") == folder
    with pytest.raises(ModelError, match="its format is onnx, expected litert or litert-int8"):
        find_export(str(folder), "litert")
    with pytest.raises(ModelError, match="dlfer export MODEL --to litert"):
        find_export(str(tmp_path), "litert")
    with pytest.raises(UserError, match="is an export; say what runs it with --engine: onnx, openvino or litert"):
        load_engine(str(folder))
    with pytest.raises(UserError, match="keras, onnx, openvino, litert"):
        load_engine("a", "torch")


def test_a_size_that_is_no_square_is_kept(export):
    folder, record, shapes = export
    record["input"]["shape"] = [None, 12, 16, 1]
    model = ExportedModel(folder)
    images = np.zeros((1, 40, 40, 1), np.uint8)
    images[:, 5:35] = 255  # the largest 3:4 part of the square
    assert model.predict(images)[0] == pytest.approx([0, 1], abs=1e-6)
    assert shapes[1:] == [(1, 12, 16, 1)]
    assert model.about.face_size == 12
