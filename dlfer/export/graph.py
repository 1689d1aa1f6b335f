"""Conversion of a classifier to one self-contained TensorFlow function from uint8 images to probabilities.

Resizing is done by two matrix products. `ops.image.resize` with antialiasing cannot be converted to ONNX for images
of any size, and gathering single lines, as the network does in training, loses a bit at each step when it is
quantised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import numpy as np

from dlfer.errors import EnvironmentProblem, ModelError
from dlfer.metrics.predictions import SMALLEST
from dlfer.model.classifier import Classifier, NetworkClassifier
from dlfer.model.face_input import compute_taps, make_square
from dlfer.model.families import BoostedClassifier, EnsembleClassifier, match_labels
from dlfer.model.stage_network import TransferNetwork

if TYPE_CHECKING:
    import tensorflow as tf

INPUT, OUTPUT, FEATURES = "images", "probabilities", "features"
"""Names of the input and the output; `FEATURES` is the output of a boosted model's network."""

# Weights of R, G and B in a grey value, times 65,536: the luma of ITU-R BT.601, as in `match_channels`.
_LUMA = (19595.0, 38470.0, 7471.0)


def check_backend() -> None:
    """Raise EnvironmentProblem unless the backend is TensorFlow."""
    if keras.backend.backend() != "tensorflow":
        raise EnvironmentProblem(
            f"export: the backend is {keras.backend.backend()}, expected tensorflow, which exports networks. Use "
            "KERAS_BACKEND=tensorflow dlfer export ...; models trained on another backend can be loaded there."
        )


def check_exportable(classifier: Classifier) -> None:
    """Raise an error unless a classifier is a network, or an ensemble of networks, on the TensorFlow backend.

    Raises:
        EnvironmentProblem: the backend is not TensorFlow.
        ModelError: the classifier has trees, which the export formats cannot contain.
    """
    check_backend()
    members = classifier.members if isinstance(classifier, EnsembleClassifier) else {"": classifier}
    for name, member in members.items():
        if isinstance(member, EnsembleClassifier):
            check_exportable(member)
        elif not isinstance(member, NetworkClassifier):
            raise ModelError(
                f"export: {f'the member {name} is' if name else 'this is'} a model of family {member.family}; its "
                "trees are not a network, and these formats cannot contain them. Use the model with dlfer (dlfer "
                "predict, dlfer serve, dlfer.load), or export a model of family transfer or hybrid."
            )


def build_function(
    classifier: Classifier, *, size: tuple[int, int] | None = None
) -> tuple[tf.Module, tf.types.experimental.ConcreteFunction]:
    """Return a module that holds the weights, and its function from images to probabilities.

    The function takes `images`, uint8 [N, H, W, channels], and returns {"probabilities": float32 [N, C]}, those of
    `classifier.predict` without its temperature. For a boosted model it returns {"features": float32 [N, F]}, which are
    rounded and normalised before the trees use them.

    Args:
        classifier: one that passed `check_exportable`, or a boosted one.
        size: (H, W) of all images; None for images of any size.
    """
    import tensorflow as tf

    module = tf.Module()
    module.kept = [variable.value for variable in _list_variables(classifier)]

    def compute(images):
        images = tf.cast(images, tf.float32)
        if isinstance(classifier, BoostedClassifier):
            return {FEATURES: tf.identity(_compute_features(classifier, images), FEATURES)}
        return {OUTPUT: tf.identity(_answer(classifier, images), OUTPUT)}

    given = tf.TensorSpec((None, *(size or (None, None)), classifier.channels), tf.uint8, name=INPUT)
    module.predict = tf.function(compute, input_signature=[given], autograph=False)
    return module, module.predict.get_concrete_function()


def _list_variables(classifier: Classifier) -> list[keras.Variable]:
    if isinstance(classifier, EnsembleClassifier):
        return [variable for member in classifier.members.values() for variable in _list_variables(member)]
    if isinstance(classifier, BoostedClassifier):
        return list(classifier.features.model.variables)
    return list(classifier.network.variables)


def _answer(classifier: Classifier, images: tf.Tensor) -> tf.Tensor:
    """Return probabilities, float32 [N, C], rows sum to one, of images, float32 [N, H, W, channels] in 0..255."""
    if not isinstance(classifier, EnsembleClassifier):
        return _answer_of_network(classifier.parts, images)
    return _combine(
        classifier,
        [
            _take_columns(_answer(member, _match_channels(images, member.channels)), member.labels, classifier.labels)
            for member in classifier.members.values()
        ],
    )


def _compute_features(classifier: BoostedClassifier, images: tf.Tensor) -> tf.Tensor:
    """Return the pooled features of all levels, concatenated in order, float32 [N, F]."""
    import tensorflow as tf

    found = classifier.features.tapped(_preprocess(classifier.parts, images), training=False)
    return tf.concat(found, axis=-1) if isinstance(found, list | tuple) else found


def _preprocess(parts: TransferNetwork, images: tf.Tensor) -> tf.Tensor:
    """Return the backbone's input for images, float32 [N, H, W, channels] in 0..255."""
    import tensorflow as tf

    face_input = parts.face_input
    images = make_square(images, face_input.aspect)
    if face_input.crop is not None:
        images = _crop_centre(images, face_input.crop)
    images = _resize(images, face_input.image_size)
    if images.shape[-1] == 1:
        images = tf.concat([images] * 3, axis=-1)
    return face_input.preprocess(images)


def _answer_of_network(parts: TransferNetwork, images: tf.Tensor) -> tf.Tensor:
    import tensorflow as tf

    features = parts.pooling(parts.backbone(_preprocess(parts, images), training=False))
    logits = parts.head(features, training=False)
    if parts.activation == "softmax":
        return tf.nn.softmax(logits)
    raw = tf.sigmoid(logits)
    total = tf.reduce_sum(raw, axis=1, keepdims=True)
    # As in `predict_probabilities`: if every class has a probability near 0, the result is uniform.
    return tf.where(total > 1e-12, raw / tf.maximum(total, 1e-12), 1.0 / raw.shape[1])


def _combine(classifier: EnsembleClassifier, answers: list[tf.Tensor]) -> tf.Tensor:
    """Return the members' probabilities, combined as in `dlfer.metrics.predictions`, float32 [N, C]."""
    import tensorflow as tf

    if classifier.combine_by == "trained":
        fitted = classifier.trained["single"]
        logs = tf.concat([tf.math.log(tf.maximum(answer, SMALLEST)) for answer in answers], axis=1)
        coefficients, intercept = (np.float32(values) for values in (fitted.coefficients, fitted.intercept))
        return tf.nn.softmax(tf.matmul(logs, coefficients) + intercept)
    average = tf.add_n(answers) / len(answers)
    if classifier.combine_by == "average":
        return average
    votes = tf.add_n([tf.one_hot(tf.argmax(answer, axis=1), answer.shape[1]) for answer in answers])
    return (votes + average) / (len(answers) + 1)


def _take_columns(answer: tf.Tensor, found: tuple[str, ...], labels: tuple[str, ...]) -> tf.Tensor:
    import tensorflow as tf

    order = match_labels(found, labels, "")
    return answer if order == list(range(len(labels))) else tf.gather(answer, order, axis=1)


def _match_channels(images: tf.Tensor, channels: int) -> tf.Tensor:
    """Convert RGB images to grey if a member needs it, with values rounded to integers as by `match_channels`."""
    import tensorflow as tf

    if images.shape[-1] == channels:
        return images
    # All values are below 2 ** 24, so that float32 is exact.
    return tf.floor((tf.reduce_sum(images * tf.constant(_LUMA), axis=-1, keepdims=True) + 32768.0) / 65536.0)


def _get_size(images: tf.Tensor) -> tuple:
    """Return height and width: integers if they are fixed, else int32 scalar tensors."""
    import tensorflow as tf

    free = tf.shape(images)
    return tuple(free[axis] if images.shape[axis] is None else int(images.shape[axis]) for axis in (1, 2))


def _crop_centre(images: tf.Tensor, crop: float) -> tf.Tensor:
    """Return the central part, in whole pixels, as `dlfer.model.face_input.crop_centre` does."""
    import tensorflow as tf

    height, width = _get_size(images)
    rows, columns = (
        max(1, round(crop * side))
        if isinstance(side, int)
        else tf.maximum(1, tf.cast(tf.round(crop * tf.cast(side, tf.float64)), tf.int32))
        for side in (height, width)
    )
    top, left = (height - rows) // 2, (width - columns) // 2
    return images[:, top : top + rows, left : left + columns]


def _resize(images: tf.Tensor, side: int) -> tf.Tensor:
    """Resize float32 [N, H, W, C] to [N, side, side, C], bilinearly, with antialiasing for smaller sizes."""
    import tensorflow as tf

    if images.shape[1:3] == (side, side):
        return images
    height, width = _get_size(images)
    channels = images.shape[-1]
    # The weights are the right factor: LiteRT quantises a product with a constant left factor to zeros.
    lines = tf.reshape(tf.transpose(images, (0, 1, 3, 2)), (-1, height * channels, width))
    narrow = tf.matmul(lines, _compute_weights(width, side), transpose_b=True)
    columns = tf.transpose(tf.reshape(narrow, (-1, height, channels, side)), (0, 3, 2, 1))
    columns = tf.reshape(columns, (-1, side * channels, height))
    square = tf.matmul(columns, _compute_weights(height, side), transpose_b=True)
    return tf.transpose(tf.reshape(square, (-1, side, channels, side)), (0, 3, 1, 2))


def _compute_weights(size: int | tf.Tensor, side: int) -> tf.Tensor:
    """Return the weight of each input pixel of a line in each output pixel, float32 [side, size]; rows sum to one.

    It is the triangle filter of `dlfer.model.face_input.compute_taps` as a dense matrix.
    """
    import tensorflow as tf

    if isinstance(size, int):
        places, taps = compute_taps(size, side)
        weights = np.zeros((side, size), np.float32)
        np.add.at(weights, (np.arange(side)[:, None], places), taps)
        return tf.constant(weights)
    length = tf.cast(size, tf.float32)
    scale = tf.maximum(length / side, 1.0)
    centres = (tf.range(side, dtype=tf.float32) + 0.5) * (length / side) - 0.5
    distance = tf.abs(tf.range(length, dtype=tf.float32)[None, :] - centres[:, None])
    weights = tf.maximum(0.0, 1.0 - distance / scale)
    return weights / tf.reduce_sum(weights, axis=1, keepdims=True)
