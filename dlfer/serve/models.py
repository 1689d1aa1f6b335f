"""The models that are served, their descriptions, and their tensors in the KServe protocol, version 2, in JSON.

Source of the protocol (the Open Inference Protocol):
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from dlfer.config.schema import OptimizerConfig
from dlfer.config.sections import FacesConfig
from dlfer.data.images import MIN_SIDE, resize_square, to_channels
from dlfer.data.pictures import predict_by_size
from dlfer.errors import UserError
from dlfer.metrics.intervals import compute_proportion
from dlfer.predict.crops import Crop, build_cropper
from dlfer.predict.engines import Engine, get_crop_size
from dlfer.report.headline import name_judged_split
from dlfer.report.page import try_experiment
from dlfer.runs.metrics_record import Estimate, Metrics
from dlfer.runs.records import About, ArtifactRecord, DataRecord, OnnxRecord, Temperature
from dlfer.runs.run import RUN_FILE
from dlfer.runs.run_records import read_metrics
from dlfer.serve.limits import Limits, Refusal
from dlfer.serve.schemas import (
    Card,
    Figure,
    InferRequest,
    InferResponse,
    ModelDescription,
    OutputTensor,
    Tensor,
    TensorDescription,
)


class ServedModel:
    """A served classifier with its croppers, whose network receives images of at most two sizes.

    Keras compiles a program for each image size and keeps it; clients must not determine how many there are.

    Args:
        name: name of the model in requests.
        classifier: from `load_engine`.
        card: description of the model.
        croppers: "auto" and "whole", or only "whole" -> the function that returns the faces, see `build_cropper`.
    """

    def __init__(
        self,
        name: str,
        classifier: Engine,
        *,
        card: Card,
        croppers: Mapping[str, Callable[[Sequence[np.ndarray]], list[list[Crop]]]],
    ) -> None:
        self.name = name
        self.card = card
        self.labels = tuple(classifier.labels)
        self.channels = classifier.channels
        # Sides of crops from clients and of detected faces, as in `build_cropper`.
        self.size = int(classifier.about.face_size or classifier.image_size)
        self._cut_shape = (get_crop_size(classifier),) * 2
        self._classifier = classifier
        self._croppers = dict(croppers)

    def crop(self, images: Sequence[np.ndarray], faces: str) -> list[list[Crop]]:
        """Return the faces in each of several uint8 [H, W, 3] pictures, the largest first.

        Raises:
            UserError: the model has no cropper for this value of `faces`.
        """
        if faces not in self._croppers:
            raise UserError(f"faces: found {faces!r}, expected one of {', '.join(self._croppers)}.")
        found: list[list[Crop]] = []
        for few in _share_out(images):
            found += self._croppers[faces](few)
        return found

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Convert a crop, uint8 [H, W, 1 or 3], to the model's size and number of channels, uint8 [S, S, channels]."""
        return resize_square(to_channels(image, self.channels), self.size, self._classifier.aspect)

    def predict(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        """Return probabilities float32 [N, C] of N crops, calibrated if the model has a temperature."""
        fitted = [crop if crop.shape[:2] == self._cut_shape else self.fit(crop) for crop in crops]
        return predict_by_size(
            partial(self._classifier.predict, batch_size=AT_ONCE, calibrated=True), fitted, len(self.labels)
        )


AT_ONCE = 20
"""Batch size of the network. With 32 the default model takes 50 MB more, and the server answers 10 % more requests."""

DETECTED_AT_ONCE, _DETECTED_SIDE = 1, 640
"""Number of pictures of this side, or of smaller ones with as many pixels in total, per call of the detector:
CenterFace takes 75 MB for each, which ONNX Runtime does not release."""


def _share_out(images: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yield the images in order, in groups that `DETECTED_AT_ONCE` limits."""
    few: list[np.ndarray] = []
    pixels = 0
    for image in images:
        size = min(image.shape[0] * image.shape[1], _DETECTED_SIDE**2)
        if few and pixels + size > DETECTED_AT_ONCE * _DETECTED_SIDE**2:
            yield few
            few, pixels = [], 0
        few.append(image)
        pixels += size
    if few:
        yield few


def build_model(
    name: str, classifier: Engine, *, folder: Path, faces: str = "auto", detector_size: int | None = None
) -> ServedModel:
    """Return a model ready to be served.

    Args:
        name: name of the model in requests.
        classifier: from `load_engine`.
        folder: of its artifact.
        faces: "auto", "centerface", "mtcnn", "opencv", or "whole", which disables detection.
        detector_size: see `build_cropper`.

    Raises:
        UserError, EnvironmentProblem: see `build_cropper`.
    """
    croppers = {"whole": build_cropper("whole", classifier)}
    if faces != "whole":
        croppers["auto"] = build_cropper(faces, classifier, detector_size=detector_size)
    return ServedModel(name, classifier, card=read_card(name, classifier, folder), croppers=croppers)


def read_card(name: str, classifier: Engine, folder: Path) -> Card:
    """Return the description of a model, from its artifact and the run that it belongs to."""
    about, fit = classifier.about, classifier.temperature_fit
    run = folder.parent if (folder.parent / RUN_FILE).is_file() else folder
    record = ArtifactRecord.read(folder)
    config, _ = try_experiment(run)
    metrics, data = read_metrics(run) or Metrics(), DataRecord.read(run)
    return Card(
        name=name,
        family=record.family if record else "unknown",
        labels=list(classifier.labels),
        backbone=(record.backbone or "").replace(", ", " + ") or None if record else None,
        optimizer=_describe_optimizer(config.finetune.optimizer) if config else None,
        accuracy=_read_accuracy(metrics, data, record.onnx if record else None),
        protocol=about.protocol or metrics.protocol,
        banner=metrics.banner,
        image_size=classifier.image_size,
        preparation=_describe_preparation(classifier),
        probabilities=(f"calibrated: temperature {fit.value:.3f}{_describe_fit(fit)}" if fit else "not calibrated"),
        research_only=about.research_only is not False,
        smoke=about.smoke,
    )


_NAME_LENGTH = 100


def choose_names(given: Sequence[tuple[str | None, Path, About]]) -> list[str]:
    """Return a unique name for each of several models, given as (name or None, folder of the artifact, its record).

    The default is the name in the record, that of the experiment or that of the folder, with "-" in place of characters
    that URL paths and log lines cannot contain; the second model of a name ends in -2.

    Raises:
        UserError: the same name was given twice.
    """
    named = [name for name, _, _ in given if name]
    check_names(named)
    names: list[str] = []
    for name, folder, about in given:
        stem = name or about.name or about.experiment or (folder.parent.name if folder.name == "model" else folder.name)
        stem = re.sub(r"[^\w.-]+", "-", stem)[:_NAME_LENGTH].strip("-.") or "model"
        taken, number, chosen = {*names, *(named if not name else ())}, 1, stem
        while chosen in taken:
            number += 1
            chosen = f"{stem}-{number}"
        names.append(chosen)
    return names


def check_names(named: Sequence[str]) -> None:
    """Raise UserError if a name was given to several models."""
    for name in named:
        if named.count(name) > 1:
            raise UserError(
                f"dlfer serve: the name {name} is given to {named.count(name)} models; expected another for each: NAME=MODEL."
            )


def _describe_optimizer(config: OptimizerConfig) -> str:
    """Return the optimiser with its rate and momentum, which distinguish models that differ only in the optimiser."""
    momentum = f" with momentum {config.momentum:g}" if config.momentum else ""
    return f"{config.name}{momentum}, rate {config.learning_rate:g}"


def _describe_preparation(classifier: Engine) -> str:
    """Describe how `build_cropper` prepares a face, and how the network resizes it."""
    about, size = classifier.about, get_crop_size(classifier)
    trained = FacesConfig.model_validate(about.faces) if about.faces else None
    words = ["aligned by the eyes" if trained is not None and trained.align else "cut out as a square"]
    words.append("grey" if classifier.channels == 1 else "in colour")
    if trained is not None and trained.equalize != "none":
        words.append("equalised" if trained.equalize == "histogram" else "equalised in tiles")
    words.append(f"{size} × {size} pixels")
    if size != classifier.image_size:
        words.append(f"which the network resizes to {classifier.image_size} × {classifier.image_size}")
    return ", ".join(words)


def _describe_fit(fit: Temperature) -> str:
    return "" if fit.fitted_on is None or fit.n is None else f", fitted on {fit.fitted_on} (n = {fit.n:,})"


def _read_accuracy(metrics: Metrics, data: DataRecord | None, onnx: OnnxRecord | None) -> Figure | None:
    """Return the accuracy on the evaluated split; of a model with int8 weights, that with these weights where it was measured."""
    judged = metrics.judged
    if judged is None or judged.accuracy.value is None:
        return None
    accuracy = judged.accuracy
    quantised = onnx.accuracy if onnx else None
    if quantised is not None and quantised.n == judged.n:
        accuracy = Estimate(**compute_proportion(round(quantised.quantised * judged.n), judged.n))
    return Figure(
        value=accuracy.value, low=accuracy.low, high=accuracy.high, n=judged.n, what=name_judged_split(metrics, data)
    )


OUTPUTS = ("probabilities", "labels")
VERSIONS = ("1",)


def describe_tensors(model: ServedModel) -> ModelDescription:
    """Return the description of a model's input and output tensors."""
    return ModelDescription(
        name=model.name,
        versions=list(VERSIONS),
        platform="keras_dlfer",
        inputs=[TensorDescription(name="images", datatype="UINT8", shape=[-1, -1, -1, model.channels])],
        outputs=[
            TensorDescription(name="probabilities", datatype="FP32", shape=[-1, len(model.labels)]),
            TensorDescription(name="labels", datatype="BYTES", shape=[-1]),
        ],
        parameters=model.card,
    )


def check_tensor(tensor: Tensor, limits: Limits) -> list[int]:
    """Return the shape [N, H, W, 1 or 3] of a tensor after checking it against the limits; its values are not read.

    Raises:
        Refusal: 400 for another shape or a side below `MIN_SIDE`, 413 for too many images or pixels.
    """
    shape = tensor.shape if len(tensor.shape) == 4 else [*tensor.shape, 1]
    if shape[-1] not in (1, 3):
        raise Refusal(400, f"images: found the shape {tensor.shape}, expected [N, H, W], [N, H, W, 1] or [N, H, W, 3].")
    if shape[0] > limits.images_in_tensor or prod(shape[:3]) > limits.pixels:
        raise Refusal(
            413,
            f"images: found the shape {tensor.shape}, expected at most {limits.images_in_tensor} images "
            f"and {limits.pixels:,} pixels.",
        )
    if min(shape[1:3]) < MIN_SIDE:
        raise Refusal(400, f"images: found the shape {tensor.shape}, expected at least {MIN_SIDE} pixels on each side.")
    return shape


def write_answer(asked: InferRequest, model: ServedModel, probabilities: np.ndarray) -> InferResponse:
    """Return the response with the requested outputs, or all outputs if the request does not name any."""
    names = OUTPUTS if asked.outputs is None else [output.name for output in asked.outputs]
    made = {
        "probabilities": OutputTensor(
            name="probabilities",
            shape=list(probabilities.shape),
            datatype="FP32",
            data=[float(value) for value in probabilities.ravel()],
        ),
        "labels": OutputTensor(
            name="labels",
            shape=[len(probabilities)],
            datatype="BYTES",
            data=[model.labels[best] for best in probabilities.argmax(axis=1)],
        ),
    }
    return InferResponse(model_name=model.name, id=asked.id, outputs=[made[name] for name in dict.fromkeys(names)])
