"""Names, cards and sizes of the models that are served; one of them a real one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import dlfer
from dlfer.config.schema import OptimizerConfig
from dlfer.errors import ModelError, UserError
from dlfer.predict.engines import load_engine
from dlfer.runs.records import About, ArtifactRecord, Temperature
from dlfer.serve.app import build_app
from dlfer.serve.models import ServedModel, _describe_optimizer, _describe_preparation, choose_names, read_card
from dlfer.serve.server import check_loopback, load_models, read_key


def test_names_are_given_told_or_taken_from_the_folder_and_never_twice():
    given = [
        (None, Path("runs/2026/model"), About(experiment="lite2")),
        (None, Path("saved_models/other"), About()),
        ("lite2-2", Path("a/model"), About()),
        (None, Path("b/model"), About(experiment="lite2")),
        (None, Path("b/model"), About(name="shipped", experiment="lite2")),
    ]
    assert choose_names(given) == ["lite2", "other", "lite2-2", "lite2-3", "shipped"]
    hostile = ["a/b\n\x1b[31m<b>", "../..", "", "äöü ?", "x" * 500]
    named = [(None, Path("m"), About(name=name)) for name in hostile]
    assert choose_names(named) == ["a-b-31m-b", "model", "m", "äöü", "x" * 100]
    with pytest.raises(UserError, match="the name x is given to 2"):
        choose_names([("x", Path("a"), About()), ("x", Path("b"), About())])


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_what_can_be_reached_from_elsewhere(host, is_loopback):
    assert check_loopback(host) is is_loopback


def test_the_key_is_long_and_fits_a_header(monkeypatch):
    monkeypatch.delenv("DLFER_API_KEY", raising=False)
    assert read_key() is None
    monkeypatch.setenv("DLFER_API_KEY", "sixteen-letters-")
    assert read_key() == "sixteen-letters-"
    for wrong in ("short", "sixteen letters ", "sechzehn-Zeichen-ä"):
        monkeypatch.setenv("DLFER_API_KEY", wrong)
        with pytest.raises(UserError, match="DLFER_API_KEY"):
            read_key()


def test_a_crop_of_another_size_is_resized_and_its_own_is_untouched(engine):
    model = ServedModel("m", engine, card=None, croppers={})
    own = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(model.fit(own), own)
    np.testing.assert_array_equal(model.fit(own.repeat(3, axis=-1)), own)
    assert model.fit(np.full((40, 9, 3), 77, np.uint8)).tolist() == np.full((16, 16, 1), 77).tolist()
    assert model.predict([]).shape == (0, 3)


def test_a_damaged_or_absent_model_is_told(tmp_path):
    with pytest.raises(ModelError, match="no such model"):
        load_models([str(tmp_path / "none")], faces="whole", say=print)
    with pytest.raises(UserError, match="the name x is given to 2 models; expected another"):
        load_models(["x=none", "x=none"], faces="whole", say=print)  # before any is looked up
    with pytest.raises(UserError, match="a name of letters"):
        load_models(["a b=c"], faces="whole", say=print)


@pytest.mark.slow
def test_a_trained_model_answers_as_it_does_without_a_server(tmp_path, as_base64, png):
    from starlette.testclient import TestClient

    from dlfer.config.sections import ModelConfig
    from dlfer.model.classifier import TransferClassifier
    from dlfer.model.stage_network import build_transfer_network

    config = ModelConfig(backbone="efficientnet_nano")
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=1)
    fit = Temperature(value=2.0, fitted_on="PublicTest", n=10, note=None)
    classifier = TransferClassifier(network, ("a", "b", "c"), config=config, channels=1, temperature_fit=fit)
    classifier.save(tmp_path / "model", about=About(experiment="nano", protocol="official"))
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(
        "experiment: {name: nano}\nfinetune: {data: {source: synthetic_faces}, optimizer: {name: sgd}}\n"
    )
    scores = {"n": 50, "accuracy": {"value": 0.6, "low": 0.46, "high": 0.73}}
    (tmp_path / "metrics.json").write_text(
        json.dumps({"protocol": "official", "selected_on": "PublicTest", "test": None, "validation": scores})
    )
    models = load_models([str(tmp_path), f"again={tmp_path / 'model'}"], faces="whole", say=lambda text: None)
    assert list(models) == ["nano", "again"]
    card = models["nano"].card
    assert (card.backbone, card.optimizer, card.family) == ("efficientnet_nano", "sgd, rate 0.001", "transfer")
    assert (card.accuracy.value, card.accuracy.low, card.accuracy.n) == (0.6, 0.46, 50)
    assert "used for selection" in card.accuracy.what
    assert "temperature 2.000" in card.probabilities
    assert card.preparation == "cut out as a square, grey, 32 × 32 pixels"
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 1)).astype(np.uint8)
    expected = classifier.predict(image[None], calibrated=True)[0]
    with TestClient(build_app(models, faces="whole"), base_url="http://localhost") as client:
        (face,) = client.post("/v1/predict", json={"images": [{"base64": as_base64(png(image[..., 0]))}]}).json()[
            "images"
        ][0]["faces"]
        tensor = {"name": "images", "shape": [1, 32, 32, 1], "datatype": "UINT8", "data": image.ravel().tolist()}
        inferred = client.post("/v2/models/again/infer", json={"inputs": [tensor]}).json()["outputs"][0]["data"]
        no_detector = client.post(
            "/v1/predict", json={"images": [{"base64": as_base64(png(image[..., 0]))}], "faces": "auto"}
        )
    np.testing.assert_allclose(list(face["probabilities"].values()), expected, atol=1e-5)
    np.testing.assert_allclose(inferred, expected, atol=1e-5)
    assert no_detector.status_code == 400


@pytest.mark.parametrize(
    ("faces", "face_size", "channels", "takes_any_size", "words"),
    [
        (None, None, 3, True, "cut out as a square, in colour, 96 × 96 pixels"),
        (None, 48, 1, True, "cut out as a square, grey, 96 × 96 pixels"),
        (None, 48, 1, False, "cut out as a square, grey, 48 × 48 pixels, which the network resizes to 96 × 96"),
        (
            {"detect": "centerface", "align": True, "equalize": "clahe"},
            96,
            1,
            True,
            "aligned by the eyes, grey, equalised in tiles, 96 × 96 pixels",
        ),
        (
            {"detect": "opencv", "equalize": "histogram"},
            96,
            1,
            True,
            "cut out as a square, grey, equalised, 96 × 96 pixels",
        ),
    ],
)
def test_what_becomes_of_a_face_is_told(faces, face_size, channels, takes_any_size, words):
    about = About(faces=faces, face_size=face_size)
    assert (
        _describe_preparation(
            SimpleNamespace(about=about, image_size=96, channels=channels, crop=None, takes_any_size=takes_any_size)
        )
        == words
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "sgd", "learning_rate": 0.01, "momentum": 0.9}, "sgd with momentum 0.9, rate 0.01"),
        ({"name": "adam"}, "adam, rate 0.001"),
        ({"name": "rmsprop", "learning_rate": 1e-4}, "rmsprop, rate 0.0001"),
    ],
)
def test_optimisers_are_told_apart(given, words):
    assert _describe_optimizer(OptimizerConfig(**given)) == words


def test_the_accuracy_of_a_model_in_eight_bits_is_that_of_its_file():
    folder = Path(dlfer.__file__).parents[1] / "saved_models" / "faces_small"
    record = ArtifactRecord.require(folder)
    figure = read_card("small", load_engine(folder), folder).accuracy
    assert figure.value == pytest.approx(record.onnx.accuracy.quantised, abs=1e-4)
    assert figure.value < record.onnx.accuracy.original - 0.005
    assert figure.low < figure.value < figure.high
