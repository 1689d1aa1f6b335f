"""From images to probabilities, batch by batch."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import keras
import numpy as np

from dlfer.data.bundle import Split, StreamedSplit

MOST_SIZES = 8
"""Sizes of images for which a network gets a program of its own; all others share one."""


def predict_probabilities(model: keras.Model, images: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Return float32 [N, C], rows sum to one.

    Args:
        model: uint8 images to activated outputs; those of a sigmoid head are divided by their sum.
        images: uint8 [N, H, W, C].
        batch_size: images at a time.
    """
    if not len(images):
        return np.zeros((0, model.output_shape[-1]), np.float32)
    raw = compute_outputs(model, images, batch_size=batch_size).astype(np.float64)
    total = raw.sum(axis=1, keepdims=True)
    # A sigmoid head may answer no to every class; then nothing is known.
    even = np.full_like(raw, 1 / raw.shape[1])
    return np.where(total > 1e-12, raw / np.maximum(total, 1e-12), even).astype(np.float32)


def compute_outputs(model: keras.Model, images: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Return what a model answers at inference, float [N, C], as `model.predict` does.

    Under TensorFlow without its pipeline of data, which takes longer than a small network does to answer one image.

    Args:
        model: with one input and one output.
        images: [N, ...], N at least 1.
        batch_size: images at a time.
    """
    if keras.backend.backend() != "tensorflow":
        return np.asarray(model.predict(images, batch_size=batch_size, verbose=0))
    with _LOCK:
        programs = _PROGRAMS.setdefault(model, _Programs(model))
    parts = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    return np.concatenate([programs.answer(part, most=batch_size) for part in parts])


class _Programs:
    """The compiled functions of one model, one for each size of images; they read its variables at every call."""

    def __init__(self, model: keras.Model) -> None:
        # Held weakly, so that a model which nobody else holds is freed, and its functions with it.
        self._model = weakref.ref(model)
        self._functions: dict[tuple, Callable] = {}

    def answer(self, images: np.ndarray, *, most: int) -> np.ndarray:
        """Return the outputs of one batch; `most` is the size of the largest."""
        size, jit = images.shape[1:], bool(self._model().jit_compile)
        with _LOCK:
            if (size, jit) not in self._functions and len(self._functions) >= MOST_SIZES:
                # XLA has no kernel for the resize of images of a size that is not known.
                size, jit = (None, None, *size[2:]), False
            if (size, jit) not in self._functions:
                self._functions[size, jit] = self._compile(size, images.dtype, jit=jit)
            function = self._functions[size, jit]
        given = pad_batch(images, most=most) if jit else images
        return function(given).numpy()[: len(images)]

    def _compile(self, size: tuple, dtype: np.dtype, *, jit: bool) -> Callable:
        import tensorflow as tf

        return tf.function(
            lambda images: self._model()(images, training=False),
            input_signature=[tf.TensorSpec((None, *size), dtype)],
            autograph=False,
            jit_compile=jit,
        )


def pad_batch(images: np.ndarray, *, most: int) -> np.ndarray:
    """Return images [N, ...] and copies of the last, as many as the next power of two, but no more than `most`.

    XLA compiles a program for each length of a batch, which takes seconds to minutes; so there are few lengths.
    """
    wanted = min(1 << (len(images) - 1).bit_length(), most)
    return np.concatenate([images, np.repeat(images[-1:], wanted - len(images), axis=0)])


_LOCK = threading.Lock()
_PROGRAMS: weakref.WeakKeyDictionary[keras.Model, _Programs] = weakref.WeakKeyDictionary()


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
