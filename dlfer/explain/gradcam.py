"""Grad-CAM: the places in a network's feature map that are evidence for a label.

With A_k the channels of the map [h, w], y the label's logit, and w_k the mean of dy/dA_k over the map,

    L = max(0, sum_k w_k A_k).

If the head is global average pooling and one dense layer W, w_k is W_k / (h w), the map is the class activation map of
Zhou et al. (Learning Deep Features for Discriminative Localization, CVPR 2016), and its sum before clipping at 0 is the
logit minus its bias.

Source: Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-Based Localization, ICCV 2017.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from dlfer.data.augment import compute_crop_size
from dlfer.data.images import compute_side, match_channels
from dlfer.errors import EnvironmentProblem, ModelError
from dlfer.model.backbones import list_levels
from dlfer.model.classifier import Classifier, NetworkClassifier
from dlfer.model.face_input import compute_taps
from dlfer.model.families import EnsembleClassifier

Function = Callable[[list[Any]], Any]
Gradient = Callable[[list[Any], Any], list[Any]]


def build_gradient(function: Function) -> Callable[[Sequence[np.ndarray], np.ndarray], list[np.ndarray]]:
    """Return a function that computes the gradients of `function`'s weighted output sum with respect to its arguments.

    Args:
        function: maps a list of tensors to one tensor, using only Keras layers and `keras.ops`.

    Returns:
        (arguments, weights) -> float32 arrays of the arguments' shapes; the weights have the output's shape.

    Raises:
        EnvironmentProblem: the backend is neither tensorflow nor jax.
    """
    backend = keras.backend.backend()
    if backend not in _BUILDERS:
        raise EnvironmentProblem(
            f"Grad-CAM: the backend is {backend}, expected one of {', '.join(_BUILDERS)}, which compute gradients. "
            "Set KERAS_BACKEND=tensorflow (or jax), or use --method occlusion, which needs no gradients."
        )
    gradient = _BUILDERS[backend](function)

    def compute(values: Sequence[np.ndarray], weights: np.ndarray) -> list[np.ndarray]:
        tensors = [keras.ops.convert_to_tensor(value, "float32") for value in values]
        found = gradient(tensors, keras.ops.convert_to_tensor(weights, "float32"))
        return [keras.ops.convert_to_numpy(one) for one in found]

    return compute


def _build_tensorflow(function: Function) -> Gradient:
    import tensorflow as tf

    # A graph leaves out the unused gradients of the weights. In eager mode they are computed, too, and on a CPU
    # TensorFlow 2.21 crashes the process on that of a strided convolution (conv2d_backprop_filter).
    @tf.function(autograph=False)
    def gradient(tensors, weights):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tensors)
            total = tf.reduce_sum(function(tensors) * weights)
        return tape.gradient(total, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    return gradient


def _build_jax(function: Function) -> Gradient:
    import jax

    return jax.grad(lambda tensors, weights: keras.ops.sum(function(tensors) * weights))


_BUILDERS: dict[str, Callable[[Function], Gradient]] = {"tensorflow": _build_tensorflow, "jax": _build_jax}


BATCH_SIZE = 32
AUTO, LAST = "auto", "last"
FEWEST_CELLS = 7
"""Minimum number of cells per side of a map under "auto": with fewer, a cell is larger than an eye with its brow."""

_POOLING = (keras.layers.MaxPooling2D, keras.layers.AveragePooling2D)


@dataclass(frozen=True)
class Cam:
    """Grad-CAM of one image in one network.

    Attributes:
        network: "" for a classifier of one network; else the branch, or the ensemble member and its branch.
        layer: name of the layer whose output is the feature map.
        grid: (h, w) of that output, the actual resolution of the map.
        values: float32 [H, W], at least 0, of the image's size, interpolated bilinearly between the cells; 0 outside of
            the part of the image that the network sees. The unit is logits: if the head is global average pooling
            and one dense layer, the sum of the cells is at least the label's logit minus its bias.
    """

    network: str
    layer: str
    grid: tuple[int, int]
    values: np.ndarray

    @property
    def scaled(self) -> np.ndarray:
        """The map divided by its maximum, float32 [H, W] in 0..1; all 0 if there is no evidence for the label."""
        most = float(self.values.max())
        return self.values / most if most > 0 else self.values


class GradCam:
    """Grad-CAM for one classifier. Each instance adds to the graph of the classifier's networks, so reuse it.

    Args:
        classifier: with at least one network: family transfer, hybrid (a map for each branch), or an ensemble
            of these (a map for each member; members that predict with trees have none).
        feature_level: "auto", the deepest feature level with at least 7 x 7 cells, or the finest if none has them; "last",
            the final map (if a pooling layer ends the backbone, the map before it); or a number from 1, the last map of
            that feature level. Earlier levels are finer and depend less on the label.

    Raises:
        ModelError: no network, or no such feature level.
        EnvironmentProblem: a Keras backend for which gradients are not implemented here.

    Example:
        >>> [[cam]] = GradCam(classifier).compute(image[None], np.array([3]))
        >>> cam.values.shape == image.shape[:2]
        True
    """

    def __init__(self, classifier: Classifier, *, feature_level: str = AUTO) -> None:
        self._classifier = classifier
        self.views = [_build_view(name, network, feature_level) for name, network in list_networks(classifier)]
        if not self.views:
            raise ModelError(
                f"Grad-CAM needs gradients, and this model of family {classifier.family} "
                "predicts with trees, which have none. Use --method occlusion, which needs predictions only."
            )

    def compute(self, images: np.ndarray, targets: np.ndarray) -> list[tuple[Cam, ...]]:
        """Return the maps of each image, one for every network.

        Args:
            images: uint8 [N, H, W] or [N, H, W, 1 or 3].
            targets: int [N], index of the label to explain for each image.

        Raises:
            ModelError: the shape or dtype of the images is invalid, or a target is not a label's index.
        """
        labels = self._classifier.labels
        images, targets = match_channels(images, self._classifier.channels), np.asarray(targets)
        if targets.shape != (len(images),) or not np.isin(targets, range(len(labels))).all():
            raise ModelError(
                f"Grad-CAM: found targets {targets.tolist()} for {len(images)} images, expected one for each in "
                f"0..{len(labels) - 1}."
            )
        found: list[tuple[Cam, ...]] = []
        for start in range(0, len(images), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            names = [labels[target] for target in targets[rows]]
            of_views = [cams for view in self.views for cams in view.compute(images[rows], names)]
            found += list(zip(*of_views, strict=True))
        return found


def list_networks(classifier: Classifier, name: str = "") -> list[tuple[str, NetworkClassifier]]:
    """Return (name, network) of every network in a classifier that Grad-CAM can be computed for."""
    if isinstance(classifier, EnsembleClassifier):
        return [
            pair
            for member, inner in classifier.members.items()
            for pair in list_networks(inner, f"{name} {member}".strip())
        ]
    return [(name, classifier)] if isinstance(classifier, NetworkClassifier) else []


class _NetworkView:
    """A network that is split in two at the feature maps of Grad-CAM.

    Args:
        classifier: the classifier of the network.
        places: (title, layer) of each map.
        front: computes the maps from preprocessed pixels.
        back: computes logits [N, C] from the maps.
    """

    def __init__(
        self,
        classifier: NetworkClassifier,
        places: list[tuple[str, str]],
        *,
        front: Callable[[Any], list[Any]],
        back: Callable[[list[Any]], Any],
    ) -> None:
        self._classifier = classifier
        self._places = places
        self.front = front
        self.back = back
        self._gradient = build_gradient(back)

    def compute(self, images: np.ndarray, names: list[str]) -> Iterator[list[Cam]]:
        """Yield, for each feature map of the network, the Cams of all images; `names` are the labels to explain."""
        labels, parts = self._classifier.labels, self._classifier.parts
        images = match_channels(images, self._classifier.channels)
        chosen = np.eye(len(labels), dtype=np.float32)[[labels.index(name) for name in names]]
        maps = [
            keras.ops.convert_to_numpy(keras.ops.cast(values, "float32"))
            for values in self.front(parts.face_input(images))
        ]
        gradients = self._gradient(maps, chosen)
        for (title, layer), values, gradient in zip(self._places, maps, gradients, strict=True):
            cells = compute_cam(values, gradient)
            seen = {"crop": parts.face_input.crop, "aspect": parts.face_input.aspect}
            spread = upsample_cells(cells, images.shape[1:3], **seen)
            yield [Cam(title, layer, cells.shape[1:], one) for one in spread]


def compute_cam(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Return float32 [N, h, w]: the sum of float [N, h, w, K] over K, weighted by mean gradients and clipped at 0."""
    weights = gradients.mean(axis=(1, 2), keepdims=True)
    return np.maximum((maps * weights).sum(axis=-1), 0.0).astype(np.float32)


def upsample_cells(
    cells: np.ndarray, shape: tuple[int, int], *, crop: float | None, aspect: str = "crop"
) -> np.ndarray:
    """Return cells [N, h, w] bilinearly interpolated to maps of the image, float32 [N, H, W]; 0 where it is not seen.

    Args:
        cells: of the square that the network sees.
        shape: (H, W) of the image.
        crop: side of the central part of the square image that the network sees, in 0..1; None is all of it.
        aspect: how the image was made square, see `FaceInput`. Padding is left out of the maps.
    """
    square = compute_side(*shape, aspect)
    side = square if crop is None else compute_crop_size(crop, square, square)[0]
    down, across = (_compute_spread(size, side) for size in cells.shape[1:])
    seen = np.einsum("yi,nij,xj->nyx", down, cells, across)
    maps = np.zeros((len(cells), *shape), np.float32)
    in_image, in_seen = zip(*(_find_overlap(length, square, side) for length in shape), strict=True)
    maps[:, *in_image] = seen[:, *in_seen]
    return maps


def _find_overlap(length: int, square: int, side: int) -> tuple[slice, slice]:
    """Return the overlap of an image and the part that a network sees along one axis, as slices of both.

    Args:
        length: of the image along the axis.
        square: side of the square that the image was cropped or padded to, around the same centre.
        side: of the central part of the square that the network sees.
    """
    # The rounding is the same as in `make_square` and `crop_centre`.
    margin = (length - square) // 2 if length > square else -((square - length) // 2)
    start = margin + (square - side) // 2
    first, last = max(0, start), min(length, start + side)
    return slice(first, last), slice(first - start, last - start)


def _compute_spread(size: int, length: int) -> np.ndarray:
    """Return float32 [length, size], the weight of each cell in each pixel along one axis; rows sum to one."""
    places, taps = compute_taps(size, length)
    weights = np.zeros((length, size), np.float32)
    np.add.at(weights, (np.arange(length)[:, None], places), taps)
    return weights


def _build_view(name: str, classifier: NetworkClassifier, feature_level: str) -> _NetworkView:
    """Split a network at a feature level of its backbone, or of each branch."""
    parts, config = classifier.parts, classifier.config
    where = {"feature_level": feature_level, "image_size": parts.face_input.image_size}

    def answer(features: Any) -> Any:
        return parts.head(parts.pooling(features), training=False)

    if not config.branches:
        layer, front, back = _cut(parts.backbone, list_levels(config.backbone, config.feature_level), **where)
        return _NetworkView(
            classifier,
            [(name, layer)],
            front=lambda pixels: [front(pixels)],
            back=lambda maps: answer(back(maps[0])),
        )
    branches = config.name_branches()
    get = parts.backbone.get_layer
    cuts = [_cut(get(branch), list_levels(backbone), f"{branch}_", **where) for branch, backbone in branches.items()]
    prepare = [get(f"{branch}_input") for branch in branches]
    fuse = keras.Model([get(f"{branch}_pooling").input for branch in branches], parts.backbone.output)
    return _NetworkView(
        classifier,
        [(f"{name} {branch}".strip(), layer) for branch, (layer, _, _) in zip(branches, cuts, strict=True)],
        front=lambda pixels: [front(take(pixels)) for take, (_, front, _) in zip(prepare, cuts, strict=True)],
        back=lambda maps: answer(
            fuse([back(values) for values, (_, _, back) in zip(maps, cuts, strict=True)], training=False)
        ),
    )


_Cut = tuple[str, Callable[[Any], Any], Callable[[Any], Any]]


def _cut(
    network: keras.Model, names: Sequence[str], prefix: str = "", *, image_size: int, feature_level: str = AUTO
) -> _Cut:
    """Split a backbone at a feature level; return the layer's name and the networks before and after its output.

    Args:
        network: the backbone.
        names: of the layers that end its feature levels.
        prefix: of its layers' names.
        image_size: side of the network's input in pixels.
        feature_level: see `GradCam`.

    Raises:
        ModelError: no such feature level, or the output does not depend on it alone.
    """
    if feature_level == AUTO:
        return _cut_automatically(network, [_find_layer(network, prefix + name) for name in names], image_size)
    if feature_level == LAST:
        number = len(names)
    elif feature_level.isdecimal() and 1 <= int(feature_level) <= len(names):
        number = int(feature_level)
    else:
        raise ModelError(
            f'Grad-CAM: found the feature level {feature_level!r}, expected "auto", "last" or a number 1..{len(names)} '
            f"for this backbone: {', '.join(names)}."
        )
    name = prefix + names[number - 1]
    layer = _find_layer(network, name) if feature_level == LAST else network.get_layer(name)
    try:
        return _cut_at(network, layer)
    except ValueError as error:
        raise ModelError(
            f"Grad-CAM: feature level {feature_level} ({layer.name}) is on one of several parallel paths, so the "
            'output does not depend on it alone; choose another feature level, or "auto".'
        ) from error


def _cut_automatically(network: keras.Model, layers: Sequence[keras.layers.Layer], image_size: int) -> _Cut:
    """Split a backbone at the deepest of its feature levels that is fine enough, or else at the finest possible one."""
    shapes = keras.Model(network.inputs[0], [layer.output for layer in layers]).compute_output_shape(
        (1, image_size, image_size, 3)
    )
    fine = [min(shape[1:3]) >= FEWEST_CELLS for shape in shapes]
    deepest_first = list(reversed(range(len(layers))))
    order = [*(n for n in deepest_first if fine[n]), *(n for n in range(len(layers)) if not fine[n])]
    for number in order:
        # A level that other paths bypass cannot be split at; the last one always can.
        with contextlib.suppress(ValueError):
            return _cut_at(network, layers[number])
    return _cut_at(network, layers[-1])


def _cut_at(network: keras.Model, layer: keras.layers.Layer) -> _Cut:
    """Split a network at a layer.

    Raises:
        ValueError: from Keras, if the network's output does not depend on the layer's output alone.
    """
    front = keras.Model(network.inputs[0], layer.output)
    if layer.output is network.outputs[0]:
        return layer.name, lambda pixels: front(pixels, training=False), lambda maps: maps
    back = keras.Model(layer.output, network.outputs[0])
    return layer.name, lambda pixels: front(pixels, training=False), lambda maps: back(maps, training=False)


def _find_layer(network: keras.Model, name: str) -> keras.layers.Layer:
    """Return a layer or, if it is a pooling, the layer before it, whose map is a finer version of the same."""
    layer = network.get_layer(name)
    while isinstance(layer, _POOLING):
        layer = layer.input._keras_history.operation
    return layer
