"""From images to probabilities, batch by batch."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np

from dlfer.data.bundle import Split, StreamedSplit


def predict_probabilities(model: keras.Model, images: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Return float32 [N, C], rows sum to one.

    Args:
        model: uint8 images to activated outputs; those of a sigmoid head are divided by their sum.
        images: uint8 [N, H, W, C].
        batch_size: images at a time.
    """
    if not len(images):
        return np.zeros((0, model.output_shape[-1]), np.float32)
    raw = np.asarray(model.predict(images, batch_size=batch_size, verbose=0), np.float64)
    total = raw.sum(axis=1, keepdims=True)
    # A sigmoid head may answer no to every class; then nothing is known.
    even = np.full_like(raw, 1 / raw.shape[1])
    return np.where(total > 1e-12, raw / np.maximum(total, 1e-12), even).astype(np.float32)


def predict_split(
    predict: Callable[[np.ndarray], np.ndarray], split: Split | StreamedSplit, *, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return probabilities float32 [N, C], targets int64 [N] and ids str [N] of a split, in its order.

    Args:
        predict: uint8 [N, H, W, channels] to float32 [N, C].
        split: what to predict.
        batch_size: images at a time of a split that is streamed.
    """
    if isinstance(split, Split):
        return predict(split.images), split.targets, split.ids
    parts = [
        (predict(images), targets, ids)
        for images, targets, ids in split.batches(batch_size, seed=0, epoch=0, training=False)
    ]
    probabilities, targets, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    return probabilities, targets, ids
