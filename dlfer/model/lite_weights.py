"""ImageNet weights of EfficientNet-Lite2, which come with dlfer; where they are from stands in weights/README.md."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlfer.errors import ModelError
from dlfer.model.weights_file import load_weights

if TYPE_CHECKING:
    import keras

IMAGENET_VARIANT = "lite2"
IMAGENET_FILE = Path(__file__).parent / "weights" / f"efficientnet_{IMAGENET_VARIANT}.weights.h5"
FILE_SHA256 = "1f102629125dada1f156575eac3c2da3d77f197c18c404c1dc9ca33572753228"
WEIGHTS_SHA256 = "ffc8eed3ea058a8cc30dd8ff8751eafbc408702955e0f917ef283116ae2a71da"
"""Of names, shapes and float32 values of the weights in the network, by `compute_digest`."""


def load_lite_weights(variant: str, backbone: keras.Model, weights_file: str | None = None) -> None:
    """Set the weights of an EfficientNet-Lite: the ImageNet weights that come with dlfer, or those of a file.

    Args:
        variant: a key of VARIANTS; the ImageNet weights are those of lite2.
        backbone: what `build_efficientnet_lite` gave.
        weights_file: a .weights.h5, .h5 or .keras of the backbone alone; None takes the ImageNet weights.

    Raises:
        ModelError: the variant has no ImageNet weights, or the file is missing, damaged or of another network.
    """
    if weights_file is not None:
        _load_file(variant, backbone, weights_file)
    elif variant != IMAGENET_VARIANT:
        raise ModelError(
            f"pretrain.weights: found imagenet, but of EfficientNet-Lite the ImageNet weights of {IMAGENET_VARIANT} alone come "
            f"with dlfer, not those of {variant}. Set model.backbone: efficientnet_{IMAGENET_VARIANT}; or name a .weights.h5 of "
            f"efficientnet_{variant} as pretrain.weights_file; or leave pretrain.weights null to train EF-FER1."
        )
    else:
        load_imagenet_weights(backbone)


def load_imagenet_weights(backbone: keras.Model, file: Path = IMAGENET_FILE) -> None:
    """Set the ImageNet weights of EfficientNet-Lite2 and compare every name, shape and value with the released ones.

    Args:
        backbone: what `build_efficientnet_lite("lite2", ...)` gave; unchanged if the file is not the released one.
        file: the released file.

    Raises:
        ModelError: the file is missing, damaged or altered, or its weights did not reach the layers of their names.
    """
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(
            f"{file}: expected the ImageNet weights that come with dlfer: {error}. Install dlfer again."
        ) from error
    if found != FILE_SHA256:
        raise ModelError(
            f"{file}: found the sha256 {found}, expected {FILE_SHA256}. The ImageNet weights that come with dlfer are damaged "
            "or were altered; install dlfer again."
        )
    load_weights(backbone, file)
    digest = compute_digest(backbone)
    if digest != WEIGHTS_SHA256:
        raise ModelError(
            f"{file}: its weights did not reach the layers of their names (sha256 {digest}, expected {WEIGHTS_SHA256}). This "
            "version of Keras reads the file in another order; install the versions of requirements.txt."
        )


def compute_digest(backbone: keras.Model) -> str:
    """Return the SHA-256 (hex) of the weights: "layer/weight", shape and little-endian float32 values of each, by name."""
    weights = {f"{layer.name}/{weight.name}": weight for layer in backbone.layers for weight in layer.weights}
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {tuple(map(int, weights[name].shape))}".encode())
        digest.update(np.ascontiguousarray(weights[name], dtype="<f4").tobytes())
    return digest.hexdigest()


def _load_file(variant: str, backbone: keras.Model, weights_file: str) -> None:
    try:
        load_weights(backbone, weights_file)
    except ModelError as error:
        raise ModelError(
            f"pretrain.weights_file {error} Expected the weights of efficientnet_{variant} without top, e.g. the "
            "backbone.weights.h5 of a run. PyTorch's .pth is not read; the ImageNet weights of "
            f"efficientnet_{IMAGENET_VARIANT} come with dlfer and need no file."
        ) from error
