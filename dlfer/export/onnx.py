"""A classifier as an ONNX file."""

from __future__ import annotations

import logging
from pathlib import Path

from dlfer.export.compare import Sample
from dlfer.export.graph import INPUT, OUTPUT, build_function
from dlfer.model.classifier import Classifier
from dlfer.predict.runtimes import import_extra

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
