"""benchmarks/peer_models.py: its resizes, and a network of each kind of file, against the rule written out."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "peer_models.py"
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 48, 48), np.uint8)


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peer_models", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_models"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["peer_models"]


def run(graph, output, path, num_values: int) -> np.ndarray:
    graph.write(graph.add("Flatten", output), num_values, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": IMAGES[:, None].astype(np.float32)})[0]


def test_a_resize_is_that_of_the_library_that_it_names(peers):
    image = IMAGES[:1, ..., None].astype(np.float32)
    legacy = tf.compat.v1.image.resize_bilinear(image, (112, 112), half_pixel_centers=False).numpy()[0, ..., 0]
    corners = tf.image.crop_and_resize(image, [[0, 0, 1, 1]], [0], (256, 256)).numpy()[0, ..., 0]
    for kind, side, expected in (("legacy", 112, legacy), ("corners", 256, corners)):
        matrix = peers.make_resize(side, kind=kind)
        assert np.allclose(matrix @ IMAGES[0] @ matrix.T, expected, atol=1e-2), kind


def test_opencvs_resize_of_bytes_is_met_to_a_level_and_nearly_everywhere_exactly(peers, tmp_path):
    graph = peers.Graph()
    found = run(graph, peers.add_opencv_resize(graph, 64), tmp_path / "m.onnx", 64 * 64).reshape(3, 64, 64)
    expected = np.stack([cv2.resize(image, (64, 64)) for image in IMAGES]).astype(np.float32)
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() > 0.98


def test_weights_of_tensorflow_js_are_read_with_their_scale_and_held_against_the_size(peers, tmp_path):
    values = np.arange(6, dtype=np.uint8)
    (tmp_path / "w.bin").write_bytes(np.float32([1.5, -2]).tobytes() + values.tobytes())
    entries = [
        {"name": "a", "shape": [2], "dtype": "float32"},
        {
            "name": "b",
            "shape": [2, 3],
            "dtype": "float32",
            "quantization": {"dtype": "uint8", "scale": 0.5, "min": -1.0},
        },
    ]
    found = peers.read_tensorflow_js([{"paths": ["w.bin"], "weights": entries}], tmp_path)
    assert found["a"].tolist() == [1.5, -2]
    assert found["b"].tolist() == [[-1, -0.5, 0], [0.5, 1, 1.5]]
    with pytest.raises(ValueError, match=r"found 14 bytes, expected 8"):
        peers.read_tensorflow_js([{"paths": ["w.bin"], "weights": entries[:1]}], tmp_path)


def test_every_peer_describes_a_network_under_its_own_name_of_which_seven_labels_count(peers):
    assert len({peer.name for peer in peers.PEERS}) == len(peers.PEERS)
    for peer in peers.PEERS:
        assert len(set(peer.labels) - set(peer.ignore)) == 7, peer.name
        assert all(f"--ignore {label}" in peer.words for label in peer.ignore)
        assert peer.file.endswith((".onnx", ".tflite"))
        json.dumps(peer.words)


def test_a_pickle_with_code_is_refused(peers, tmp_path):
    import pickle

    (tmp_path / "m.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match="print is not admitted"):
        peers.read_torch(tmp_path / "m.pkl")


def test_an_archive_of_torch_gives_its_tensors_as_they_lie(peers, tmp_path):
    pickled = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("  # a tensor: storage, offset, shape, stride
        b"S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI7\ntQ"
        b"I1\n(I2\nI3\nt(I1\nI2\ntI00\nNtR."
    )
    values = np.arange(7, dtype=np.float32)
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/data/0", values.tobytes())
    assert peers.read_torch(tmp_path / "m.pt").tolist() == [[1, 3, 5], [2, 4, 6]]


def make_module(peers, kind: str, parts: dict, **attributes):
    module = type(kind, (peers.Module,), {})()
    module.__setstate__({"_modules": parts, **attributes})
    return module


def make_convolution(peers, inputs: int, outputs: int, rng):
    """A 1 x 1 convolution, normalised, with SiLU, and the matrix and the shift that it amounts to."""
    kernel = rng.normal(size=(outputs, inputs)).astype(np.float32)
    weight, shift, mean, variance = rng.uniform(0.5, 1.5, (4, outputs)).astype(np.float32)
    plain = make_module(
        peers,
        "Conv2d",
        {},
        _parameters={"weight": kernel[..., None, None], "bias": None},
        padding=(0, 0),
        stride=(1, 1),
        groups=1,
    )
    normalised = make_module(
        peers,
        "BatchNorm2d",
        {},
        _parameters={"weight": weight, "bias": shift},
        _buffers={"running_mean": mean, "running_var": variance},
        eps=1e-3,
    )
    parts = {"conv": plain, "bn": normalised, "act": make_module(peers, "SiLU", {})}
    factor = weight / np.sqrt(variance + 1e-3)
    return make_module(peers, "Conv", parts), (kernel * factor[:, None], shift - mean * factor)


def test_a_bottleneck_adds_two_normalised_convolutions_to_its_input(peers, tmp_path):
    rng = np.random.default_rng(1)
    (first, one), (second, two) = make_convolution(peers, 1, 2, rng), make_convolution(peers, 2, 1, rng)
    graph = peers.Graph()
    scaled = graph.add("Div", "images", np.float32([255]))
    module = make_module(peers, "Bottleneck", {"cv1": first, "cv2": second}, add=True)
    found = run(graph, peers.add_module(graph, module, scaled), tmp_path / "m.onnx", 48 * 48)

    expected = given = IMAGES.reshape(3, 1, -1) / 255
    for matrix, shift in (one, two):
        linear = matrix @ expected + shift[:, None]
        expected = linear / (1 + np.exp(-linear))
    assert np.allclose(found, (given + expected)[:, 0], atol=1e-5)


def test_a_module_that_is_not_known_is_named(peers):
    with pytest.raises(ValueError, match="the module Swin is not known here"):
        peers.add_module(peers.Graph(), make_module(peers, "Swin", {}), "images")
