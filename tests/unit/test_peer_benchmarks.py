"""benchmarks/peer_models.py: its resizes, and a network of each kind of file, against the rule written out."""

import importlib.util
import json
import sys
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


def test_every_peer_describes_a_network_of_seven_labels_under_its_own_name(peers):
    assert len({peer.name for peer in peers.PEERS}) == len(peers.PEERS)
    for peer in peers.PEERS:
        assert len(peer.labels) == 7, peer.name
        assert peer.file.endswith((".onnx", ".tflite"))
        json.dumps(peer.words)


def test_a_pickle_with_code_is_refused(peers, tmp_path):
    import pickle

    (tmp_path / "m.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match="print is not admitted"):
        peers.read_torch_tensors(tmp_path / "m.pkl")
