"""One writer per export format: SavedModel, LiteRT in float32 and in eight bits, ONNX."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlfer.export.compare import Sample
from dlfer.export.graph import INPUT, OUTPUT, build_function
from dlfer.model.classifier import Classifier
from dlfer.predict.runtimes import import_extra


def write_savedmodel(classifier: Classifier, path: Path, *, size: tuple[int, int] | None, sample: Sample) -> dict:
    """Write a SavedModel with the signature `serving_default`.

    Args:
        classifier: a network, or an ensemble of such.
        path: the folder to make.
        size: (H, W) of all images; None leaves both free.
        sample: not used.

    Returns:
        Nothing to add to export.json.
    """
    import tensorflow as tf

    module, function = build_function(classifier, size=size)
    tf.saved_model.save(module, str(path), signatures={"serving_default": function})
    return {}


_EDGES = ("CAST", "QUANTIZE", "DEQUANTIZE")
"""What leads uint8 pixels into the eight-bit graph and its answer out: not computed in float, though float passes."""


def write_litert(classifier: Classifier, path: Path, *, size: tuple[int, int], sample: Sample) -> dict:
    """Write a LiteRT file in float32.

    Args:
        classifier: a network, or an ensemble of such.
        path: the file to write.
        size: (H, W) of all images.
        sample: not used.

    Returns:
        Nothing to add to export.json.
    """
    converter, _module = _make_converter(classifier, size)
    path.write_bytes(converter.convert())
    return {}


def write_litert_int8(classifier: Classifier, path: Path, *, size: tuple[int, int], sample: Sample) -> dict:
    """Write a LiteRT file whose weights and activations are whole numbers of eight bits.

    Args:
        classifier: a network, or an ensemble of such.
        path: the file to write.
        size: (H, W) of all images.
        sample: whose `calibration`, of that size, gives the range of each activation.

    Returns:
        {"quantised": {"num_images", "images", "float_operations": kinds that stayed in float32, and how many}}.
    """
    import tensorflow as tf

    def iterate_images() -> Iterator[list[np.ndarray]]:
        for row in range(len(sample.calibration)):
            yield [sample.calibration[row : row + 1]]

    converter, _module = _make_converter(classifier, size)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = iterate_images
    path.write_bytes(converter.convert())
    return {
        "quantised": {
            "num_images": len(sample.calibration),
            "images": sample.calibration_source,
            "float_operations": list_float_operations(path),
        }
    }


def list_float_operations(path: Path) -> dict[str, int]:
    """Return the kinds of operations of a LiteRT file that compute float32, with their numbers."""
    litert = import_extra("ai_edge_litert.interpreter")
    # The delegate would hide all that it computes.
    plain = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(model_path=str(path), experimental_op_resolver_type=plain)
    interpreter.allocate_tensors()
    is_float = {tensor["index"] for tensor in interpreter.get_tensor_details() if tensor["dtype"] is np.float32}
    found: dict[str, int] = {}
    for operation in interpreter._get_ops_details():
        if operation["op_name"] not in _EDGES and is_float.intersection(operation["outputs"]):
            found[operation["op_name"]] = found.get(operation["op_name"], 0) + 1
    return found


def _make_converter(classifier: Classifier, size: tuple[int, int]):
    """Return TensorFlow's converter, and the module that must live as long as it."""
    import tensorflow as tf

    module, function = build_function(classifier, size=size)
    return tf.lite.TFLiteConverter.from_concrete_functions([function], module), module


OPSET = 17
"""Of 2022, so that runtimes since ONNX Runtime 1.12 read it; nothing newer is needed."""


def write_onnx(classifier: Classifier, path: Path, *, size: tuple[int, int] | None, sample: Sample) -> dict:
    """Write an ONNX file, by tf2onnx: what Keras' own export writes does not run.

    Args:
        classifier: a network, or an ensemble of such.
        path: the file to write.
        size: (H, W) of all images; None leaves both free.
        sample: not used.

    Returns:
        {"opset"}.

    Raises:
        EnvironmentProblem: tf2onnx is not installed.
    """
    tf2onnx = import_extra("tf2onnx")
    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    module, _ = build_function(classifier, size=size)
    signature = module.predict.input_signature
    model, _ = tf2onnx.convert.from_function(module.predict, input_signature=signature, opset=OPSET)
    names = {INPUT: ("N", "H", "W"), OUTPUT: ("N",)}
    for tensor in (*model.graph.input, *model.graph.output):
        # tf2onnx numbers what is free; names say that the N of both is one.
        for dimension, name in zip(tensor.type.tensor_type.shape.dim, names[tensor.name], strict=False):
            if not dimension.HasField("dim_value"):
                dimension.dim_param = name
    path.write_bytes(model.SerializeToString())
    return {"opset": OPSET}
