"""An ONNX file with weights and activations of eight bits, by ONNX Runtime's static quantisation."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.export.graph import INPUT
from dlfer.predict.runtimes import import_extra

_IMAGES_AT_A_TIME = 25
_PRODUCTS = ("Conv", "MatMul", "Gemm")


def quantise_onnx(source: Path, target: Path, images: np.ndarray) -> dict[str, int]:
    """Write an ONNX file whose backbone computes with whole numbers of eight bits.

    Kernels have a scale for each output channel and 7 of the 8 bits, so that processors without VNNI, whose products of eight
    bits saturate, give the same answers; activations have one scale, from the least and the greatest value on the calibration
    images. What prepares the pixels, the last dense layer and what follows it stay in float32: they are a hundredth of the
    weights, and rounding there changes answers most.

    Args:
        source: an ONNX file of dlfer in float32.
        target: to write; it takes images of the same sizes.
        images: uint8 [M, H, W, channels], M at least 1, by which activations are calibrated.

    Returns:
        The kinds of products that stay in float32 in what is quantised otherwise, with their numbers: the last dense layers.
    """
    onnx, quantization = import_extra("onnx"), import_extra("onnxruntime.quantization")
    with tempfile.TemporaryDirectory(prefix="dlfer-") as place:
        prepared, quiet = Path(place) / "prepared.onnx", logging.getLogger()
        level = quiet.level
        quiet.setLevel(logging.ERROR)  # it advises what is done here
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                quantization.quant_pre_process(source, prepared, skip_symbolic_shape=True)
                model = onnx.load(prepared)
                before, last = find_float_nodes(model.graph)
                quantization.quantize_static(
                    prepared,
                    target,
                    _make_reader(quantization, images),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    reduce_range=True,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                    nodes_to_exclude=[node.name for node in (*before, *last)],
                )
        finally:
            quiet.setLevel(level)
    products = [node.op_type for node in last if node.op_type in _PRODUCTS]
    return {kind: products.count(kind) for kind in sorted(set(products))}


def find_float_nodes(graph: Any) -> tuple[list[Any], list[Any]]:
    """Return the nodes of a graph that stay in float32: those before the first convolution, and those from the last products on.

    A graph lists its nodes in the order in which they are computed.
    """
    behind: set[str] = set()
    before = []
    for node in graph.node:
        if node.op_type == "Conv" or behind.intersection(node.input):
            behind.update(node.output)
        else:
            before.append(node)
    ahead: set[str] = set()
    last = []
    for node in reversed(graph.node):
        leads_on = bool(ahead.intersection(node.output))
        if leads_on or node.op_type in _PRODUCTS:
            ahead.update(node.input)
        if not leads_on and (node.op_type != "Conv") and behind.intersection(node.output):
            last.append(node)
    return before, last


def _make_reader(quantization: Any, images: np.ndarray) -> Any:
    """Return what hands the calibration images to the quantiser, some at a time."""

    def iterate() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(images), _IMAGES_AT_A_TIME):
            yield {INPUT: np.ascontiguousarray(images[start : start + _IMAGES_AT_A_TIME])}

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iterate()

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    return Reader()
