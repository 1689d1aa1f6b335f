"""The ONNX file that a trained model carries in its artifact, by which it predicts without TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from dlfer.errors import DlferError, ExportError
from dlfer.export.contract import Limits, Sample, check_agreement, compare_export
from dlfer.export.exporters import EXACT, QUANTISED, write_onnx, write_onnx_int8
from dlfer.export.graph import FEATURES, OUTPUT, check_backend, check_exportable
from dlfer.export.images import gather_sample
from dlfer.model.boosted import BoostedClassifier
from dlfer.model.classifier import Classifier, NetworkClassifier
from dlfer.model.ensemble import EnsembleClassifier
from dlfer.predict.runtimes import combine_trees, import_extra, open_onnx
from dlfer.runs.records import OnnxRecord, QuantisedAccuracy

FILE = "network.onnx"

MIN_KERNEL = 20_000
"""Values from which a kernel of a shipped model is kept in float16. The small ones are a twentieth of the bytes, and are where
rounding changes most: with all kernels of EfficientNet-Lite2 in float16 probabilities change by up to 0.010, so by 0.0007."""

NUM_COMPARED = 256
"""Images by which the file is compared with Keras, at most."""

TREES = Limits(difference=None, agreement=0.99)
"""Of a boosted model. A split asks whether a feature is below a value that some training image has: where two runtimes round a
feature differently, an image in some hundred falls on the other side of one split, and its probabilities change a little."""

_HALF, _INT8 = "large kernels in float16", "int8, a scale for each output channel; the last dense layer in float32"


def write_embedded_onnx(
    classifier: Classifier, folder: Path, *, images: np.ndarray, source: str, halve: bool = False
) -> OnnxRecord | str:
    """Write `FILE` into an artifact's folder, after it was found to answer as Keras does.

    Args:
        classifier: that the artifact is of.
        folder: of the artifact.
        images: uint8 [N, H, W, channels] to compare on; the first `NUM_COMPARED` are used. Without any, faces are drawn.
        source: where they come from, in words.
        halve: keep large kernels in float16. The classifier's own have to be those of float16 already: the file then
            answers as it does, exactly but for rounding in float32.

    Returns:
        What artifact.json says of the file; or in one sentence why there is none: another backend than TensorFlow,
        trees in an ensemble, a package that is missing, or answers that differ by more than 1e-4 (of a boosted model: labels
        of which more than one in a hundred differ).
    """
    path, is_boosted = folder / FILE, isinstance(classifier, BoostedClassifier)
    halve = halve and not is_boosted
    try:
        check_backend()
        if not is_boosted:
            check_exportable(classifier)
        if not len(images):
            drawn = gather_sample(classifier, None, run=None, data=None, say=lambda text: None)
            images, source = drawn.images, drawn.source
        images = images[:NUM_COMPARED]
        about = write_onnx(classifier, path, size=None, sample=None)
        if halve:
            halve_kernels(path, list_kernels(classifier))
        sample = Sample(images, source, images[:1], source)
        answer = open_onnx(path)
        if is_boosted:
            answer = combine_trees(answer, classifier.scale, classifier.booster)
        agreement = compare_export(classifier.predict, answer, sample, labels=classifier.labels, any_size=True)
        check_agreement("onnx", agreement, TREES if is_boosted else EXACT)
    except DlferError as error:
        path.unlink(missing_ok=True)
        return f"{keras.backend.backend()}: {error}" if isinstance(error, ExportError) else str(error)
    return OnnxRecord(
        file=FILE,
        opset=about["opset"],
        output=FEATURES if is_boosted else OUTPUT,
        weights=_HALF if halve else "float32",
        images=source,
        n=agreement.n,
        largest_difference=max(agreement.largest_difference, agreement.other_sizes.largest_difference),
    )


def write_embedded_int8(classifier: Classifier, folder: Path, sample: Sample) -> OnnxRecord:
    """Write `FILE` into an artifact's folder with weights and activations of eight bits.

    Args:
        classifier: that the artifact is of.
        folder: of the artifact.
        sample: images to compare on and to calibrate by.

    Returns:
        What artifact.json says of the file: how far it answers as Keras does, and what it loses.

    Raises:
        EnvironmentProblem: another backend than TensorFlow, or a package is missing.
        ModelError: the model has trees.
        ExportError: fewer than 90 % of the labels agree.
    """
    check_exportable(classifier)
    path = folder / FILE
    try:
        about = write_onnx_int8(classifier, path, size=None, sample=sample)
        found = compare_export(classifier.predict, open_onnx(path), sample, labels=classifier.labels, any_size=True)
        check_agreement("int8", found, QUANTISED)
    except DlferError:
        path.unlink(missing_ok=True)
        raise
    pair = found.accuracy
    accuracy = None
    if pair is not None:
        lost = pair.difference
        accuracy = QuantisedAccuracy(
            n=pair.n,
            original=pair.accuracy_a,
            quantised=pair.accuracy_b,
            lost=lost.value,
            low=lost.low,
            high=lost.high,
        )
    quantised = about["quantised"]
    return OnnxRecord(
        file=FILE,
        opset=about["opset"],
        output=OUTPUT,
        weights=_INT8,
        images=sample.source,
        n=found.n,
        largest_difference=found.largest_difference,
        labels_agree=found.labels_agree.value,
        calibration=f"{quantised['num_images']:,} images ({quantised['images']})",
        accuracy=accuracy,
    )


def list_kernels(classifier: Classifier) -> list[np.ndarray]:
    """Return the kernels, float32, of at least `MIN_KERNEL` values, those of an ensemble's members included."""
    if isinstance(classifier, EnsembleClassifier):
        return [kernel for member in classifier.members.values() for kernel in list_kernels(member)]
    if not isinstance(classifier, NetworkClassifier):
        return []
    weights = (np.asarray(keras.ops.convert_to_numpy(weight.value)) for weight in classifier.network.weights)
    return [weight for weight in weights if weight.ndim >= 2 and weight.size >= MIN_KERNEL]


def halve_kernels(path: Path, kernels: Sequence[np.ndarray]) -> int:
    """Rewrite an ONNX file so that its large kernels are in float16; return how many are.

    The converter multiplies kernels by the scale of the BatchNorm behind them, so that the values in the file cannot be
    rounded again without another answer. Each is therefore written as kernel (float16) times scale (float32, one for each
    output channel), which runtimes multiply once, when they open the file.

    Args:
        path: of the file.
        kernels: of the network, in Keras' layout, with values of float16.
    """
    onnx = import_extra("onnx")
    model = onnx.load(path)
    graph, left, nodes = model.graph, list(kernels), []
    for tensor in [tensor for tensor in graph.initializer if np.prod(tensor.dims) >= MIN_KERNEL]:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32:
            continue
        for place, kernel in enumerate(left):
            found = factor_kernel(values, kernel)
            if found is not None:
                del left[place]
                break
        else:
            continue
        half, scale = found
        graph.initializer.remove(tensor)
        names = [f"{tensor.name}_{part}" for part in ("half", "scale", "whole")]
        graph.initializer.extend(
            [onnx.numpy_helper.from_array(half, names[0]), onnx.numpy_helper.from_array(scale, names[1])]
        )
        cast = onnx.helper.make_node("Cast", [names[0]], [names[2]], to=onnx.TensorProto.FLOAT)
        nodes += [cast, onnx.helper.make_node("Mul", [names[2], names[1]], [tensor.name])]
    for number, node in enumerate(nodes):
        graph.node.insert(number, node)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return len(nodes) // 2


def factor_kernel(values: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a tensor of an ONNX file as (float16 kernel, float32 scale), whose product it is; None if it is not of `kernel`.

    Args:
        values: float32, [out, in, h, w] of a convolution, [channels, 1, h, w] of a depthwise one, or [in, out] of a product.
        kernel: float32 in Keras' layout: [h, w, in, out], [h, w, channels, 1] or [in, out].
    """
    if values.ndim == 4 and kernel.ndim == 4:
        candidates = [(np.transpose(kernel, (3, 2, 0, 1)), (1, 2, 3)), (np.transpose(kernel, (2, 3, 0, 1)), (1, 2, 3))]
    else:
        candidates = [(kernel, (0,))]
    for candidate, axes in candidates:
        if candidate.shape != values.shape:
            continue
        half = np.ascontiguousarray(candidate).astype(np.float16)
        wide = half.astype(np.float64)
        norms = (wide**2).sum(axis=axes, keepdims=True)
        scale = np.divide(
            (wide * values).sum(axis=axes, keepdims=True), norms, where=norms > 0, out=np.ones_like(norms)
        )
        scale = scale.astype(np.float32)
        product = half.astype(np.float32) * scale
        if np.abs(product - values).max() <= 1e-6 * max(np.abs(values).max(), 1e-12):
            return half, scale
    return None
