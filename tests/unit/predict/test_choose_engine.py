"""--engine auto: the fastest engine of this very model that answers as the model does, and a line that says why."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from dlfer.errors import EnvironmentProblem, ModelError
from dlfer.predict import engines as module
from dlfer.predict.engines import NUM_FACES, choose_engine, describe_choice, draw_faces, find_exports, time_trials
from dlfer.runs.artifact import ExportRecord
from dlfer.runs.records import About

DIGEST = {"network.weights.h5": "a" * 64}


class FakeEngine:
    """Answers by brightness, the surer by `error`, in `seconds` a face of a clock that stands still otherwise."""

    labels, channels, image_size, crop, temperature_fit = ("Dark", "Light"), 1, 20, None, None
    takes_any_size = True
    error_of_photographs = 0.0
    sides = (16, 20)  # of the training images, and of faces that are cut from photographs

    def __init__(self, seconds, clock, *, error=0.0):
        self.seconds, self.clock, self.error, self.lengths = seconds, clock, error, []
        self.about = About(face_size=16)

    def predict(self, images, *, batch_size=64, calibrated=False):
        assert calibrated
        assert images.shape[1:] in {(side, side, 1) for side in self.sides}
        error = self.error + self.error_of_photographs * (images.shape[1] == 20)
        self.lengths.append(len(images))
        self.clock.now += self.seconds * len(images)
        light = images.mean(axis=(1, 2, 3)) / 255
        light = light + error * np.sign(light - 0.5)
        return np.stack([1 - light, light], axis=1).astype(np.float32)


def write_export(place, form, digest=DIGEST):
    (place / form).mkdir(parents=True)
    given = {"shape": [None, None, None, 1], "network_size": 16}
    record = {"version": 1, "format": form, "file": "model", "labels": ["a"], "input": given}
    ExportRecord.build({**record, "about": {"artifact_sha256": digest}}).write(place / form)
    return place / form


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """Return a function: engines of exports by format -> (the name of the chosen, what was said); and the engines."""
    monkeypatch.chdir(tmp_path)
    clock = SimpleNamespace(now=0.0)
    engines = {"keras": FakeEngine(0.010, clock)}
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(module, "find_model", lambda name: tmp_path / "model")
    monkeypatch.setattr(module, "load_engine", lambda name: engines["keras"])
    monkeypatch.setattr(
        "dlfer.predict.engines.read_artifact_record", lambda folder: SimpleNamespace(sha256=DIGEST, onnx=None)
    )

    def open_export(place, *, runtime):
        engine = engines.get(runtime or place.name, EnvironmentProblem("no package"))
        if isinstance(engine, Exception):
            raise engine
        return engine

    monkeypatch.setattr(module, "ExportedModel", open_export)

    def run(exports=(), **given):
        for form, (seconds, *error) in dict(exports).items():
            write_export(tmp_path / "exports" / "m", form)
            wrong = bool(error) and isinstance(error[0], Exception)
            engines[form] = error[0] if wrong else FakeEngine(seconds, clock, error=error[0] if error else 0.0)
        said = []
        chosen = choose_engine("m", say=said.append, **given)
        return next(name for name, engine in engines.items() if engine is chosen), *said

    run.engines = engines
    return run


def test_the_fastest_is_taken(choose):
    name, said = choose({"onnx": (0.004,), "litert": (0.002, 1e-5)})
    assert name == "litert"
    assert said == (
        "engine litert: 2 ms per face in batches of 16 (keras 10, onnx 4, openvino not installed); largest difference of a probability to keras "
        "1e-05 on 16 drawn faces."
    )


def test_one_that_differs_is_not_taken_however_fast(choose):
    name, said = choose({"litert-int8": (0.001, 0.05), "onnx": (0.020,)})
    assert name == "keras"
    assert (
        said
        == "engine keras: 10 ms per face in batches of 16 (onnx 20, openvino not installed, litert-int8 differs by 0.05)."
    )


def test_one_that_says_another_label_or_nothing_is_not_taken(choose, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_DIFFERENCE", 1.0)
    assert choose({"litert": (0.001, -0.9)})[0] == "keras"
    assert choose({"onnx": (0.001, float("nan"))})[0] == "keras"


def test_what_cannot_be_opened_is_passed_over(choose):
    exports = {"onnx": (0, EnvironmentProblem("no package")), "litert": (0, ModelError("changed"))}
    name, said = choose(exports | {"litert-int8": (0.005,)})
    assert name == "litert-int8"
    assert "(keras 10, litert damaged, onnx not installed, openvino not installed)" in said


def test_an_onnx_is_computed_by_openvino_where_that_is_faster(choose):
    choose.engines["openvino"] = FakeEngine(0.003, choose.engines["keras"].clock)
    name, said = choose({"onnx": (0.004,)})
    assert name == "openvino"
    assert said.startswith("engine openvino: 3 ms per face in batches of 16 (keras 10, onnx 4)")


def test_an_export_of_one_size_is_no_choice_where_sizes_differ(choose):
    assert choose({"litert": (0.001,)})[0] == "litert"
    choose.engines["litert"].takes_any_size = False
    name, said = choose(any_size=True)
    assert name == "keras"
    assert "litert takes images of one size only" in said
    # Without enlargement faces of photographs have the size of the training images for both.
    choose.engines["keras"].image_size = 16
    assert choose()[0] == "litert"


def test_an_export_for_which_photographs_are_cropped_at_another_size_is_not_taken(choose):
    assert choose({"litert": (0.001,)})[0] == "litert"
    choose.engines["litert"].takes_any_size = False
    name, said = choose()
    assert name == "keras"
    assert "litert takes faces of 16 instead of 20 px" in said


def test_engines_are_compared_at_the_size_of_faces_of_photographs(choose):
    assert choose({"litert": (0.001,)})[0] == "litert"
    choose.engines["litert"].error_of_photographs = 0.05
    name, said = choose()
    assert name == "keras"
    assert "litert differs by 0.05" in said


def test_it_is_timed_by_as_many_faces_as_there_will_be(choose):
    assert "in batches of 3 " in choose({"onnx": (0.001,)}, num_faces=3)[1]
    assert choose.engines["onnx"].lengths == [NUM_FACES, NUM_FACES, 3, 3, 3, 3]


def test_without_an_export_it_is_keras_and_it_says_how_to_get_one(choose):
    name, said = choose()
    assert name == "keras"
    assert "dlfer export m --to onnx,litert" in said


def test_a_model_with_an_onnx_file_is_what_others_are_compared_with(choose, monkeypatch):
    model = FakeEngine(0.003, choose.engines["keras"].clock)
    choose.engines.update(own=model, openvino=FakeEngine(0.002, model.clock))
    record = SimpleNamespace(sha256=DIGEST, onnx="network.onnx")
    monkeypatch.setattr(module, "read_artifact_record", lambda folder: record)
    monkeypatch.setattr(module, "load_engine", lambda name: model)
    monkeypatch.setattr(module, "ArtifactModel", lambda folder, *, runtime: choose.engines[runtime])
    name, said = choose({"onnx": (0.0001,), "litert": (0.004,)})
    assert name == "openvino"
    assert said.startswith(
        "engine openvino: 2 ms per face in batches of 16 (onnx 3, litert 4); largest difference of a"
    )
    del choose.engines["openvino"]
    monkeypatch.setattr(module, "ArtifactModel", lambda folder, *, runtime: module.ExportedModel("no", runtime=runtime))
    assert choose()[0] == "own"


def test_exports_are_known_by_the_checksums_of_their_model(choose, tmp_path):
    model = tmp_path / "model"
    write_export(tmp_path / "exports" / "other", "onnx", {"network.weights.h5": "b" * 64})
    write_export(tmp_path / "exports", "savedmodel")
    (tmp_path / "exports" / "broken").mkdir()
    (tmp_path / "exports" / "broken" / "export.json").write_text("[]")
    assert find_exports(model) == {}
    old = write_export(tmp_path / "exports" / "any name", "onnx")
    beside = write_export(model / "exports", "litert")
    os.utime(old / "export.json", (1, 1))
    assert find_exports(model) == {
        "litert": beside.relative_to(tmp_path) if not beside.is_absolute() else beside,
        "onnx": old.relative_to(tmp_path),
    }
    new = write_export(tmp_path / "exports" / "again", "onnx")
    assert find_exports(model)["onnx"] == new.relative_to(tmp_path)


def test_faces_are_as_the_model_gets_them(choose):
    engine = choose.engines["keras"]
    faces = draw_faces(engine)
    assert faces.shape == (NUM_FACES, 16, 16, 1)
    assert faces.dtype == np.uint8
    assert len(np.unique(faces, axis=0)) == NUM_FACES
    engine.channels, engine.about = 3, About()
    assert draw_faces(engine).shape == (NUM_FACES, 20, 20, 3)


def test_the_least_of_the_rounds_after_the_first_counts(choose):
    engine = choose.engines["keras"]
    waits = iter([0.01, 0.3, 0.1, 0.2])
    engine.predict = lambda *args, **given: setattr(engine.clock, "now", engine.clock.now + next(waits))
    (trial,) = time_trials([module.Trial("keras", engine)], np.zeros((2, 16, 16, 1), np.uint8))
    assert trial.milliseconds == pytest.approx(50)
    assert describe_choice(trial, [trial], 2).startswith("engine keras: 50 ms per face in batches of 2")
