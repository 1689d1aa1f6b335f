"""What computes the probabilities: Keras, or the runtime of an exported model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from dlfer.data.images import make_square, resize_all
from dlfer.errors import ModelError, UserError
from dlfer.metrics.calibration import apply_temperature
from dlfer.predict.export_folder import EXPORT_FILE, read_export
from dlfer.predict.runtimes import open_export
from dlfer.runs.records import About, Temperature

ENGINES = ("keras", "onnx", "openvino", "litert")
AUTO = "auto"
"""The engine that `dlfer.predict.choose_engine` chooses."""


class Engine(Protocol):
    """What `FacePredictor` needs of a classifier; every `dlfer.model.classifier.Classifier` has it.

    Attributes:
        labels: in the order of the outputs.
        channels: of the images, 1 or 3.
        image_size: side in pixels of the square that the network sees.
        aspect: how it makes squares of images that are not, see `dlfer.data.images.make_square`.
        temperature_fit: the temperature and what it was fitted on, or None.
        about: what the artifact tells of the training.
    """

    labels: tuple[str, ...]
    channels: int
    image_size: int
    aspect: str
    temperature_fit: Temperature | None
    about: About

    def predict(self, images: np.ndarray, *, batch_size: int = 64, calibrated: bool = False) -> np.ndarray:
        """Return float32 [N, C] of uint8 [N, H, W, channels]."""
        ...


def load_engine(name: str, engine: str = "keras") -> Engine:
    """Load a classifier.

    Args:
        name: for keras a model's name, a run or an artifact's folder; else a folder that `dlfer export` wrote.
        engine: one of ENGINES; onnx is ONNX Runtime, openvino reads the same files.

    Raises:
        UserError: another engine.
        ModelError: no such model, or a damaged one.
        EnvironmentProblem: the engine's package is not installed.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: expected one of {', '.join((*ENGINES, AUTO))}.")
    if engine == "keras":
        from dlfer.model.artifact import load_artifact

        return load_artifact(name)
    return ExportedModel(find_export(name, engine), runtime="openvino" if engine == "openvino" else None)


class ExportedModel:
    """An exported model, computed by its own runtime; TensorFlow is not loaded.

    Args:
        folder: that `dlfer export` wrote, of one format.
        runtime: that computes it; None: the format's own.

    Raises:
        ModelError: no export, or a changed one.
        EnvironmentProblem: the runtime is not installed.
    """

    def __init__(self, folder: Path, *, runtime: str | None = None) -> None:
        record = read_export(folder)
        given, temperature = record.input, record.temperature
        self.labels: tuple[str, ...] = tuple(record.labels)
        self.channels: int = given.shape[-1]
        self.image_size: int = given.network_size
        self.aspect: str = given.aspect
        self.temperature_fit = Temperature(value=temperature.value) if temperature.value else None
        height, width = given.shape[1:3]
        self._size: tuple[int, int] | None = (height, width) if height and width else None
        trained = record.about.trained or About()
        # A model of one size takes crops of that size, which is that of the training images.
        size = min(self._size) if self._size else trained.face_size
        self.about = trained.model_copy(update={"faces": given.faces, "face_size": size})
        self._answer = open_export(folder, runtime=runtime)

    @property
    def takes_any_size(self) -> bool:
        """Whether images of any size can go into the model; else they are resized to its own before."""
        return self._size is None

    def predict(self, images: np.ndarray, *, batch_size: int = 64, calibrated: bool = False) -> np.ndarray:
        """Return float32 [N, C] of uint8 [N, H, W, channels]; rows sum to one."""
        if not len(images):
            return np.zeros((0, len(self.labels)), np.float32)
        # A model of free size whose export.json says no aspect is an old one, which scales the two axes differently.
        fit = make_square if self._size is None else partial(resize_all, size=self._size)
        images = fit(images, aspect=self.aspect)
        answers = [
            np.asarray(self._answer(np.ascontiguousarray(images[start : start + batch_size])), np.float32)
            for start in range(0, len(images), batch_size)
        ]
        raw = np.concatenate(answers)
        raw /= np.maximum(raw.sum(axis=1, keepdims=True), 1e-12)
        if not calibrated or self.temperature_fit is None:
            return raw
        return apply_temperature(raw, self.temperature_fit.value).astype(np.float32)


def find_export(name: str, engine: str) -> Path:
    """Return the folder of an export for an engine: `name` itself, or the format's folder in it.

    Raises:
        ModelError: none is there, or it is of another format.
    """
    formats = {"onnx": ("onnx",), "openvino": ("onnx",), "litert": ("litert", "litert-int8")}[engine]
    places = [Path(name).expanduser(), *(Path(name).expanduser() / form for form in formats)]
    for place in places:
        if (place / EXPORT_FILE).is_file():
            found = read_export(place).format
            if found not in formats:
                raise ModelError(f"{place}: its format is {found}, expected {' or '.join(formats)} for {engine}.")
            return place
    raise ModelError(
        f"{name}: holds no export for --engine {engine} (looked for {EXPORT_FILE} in "
        f"{', '.join(str(place) for place in places)}). Make one: dlfer export MODEL --to {formats[0]}."
    )
