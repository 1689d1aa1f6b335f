"""The ONNX file of an artifact: it answers as Keras does, is checked, and is what predicts without a framework."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import dlfer
from dlfer.config.sections import BoostingConfig, ModelConfig, NormalizeConfig
from dlfer.errors import ModelError
from dlfer.export import embedded
from dlfer.export.embedded import FILE, factor_kernel, list_kernels, write_embedded_onnx
from dlfer.model.artifact import load_artifact
from dlfer.model.boosted import BoostedClassifier
from dlfer.model.classifier import TransferClassifier
from dlfer.model.ensemble import EnsembleClassifier
from dlfer.model.stage_network import build_transfer_network
from dlfer.predict.engines import ArtifactModel, load_engine
from dlfer.predict.runtimes import open_onnx
from dlfer.runs.records import ArtifactRecord, OnnxRecord, Temperature
from tests.unit.model.test_boosted import make_classifier

ROOT = Path(__file__).resolve().parents[3]
LABELS = ("Angry", "Happy", "Sad")
NO_IMAGES = np.zeros((0, 1, 1, 1), np.uint8)


def build(backbone: str = "efficientnet_nano", channels: int = 1, seed: int = 0) -> TransferClassifier:
    """Return a classifier with random weights, whose answers differ from image to image."""
    network = build_transfer_network(
        ModelConfig(backbone=backbone), num_labels=len(LABELS), image_size=32, channels=channels
    )
    rng = np.random.default_rng(seed)
    for weight in network.model.weights:
        values = np.asarray(weight.value)
        if "moving" not in weight.path:
            weight.assign(values + 0.1 * rng.standard_normal(values.shape) * (np.abs(values).mean() + 0.1))
    fit = Temperature(value=1.7, fitted_on="validation", n=9)
    return TransferClassifier(
        network, LABELS, config=ModelConfig(backbone=backbone), channels=channels, temperature_fit=fit
    )


def halve(classifier: TransferClassifier) -> None:
    """Round the large kernels to float16, as a shipped model has them."""
    for weight in classifier.network.weights:
        if len(weight.shape) >= 2 and np.prod(weight.shape) >= embedded.MIN_KERNEL:
            weight.assign(np.asarray(weight.value).astype(np.float16).astype(np.float32))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (40, 48, 48, 1), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images) -> Path:
    place = tmp_path_factory.mktemp("artifact") / "model"
    build().save(place, write_onnx=partial(write_embedded_onnx, images=images, source="random images"))
    return place


def test_it_answers_as_keras_does_and_the_artifact_says_so(folder, images):
    record = ArtifactRecord.require(folder)
    assert record.onnx.n == len(images)
    assert record.onnx.images == "random images"
    assert record.onnx.largest_difference < 1e-4
    assert record.onnx_absent is None
    assert FILE in record.sha256
    keras, found = load_artifact(folder), load_engine(str(folder))
    assert isinstance(found, ArtifactModel)
    for calibrated in (False, True):
        expected = keras.predict(images, calibrated=calibrated)
        assert found.predict(images, calibrated=calibrated) == pytest.approx(expected, abs=1e-4)
    for key in (
        "labels",
        "channels",
        "image_size",
        "aspect",
        "crop",
        "family",
        "about",
        "temperature_fit",
        "temperature",
    ):
        assert getattr(found, key) == getattr(keras, key)


@pytest.mark.parametrize("shape", [(20, 20), (48, 31), (97, 60)])
def test_images_of_any_size_and_any_number(folder, shape):
    keras, found = load_artifact(folder), load_engine(str(folder))
    images = np.random.default_rng(2).integers(0, 256, (5, *shape, 1), np.uint8)
    expected = keras.predict(images)
    assert found.predict(images, batch_size=2) == pytest.approx(expected, abs=1e-4)
    assert found.predict(images[:1]) == pytest.approx(expected[:1], abs=1e-4)
    assert found.predict(images[:0]).shape == (0, 3)


def test_the_engine_can_be_chosen(folder, images):
    keras = load_engine(str(folder), "keras")
    assert isinstance(keras, TransferClassifier)
    for engine in ("onnx", "openvino"):
        if engine == "openvino":
            pytest.importorskip("openvino")
        found = load_engine(str(folder), engine)
        assert found.predict(images) == pytest.approx(keras.predict(images), abs=1e-4)


def test_the_keras_model_is_there_on_demand(folder, images):
    found = dlfer.load(folder)
    raw = np.asarray(found.network(images))
    assert found.predict(images) == pytest.approx(raw, abs=1e-4)


def test_a_changed_file_is_refused_by_every_engine(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    contents = bytearray((copy / FILE).read_bytes())
    contents[len(contents) // 2] ^= 1
    (copy / FILE).write_bytes(contents)
    for engine in (None, "onnx", "keras"):
        with pytest.raises(ModelError, match=rf"{FILE}: sha256 is"):
            load_engine(str(copy), engine)
    (copy / FILE).unlink()
    with pytest.raises(ModelError, match=FILE):
        load_engine(str(copy))


def test_a_model_without_the_file_is_computed_by_keras(tmp_path):
    build().save(tmp_path / "plain")
    assert isinstance(load_engine(str(tmp_path / "plain")), TransferClassifier)
    with pytest.raises(ModelError, match="no export for --engine onnx"):
        load_engine(str(tmp_path / "plain"), "onnx")


def test_answers_that_differ_leave_no_file_and_a_reason(tmp_path, images, monkeypatch):
    classifier = build()
    monkeypatch.setattr(embedded, "open_onnx", lambda path: lambda images: np.full((len(images), 3), 1 / 3, np.float32))
    classifier.save(tmp_path / "model", write_onnx=partial(write_embedded_onnx, images=images, source="random images"))
    record = ArtifactRecord.require(tmp_path / "model")
    assert record.onnx is None
    assert "refused" in record.onnx_absent
    assert not (tmp_path / "model" / FILE).exists()
    assert FILE not in record.sha256


def test_another_backend_says_why_there_is_none(tmp_path, images, monkeypatch):
    monkeypatch.setattr("keras.backend.backend", lambda: "jax")
    found = write_embedded_onnx(build(), tmp_path, images=images, source="random images")
    assert "jax" in found
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_ensemble_of_networks_has_one_file(tmp_path, images):
    members = {"a": build(), "b": build(seed=3)}
    ensemble = EnsembleClassifier(members, LABELS, config=ModelConfig(), combine="average")
    found = write_embedded_onnx(ensemble, tmp_path, images=images, source="random images")
    assert isinstance(found, OnnxRecord), found
    answer = open_onnx(tmp_path / FILE)(images)
    assert answer == pytest.approx(ensemble.predict(images), abs=1e-4)


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        pytest.param("efficientnet_lite0", 1, marks=pytest.mark.slow),
        pytest.param("mobilenet", 3, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 3, marks=pytest.mark.slow),
        pytest.param("resnet18", 1, marks=pytest.mark.slow),
    ],
)
def test_large_kernels_in_float16_change_nothing(tmp_path, backbone, channels):
    classifier = build(backbone, channels)
    halve(classifier)
    images = np.random.default_rng(4).integers(0, 256, (12, 40, 40, channels), np.uint8)
    sizes = {}
    for is_half in (False, True):
        found = write_embedded_onnx(classifier, tmp_path, images=images, source="random images", halve=is_half)
        assert isinstance(found, OnnxRecord), found
        assert found.largest_difference < 1e-4
        sizes[is_half] = (tmp_path / FILE).stat().st_size
    large = sum(kernel.size for kernel in list_kernels(classifier))
    assert sizes[False] - sizes[True] > 0.9 * 2 * large


def test_a_kernel_is_known_by_its_values_and_another_is_not():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 8, 16)).astype(np.float16).astype(np.float32)
    scale = rng.uniform(0.1, 2, 16).astype(np.float32)
    values = np.transpose(kernel, (3, 2, 0, 1)) * scale[:, None, None, None]
    half, found = factor_kernel(values, kernel)
    assert half.dtype == np.float16
    assert half.astype(np.float32) * found == pytest.approx(values, rel=1e-6)
    assert factor_kernel(values + 1e-3, kernel) is None
    assert factor_kernel(values, kernel[..., :8]) is None
    dead = kernel.copy()
    dead[..., 3] = 0
    assert factor_kernel(np.transpose(dead, (3, 2, 0, 1)), dead) is not None


CODE = """
import sys
import dlfer
classifier = dlfer.load("lite2_96")
faces = dlfer.FacePredictor(classifier).predict([dlfer.read_image("docs/astronaut.jpg")])[0]
assert [face.label for face in faces] == ["Happy"], faces
from dlfer.serve.server import load_models
load_models(["lite2_96"], faces="auto", say=lambda text: None)
print([name for name in ("tensorflow", "keras", "jax", "torch", "mtcnn") if name in sys.modules])
"""


def test_prediction_and_serving_of_a_shipped_model_load_no_framework():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.fixture(
    scope="module", params=["standard", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("l2", "none"))]
)
def boosted(request, tmp_path_factory, images) -> tuple[BoostedClassifier, Path]:
    boosting = BoostingConfig(max_depth=3, colsample=1.0, normalize=NormalizeConfig(features=request.param))
    classifier, place = make_classifier(boosting), tmp_path_factory.mktemp("boosted") / "model"
    classifier.save(place, write_onnx=partial(write_embedded_onnx, images=images, source="random images", halve=True))
    return classifier, place


def test_trees_answer_with_the_features_of_the_onnx_file(boosted, images):
    classifier, place = boosted
    record = ArtifactRecord.require(place)
    assert (record.onnx.output, record.onnx.weights) == ("features", "float32")
    found = load_engine(str(place))
    assert isinstance(found, ArtifactModel)
    expected = classifier.predict(images)
    assert found.predict(images) == pytest.approx(expected, abs=0.05)
    assert np.median(np.abs(found.predict(images) - expected)) < 1e-6
    assert (found.predict(images).argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.95
    other_size = np.random.default_rng(2).integers(0, 256, (5, 50, 41, 1), np.uint8)
    assert found.predict(other_size) == pytest.approx(classifier.predict(other_size), abs=0.05)


def test_trees_are_predicted_without_a_framework(boosted):
    _, place = boosted
    code = (
        "import sys, dlfer, numpy as np\n"
        f"print(dlfer.load({str(place)!r}).predict(np.zeros((2, 40, 40, 1), np.uint8)).shape)\n"
        "print([name for name in ('tensorflow', 'keras', 'mtcnn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["(2, 3)", "[]"]


@pytest.mark.parametrize("file", ["trees.json", "features.npz", FILE])
def test_changed_files_of_trees_are_refused(boosted, tmp_path, file):
    copy = shutil.copytree(boosted[1], tmp_path / "copy")
    contents = bytearray((copy / file).read_bytes())
    contents[len(contents) // 2] ^= 1
    (copy / file).write_bytes(contents)
    with pytest.raises(ModelError, match=rf"{file}: sha256 is"):
        load_engine(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "probabilities"}, "outputs have the shape"),
        ({"levels": None}, "features"),
        ({"levels": [{"name": "a", "features": 3}]}, "features"),
        ({"boosting": None}, "boosting"),
        ({"boosting": {"normalize": {"features": "odd"}}}, "boosting"),
    ],
)
def test_a_forged_record_of_trees_is_refused(boosted, tmp_path, change, message):
    copy = shutil.copytree(boosted[1], tmp_path / "copy")
    path = copy / ArtifactRecord.FILE
    values = json.loads(path.read_text())
    target = values["onnx"] if "output" in change else values
    target.update(change)
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=message):
        load_engine(str(copy))


@pytest.mark.slow
def test_trees_whose_labels_differ_leave_no_file(tmp_path, images, monkeypatch):
    monkeypatch.setattr(
        embedded, "combine_trees", lambda *given: lambda images: np.eye(3, dtype=np.float32)[[0] * len(images)]
    )
    make_classifier().save(tmp_path / "model", write_onnx=partial(write_embedded_onnx, images=images, source="random"))
    record = ArtifactRecord.require(tmp_path / "model")
    assert record.onnx is None
    assert "99 % of the labels" in record.onnx_absent
    assert not (tmp_path / "model" / FILE).exists()
