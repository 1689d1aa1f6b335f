"""The files beside an exported model (contract, card, example), and the comparison of the export with its artifact."""

from __future__ import annotations

import importlib.metadata
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from dlfer._version import __version__
from dlfer.data.bundle import Split
from dlfer.data.images import resize_all
from dlfer.errors import ExportError
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.paired import compare_paired, describe_difference
from dlfer.metrics.predictions import Predictions
from dlfer.runs.artifact import (
    Agreement,
    ExportAccuracy,
    ExportInput,
    ExportOutput,
    ExportRecord,
    ExportTemperature,
)
from dlfer.runs.records import INT8_FILES, Temperature
from dlfer.runs.text import round_up

_NAMES = {"ai_edge_litert.interpreter": "ai-edge-litert"}


def describe_input(
    size: tuple[int, int] | None, *, channels: int, network_size: int, aspect: str, faces: Mapping[str, Any] | None
) -> ExportInput:
    """Return the section `input` of export.json.

    Args:
        size: (H, W) of all images, or None if images of any size are accepted.
        channels: 1 (grey) or 3 (RGB).
        network_size: side in pixels of the square image that the network receives.
        aspect: how images that are not square become squares: "crop" or "pad".
        faces: the section `finetune.data.faces` that prepared the training images, or None.
    """
    seen = "the whole image, padded to a square" if aspect == "pad" else "the central square"
    if size is None:
        note = f"crops of faces, of any height and width; if a crop is not square, the network sees {seen}"
    else:
        fitted = "padded" if aspect == "pad" else "cropped around the centre"
        note = f"crops of faces, {fitted} and resized to this size first, both axes by the same factor"
        note += "" if size[0] == size[1] else f"; the network sees {seen} of it"
    note += "; everything else is done inside the model"
    if faces:
        note += ', except for the face preparation that "faces" describes, which training images had, too'
    return ExportInput(
        name="images",
        dtype="uint8",
        range=[0, 255],
        shape=[None, *(size or (None, None)), channels],
        channels="grey" if channels == 1 else "RGB",
        network_size=network_size,
        aspect=aspect,
        faces=None if faces is None else dict(faces),
        note=note,
    )


def describe_output(num_labels: int, *, is_quantised: bool) -> ExportOutput:
    """Return the section `output` of export.json."""
    note = "probabilities in the order of labels; rows sum to one"
    return ExportOutput(
        name="probabilities",
        dtype="float32",
        shape=[None, num_labels],
        note=note + (", except for rounding to steps of 1/256" if is_quantised else ""),
    )


def describe_temperature(fit: Temperature | None) -> ExportTemperature:
    """Return the section `temperature` of export.json: its value, which no export applies."""
    note = "probabilities are those of predict(images); calibrated ones are softmax(log(probabilities) / value)"
    return ExportTemperature(value=fit.value if fit else None, applied=False, note=note if fit else "none was fitted")


def list_packages(modules: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of the packages that made an export: dlfer, TensorFlow, Keras, and those of `modules`."""
    versions = {"dlfer": __version__}
    for name in ("tensorflow", "tensorflow-cpu", "keras", *(_NAMES.get(module, module) for module in modules)):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def render_example(template: str, record: ExportRecord) -> str:
    """Return the example script of a format, for the channels and the image size that an export accepts."""
    _, height, width, channels = record.input.shape
    fit = {"crop": "min", "pad": "max"}[record.input.aspect]
    text = resources.files("dlfer.export").joinpath("templates", f"{template}.py.txt").read_text(encoding="utf-8")
    return string.Template(text).substitute(
        mode="L" if channels == 1 else "RGB",
        grey="\n    image = tf.image.rgb_to_grayscale(image)" if channels == 1 else "",
        height=height,
        width=width,
        fit=fit,
        channels=channels,
    )


def render_card(card: str, record: ExportRecord, *, hub_name: str) -> str:
    """Return the artifact's model card, adapted to an export and with a section about it.

    `hub_name` is a model hub's name for the runtime.
    """
    card = re.sub(r"```python\n.*?```", "    python example.py face.jpg", card, count=1, flags=re.DOTALL)
    card = _correct_int8(card)
    card = re.sub(r"^library_name: .*$", f"library_name: {hub_name}", card, count=1, flags=re.MULTILINE)
    return card.rstrip() + "\n\n## This export\n\n" + "\n".join(f"- {line}" for line in describe_export(record)) + "\n"


INT8_BEGINNING = "The ONNX file, by which dlfer predicts, computes with eight bits"
"""The beginning of the paragraph of a shipped model's card about its int8 file, see `dlfer.export.ship`."""


def _correct_int8(card: str) -> str:
    """Replace the paragraphs of a card on an int8 file, which is not exported: exports are made from the Keras weights."""
    paragraphs = card.split("\n\n")
    about = next((text for text in paragraphs if text.startswith(INT8_BEGINNING)), None)
    if about is None:
        return card
    whose = (
        "the temperature, the threshold for abstaining and the time per face"
        if "on its own predictions" in about
        else "the time per face"
    )
    new = (
        "This export was made from the model's Keras weights, which are in float. The model's own ONNX file, by which dlfer "
        f"predicts, computes with eight bits and can give other labels; this card gives {whose} of that file."
    )
    kept = [new if text == about else text for text in paragraphs if not text.startswith(INT8_FILES[:40])]
    return "\n\n".join(kept)


def describe_export(record: ExportRecord) -> list[str]:
    """Return sentences about an export's input, its agreement with the artifact, and its loss of accuracy."""
    shape = ", ".join("any" if side is None else str(side) for side in record.input.shape)
    lines = [
        f"{record.format}: uint8 images [{shape}] ({record.input.channels}); {record.input.note}.",
        _describe_agreement(record.agreement),
    ]
    accuracy = record.agreement.accuracy
    if accuracy:
        lost = accuracy.difference
        lines.append(
            f"Accuracy on these images: the artifact {100 * accuracy.accuracy_a:.2f} %, the export "
            f"{100 * accuracy.accuracy_b:.2f} %; lost: {lost.value + 0.0:.2f} percentage points (95 % {lost.low:.2f} to "
            f"{lost.high:.2f}, paired, n = {accuracy.n:,})."
        )
    quantised = record.quantised
    if quantised:
        stayed = ", ".join(f"{number} {kind}" for kind, number in quantised.float_operations.items())
        lines.append(
            f"Weights and activations have eight bits, calibrated on {quantised.num_images:,} images "
            f"({quantised.images}). Computed in float32: {stayed or 'nothing'}."
        )
    temperature = record.temperature
    if temperature.value is not None:
        lines.append(f"The temperature ({temperature.value:.4g}) is not applied: {temperature.note}.")
    return lines


def _describe_agreement(agreement: Agreement) -> str:
    same, others = agreement.labels_agree, agreement.other_sizes
    text = (
        f"Compared with the artifact on {agreement.n:,} images ({agreement.images}): probabilities differ by at "
        f"most {round_up(agreement.largest_difference)}, on average by {agreement.mean_difference:.2g}; "
        f"{100 * same.value:.2f} % of the labels agree (95 % {100 * same.low:.2f} to {100 * same.high:.2f})."
    )
    if others:
        sizes = " and ".join(f"{height} x {width}" for height, width in others.sizes)
        text += f" At {sizes} pixels they differ by at most {round_up(others.largest_difference)}."
    return text


BATCH_SIZE = 32
NUM_OTHER_SIZES = 8
"""Number of images that are also compared at other sizes, for formats that accept images of any size."""


@dataclass(frozen=True)
class Limits:
    """The limits that an export must meet; otherwise it is refused.

    Attributes:
        difference: maximum difference of any probability, or None for no limit.
        agreement: minimum share of images with the same most probable label.
    """

    difference: float | None
    agreement: float


@dataclass(frozen=True)
class Sample:
    """The images on which exports are compared with the artifact, and those that calibrate int8 exports.

    Attributes:
        images: uint8 [N, H, W, channels], N at least 1.
        source: description of their origin.
        calibration: uint8 [M, H, W, channels], which determine the ranges of 8-bit activations.
        calibration_source: description of their origin.
        targets: int [N], indices of the classifier's labels; None if the labels are unknown.
        validation: the whole validation split of the run that trained the classifier; None if it is not here, or
            changed.
        is_drawn: whether the images are faces drawn by dlfer.
    """

    images: np.ndarray
    source: str
    calibration: np.ndarray
    calibration_source: str
    targets: np.ndarray | None = None
    validation: Split | None = None
    is_drawn: bool = False


def compare_export(
    expected: Callable[[np.ndarray], np.ndarray],
    answer: Callable[[np.ndarray], np.ndarray],
    sample: Sample,
    *,
    labels: tuple[str, ...],
    any_size: bool,
) -> Agreement:
    """Compare the probabilities of an export with those of its artifact.

    Args:
        expected: the artifact's prediction function, uint8 [N, H, W, channels] to float32 [N, number of labels].
        answer: the same of the export, loaded from its file.
        labels: labels of the columns.
        any_size: whether the export accepts images of any size, so that sizes other than the sample's are compared.

    Returns:
        The agreement; its values are fractions, except for the difference of accuracies in percentage points.
    """
    wanted, found = expected(sample.images), answer_in_batches(answer, sample.images)
    difference = np.abs(wanted.astype(np.float64) - found)
    same = int((wanted.argmax(axis=1) == found.argmax(axis=1)).sum())
    low, high = compute_wilson_interval(same, len(wanted))
    return Agreement.build(
        {
            "images": sample.source,
            "n": len(wanted),
            "size": list(sample.images.shape[1:3]),
            "largest_difference": float(difference.max()),
            "mean_difference": float(difference.mean()),
            "labels_agree": {"value": same / len(wanted), "low": low, "high": high},
            "other_sizes": _compare_other_sizes(expected, answer, sample.images) if any_size else None,
            "accuracy": None if sample.targets is None else _compare_accuracy(wanted, found, sample.targets, labels),
        }
    )


def check_agreement(name: str, agreement: Agreement, limits: Limits, *, advice: str = "Use another format.") -> None:
    """Raise ExportError if an export differs from its artifact by more than the limits."""
    others = agreement.other_sizes or agreement
    differences = [agreement.largest_difference, others.largest_difference]
    largest = float("nan") if None in differences else max(differences)
    same = agreement.labels_agree.value
    # Probabilities differ by at most 1, so 1 is no limit; a NaN fails the comparison even then.
    if largest <= (1.0 if limits.difference is None else limits.difference) and same >= limits.agreement:
        return
    wanted = [f"{100 * limits.agreement:g} % of the labels"]
    if limits.difference is not None:
        wanted.insert(0, f"a difference of at most {limits.difference:g}")
    raise ExportError(
        f"export to {name}: refused, nothing was written. On {agreement.n:,} images ({agreement.images}) the "
        f"probabilities differ by up to {largest:.3g} and "
        f"{100 * same:.1f} % of the labels agree; expected {' and '.join(wanted)}. {advice}"
    )


def answer_in_batches(answer: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """Return predictions, float32 [N, C], for images, uint8 [N, H, W, channels], in batches; N is at least 1."""
    return np.concatenate([answer(images[start : start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)])


def _compare_other_sizes(expected: Callable, answer: Callable, images: np.ndarray) -> dict[str, Any]:
    """Compare predictions for a few images, resized to a larger and a smaller size, neither of them square."""
    height, width = images.shape[1:3]
    sizes = [(2 * height + 1, 3 * width // 2), (max(8, height // 2), max(8, width // 3))]
    few = [resize_all(images[:NUM_OTHER_SIZES], size) for size in sizes]
    return {
        "sizes": [list(size) for size in sizes],
        "n": len(few[0]),
        "largest_difference": float(np.max([np.abs(expected(resized) - answer(resized)).max() for resized in few])),
    }


def _compare_accuracy(
    wanted: np.ndarray, found: np.ndarray, targets: np.ndarray, labels: tuple[str, ...]
) -> ExportAccuracy:
    """Return the paired comparison of accuracies; its difference is the export's loss in percentage points."""
    ids = np.arange(len(targets)).astype(str)
    # Rows of an int8 export's probabilities sum to one only up to the quantisation step.
    rows = found / np.maximum(found.sum(axis=1, keepdims=True), 1e-12)
    pair = [Predictions(ids, labels, targets, probabilities) for probabilities in (wanted, rows)]
    result = compare_paired(*pair, names=("the artifact", "the export"))
    return ExportAccuracy(**dict(result), sentence=describe_difference(result))
