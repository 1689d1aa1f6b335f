"""The stations of an image on its way into a network: resized, grey, black and white, first and last features."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np

from dlfer.data.images import to_channels
from dlfer.model.backbones import find_backbone
from dlfer.model.network_classifier import NetworkClassifier


@dataclass(frozen=True)
class Preparation:
    """The stations of N images.

    Attributes:
        resized: uint8 [N, S, S, C], at the size that the network sees.
        grey: uint8 [N, S, S].
        binary: bool [N, S, S], brighter than Otsu's threshold; shown for comparison, no network is given it.
        features: (what it is, float32 [N, h, w]) of feature maps, the mean of the magnitudes over all channels.
    """

    resized: np.ndarray
    grey: np.ndarray
    binary: np.ndarray
    features: tuple[tuple[str, np.ndarray], ...]


def compute_preparation(classifier: NetworkClassifier, images: np.ndarray) -> Preparation:
    """Return what becomes of uint8 images [N, H, W, channels] before and in a classifier's network."""
    face_input = classifier.parts.face_input
    resized = keras.ops.convert_to_numpy(face_input.resize(images)).round().clip(0, 255).astype(np.uint8)
    grey = np.stack([to_channels(image, 1)[..., 0] for image in resized])
    binary = np.stack([image > compute_otsu_threshold(image) for image in grey])
    return Preparation(resized, grey, binary, tuple(_compute_features(classifier, images)))


def compute_otsu_threshold(grey: np.ndarray) -> int:
    """Return the grey level that divides the pixels of uint8 [H, W] best into dark (up to it) and bright ones.

    Best is what leaves the greatest variance between the two; the lowest such level if several do.

    Source: Otsu, A Threshold Selection Method from Gray-Level Histograms, IEEE Trans. SMC 9 (1979) 62.
    """
    shares = np.bincount(grey.ravel(), minlength=256) / grey.size
    dark = np.cumsum(shares)
    mean = np.cumsum(shares * np.arange(256))
    spread = dark * (1 - dark)
    between = np.divide((mean[-1] * dark - mean) ** 2, spread, out=np.zeros(256), where=spread > 1e-12)
    return int(between.argmax())


def _compute_features(classifier: NetworkClassifier, images: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return the first and the last feature map of the backbone, or of each branch."""
    parts, config = classifier.parts, classifier.config
    found = []
    for branch, name, network, prepared in _list_networks(classifier, parts.face_input(images)):
        # The first map in half the resolution or full, and the one that is pooled.
        first = network.get_layer(
            f"{branch}_{find_backbone(name).stages[0]}" if branch else find_backbone(name).stages[0]
        )
        maps = keras.Model(network.inputs, [first.output, network.outputs[0]])(prepared, training=False)
        for which, values in zip(("first", "last"), maps, strict=True):
            title = f"{name} {which}" if config.branches else f"{which} features"
            magnitudes = keras.ops.mean(keras.ops.abs(keras.ops.cast(values, "float32")), axis=-1)
            found.append((title, keras.ops.convert_to_numpy(magnitudes)))
    return found


def _list_networks(classifier: NetworkClassifier, pixels):
    """Return (prefix of its layers, backbone, network, its input) of the one network or of each branch."""
    from dlfer.model.hybrid import name_branches

    backbone, config = classifier.parts.backbone, classifier.config
    if not config.branches:
        return [("", config.backbone, backbone, pixels)]
    return [
        (branch, name, backbone.get_layer(branch), backbone.get_layer(f"{branch}_input")(pixels))
        for branch, name in name_branches(config.branches).items()
    ]
