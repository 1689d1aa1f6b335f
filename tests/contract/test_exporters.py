"""What every format of `dlfer export` must do: answer as the artifact, say what it takes, notice a changed byte."""

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import keras
import numpy as np
import onnx
import pytest
from PIL import Image

from dlfer.cli import export as verb
from dlfer.config.sections import HeadConfig, ModelConfig
from dlfer.data.images import resize_to
from dlfer.data.synthetic.faces import draw_face
from dlfer.errors import ModelError
from dlfer.export.contract import Sample
from dlfer.export.exporters import EXPORTERS, Origin, check_needs, export_classifier
from dlfer.model.families import FAMILIES
from dlfer.model.stage_network import build_transfer_network
from dlfer.predict.runtimes import EXPORT_FILE, FORMATS, OTHER_RUNTIMES, RUNTIMES, open_export, read_export
from dlfer.runs.artifact import ExportAbout
from dlfer.runs.files import hash_file

pytestmark = pytest.mark.slow

LABELS = ("angry", "happy", "sad")
SIZE = (40, 48)
RUNTIME_ALONE = """
import runpy, sys
for absent in {absent}:
    sys.modules[absent] = None
sys.argv = ["example.py"]
runpy.run_path({example!r})
"""


def draw_faces(number: int, *, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([draw_face("Happy", rng=rng) for _ in range(number)])[:, 4:44, :, None]


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(0)
    config = ModelConfig(backbone="efficientnet_nano", head=HeadConfig(pooling="max"))
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=1)
    # Answers that tell the images apart, as a trained network's do.
    network.head.kernel.assign(network.head.kernel * 20.0)
    return FAMILIES["transfer"](network, LABELS, config=config, channels=1)


@pytest.fixture(scope="module")
def exports(classifier, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports")
    check_needs(classifier, tuple(EXPORTERS))
    targets = np.arange(48) % 3
    sample = Sample(draw_faces(48, seed=0), "drawn faces", draw_faces(40, seed=1), "other drawn faces", targets)
    origin = Origin(card="---\nlibrary_name: dlfer\n---\n# A card\n", about=ExportAbout(model="nano"), size=SIZE)
    for name in EXPORTERS:
        export_classifier(classifier, name, out=out, sample=sample, origin=origin)
    return out


@pytest.mark.parametrize("form", ["onnx", "litert"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(form, value, exports, classifier, tmp_path):
    folder = tmp_path / form
    shutil.copytree(exports / form, folder)
    values = json.loads((folder / EXPORT_FILE).read_text())
    file = folder / values["file"]
    weight = np.asarray(classifier.parts.head.kernel)[0, 0].tobytes()
    contents = file.read_bytes()
    assert contents.count(weight) == 1
    file.write_bytes(contents.replace(weight, np.float32(value).tobytes()))
    values["sha256"][values["file"]] = hash_file(file)
    (folder / EXPORT_FILE).write_text(json.dumps(values))
    with pytest.raises(ModelError, match="found 1 weights that are NaN or infinite"):
        open_export(folder)


OTHERS = [(form, runtime) for form, runtimes in OTHER_RUNTIMES.items() for runtime in runtimes]


@pytest.mark.parametrize(("form", "runtime"), OTHERS)
@pytest.mark.parametrize("shape", [(1, 32, 32, 1), (19, 40, 48, 1), (8, 48, 40, 1), (3, 9, 20, 1)])
def test_another_runtime_answers_alike(form, runtime, shape, exports, classifier):
    if find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    images = (
        draw_faces(19, seed=2) if shape[1:3] == SIZE else np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    )
    found = open_export(exports / form, runtime=runtime)(images)
    assert found.dtype == np.float32
    # Of eight bits every runtime rounds in its own way, and noise is unlike the images that they are calibrated on.
    assert np.allclose(found, classifier.predict(images), atol=EXPORTERS[form].limits.difference or 0.3)


def test_tables_have_the_same_formats():
    assert tuple(EXPORTERS) == FORMATS == tuple(RUNTIMES) == tuple(verb.FORMATS.split(","))


@pytest.mark.parametrize("name", EXPORTERS)
@pytest.mark.parametrize("number", [1, 5])
def test_it_answers_as_the_classifier(name, number, exports, classifier):
    images = draw_faces(5, seed=2)[:number]
    found, wanted = open_export(exports / name)(images), classifier.predict(images)
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert np.allclose(found, wanted, atol=EXPORTERS[name].limits.difference or 0.1)
    # Faces that are answered alike would tell nothing.
    assert number == 1 or np.ptp(wanted, axis=0).max() > 0.2


@pytest.mark.parametrize("name", [name for name, exporter in EXPORTERS.items() if exporter.any_size])
@pytest.mark.parametrize("shape", [(2, 32, 32, 1), (3, 101, 67, 1), (1, 9, 20, 1)])
def test_free_sizes_are_free(name, shape, exports, classifier):
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    # Noise is unlike the images that eight bits are calibrated on.
    atol = EXPORTERS[name].limits.difference or 0.2
    assert np.allclose(open_export(exports / name)(images), classifier.predict(images), atol=atol)


@pytest.mark.parametrize("name", EXPORTERS)
def test_the_contract_says_what_it_takes_and_how_it_was_compared(name, exports):
    record = read_export(exports / name)
    side = (None, None) if EXPORTERS[name].any_size else SIZE
    assert record.format == name
    assert record.input.shape == [None, *side, 1]
    assert (record.input.dtype, record.input.channels) == ("uint8", "grey")
    assert record.labels == json.loads((exports / name / "labels.json").read_text()) == list(LABELS)
    assert record.temperature.applied is False
    agreement = record.agreement
    assert agreement.n == agreement.accuracy.n == 48
    assert agreement.labels_agree.low <= agreement.labels_agree.value
    lost = agreement.accuracy.difference
    assert lost.low <= lost.value <= lost.high
    card = (exports / name / "MODEL_CARD.md").read_text()
    assert f"library_name: {EXPORTERS[name].hub_name}" in card
    assert "48 images (drawn faces)" in card


def test_an_onnx_file_of_eight_bits_has_them_where_the_weights_are(exports):
    record = read_export(exports / "onnx-int8")
    assert record.quantised.as_json() == {
        "num_images": 40,
        "images": "other drawn faces",
        "float_operations": {"MatMul": 1},
    }
    assert record.agreement.labels_agree.value >= 0.9
    graph = onnx.load(exports / "onnx-int8" / "model.onnx").graph
    made = {output: node for node in graph.node for output in node.output}
    kernels = [node for node in graph.node if node.op_type == "Conv"]
    assert len(kernels) == len(
        [n for n in onnx.load(exports / "onnx" / "model.onnx").graph.node if n.op_type == "Conv"]
    )
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in kernels:
        pixels, kernel = (made[name] for name in node.input[:2])
        assert pixels.op_type == kernel.op_type == "DequantizeLinear"
        assert values[kernel.input[0]].dtype == np.int8
        # A scale for each output channel, and seven of the eight bits.
        assert values[kernel.input[1]].shape == values[kernel.input[0]].shape[:1]
        assert np.abs(values[kernel.input[0]]).max() <= 64
    # The pixels are resized in float32, and the last dense layer computes in it.
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert len(products) == 3
    assert not any(
        made[name].op_type == "DequantizeLinear" for node in products[:2] for name in node.input if name in made
    )


def test_eight_bits_are_eight_bits(exports):
    record = read_export(exports / "litert-int8")
    assert record.quantised.as_json() == {"num_images": 40, "images": "other drawn faces", "float_operations": {}}
    sizes = {name: (exports / name / "model.tflite").stat().st_size for name in ("litert", "litert-int8")}
    assert sizes["litert-int8"] < 0.5 * sizes["litert"]


@pytest.mark.parametrize("name", EXPORTERS)
def test_a_changed_byte_is_refused(name, exports):
    names = read_export(exports / name).sha256
    on_disk = {path.relative_to(exports / name).as_posix() for path in (exports / name).rglob("*") if path.is_file()}
    assert set(names) == on_disk - {EXPORT_FILE}
    for file in names:
        whole = (exports / name / file).read_bytes()
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 1
        (exports / name / file).write_bytes(damaged)
        with pytest.raises(ModelError, match=f"{file}: sha256"):
            open_export(exports / name)
        (exports / name / file).write_bytes(whole)
    open_export(exports / name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "savedmodel" else ()) for name in EXPORTERS]
)
def test_the_example_runs_with_its_runtime_alone(name, exports, classifier, tmp_path):
    example = exports / name / "example.py"
    absent = ["dlfer"] if name == "savedmodel" else ["dlfer", "keras", "tensorflow"]
    done = subprocess.run(
        [sys.executable, "-c", RUNTIME_ALONE.format(absent=absent, example=str(example))],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    printed = ast.literal_eval(done.stdout[done.stdout.index("{") :])
    assert tuple(printed) == LABELS
    image = np.asarray(Image.open(exports / name / "example.png"))[..., None]
    image = image if EXPORTERS[name].any_size else resize_to(image, SIZE)
    wanted = classifier.predict(image[None])[0]
    assert np.allclose(list(printed.values()), wanted, atol=0.1 if name.endswith("int8") else 2e-4)
