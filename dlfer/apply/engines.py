"""What computes the probabilities: Keras, or the runtime of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from dlfer.errors import UserError

ENGINES = ("keras", "onnx", "litert")


class Engine(Protocol):
    """What `FacePredictor` needs of a classifier; every `dlfer.model.classifier.Classifier` has it.

    Attributes:
        labels: in the order of the outputs.
        channels: of the images, 1 or 3.
        image_size: side in pixels of the square that the network sees.
        temperature_fit: {"value", "fitted_on", "n"} of the temperature, or None.
        about: what the artifact tells of the training.
    """

    labels: tuple[str, ...]
    channels: int
    image_size: int
    temperature_fit: dict | None
    about: Mapping[str, Any]

    def predict(self, images: np.ndarray, *, batch_size: int = 64, calibrated: bool = False) -> np.ndarray:
        """Return float32 [N, C] of uint8 [N, H, W, channels]."""
        ...


def load_engine(name: str, engine: str = "keras") -> Engine:
    """Load a classifier.

    Args:
        name: for keras a model's name, a run or an artifact's folder; else a folder that `dlfer export` wrote.
        engine: "keras", "onnx" or "litert".

    Raises:
        UserError: another engine.
        ModelError: no such model, or a damaged one.
        EnvironmentProblem: the engine's package is not installed.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: expected one of {', '.join(ENGINES)}.")
    from dlfer.model.artifact import load_artifact

    return load_artifact(name)
