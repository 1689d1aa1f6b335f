"""From images to probabilities, batch by batch.

Test-time augmentation: one answer from several views of an image.

Its figure is a row of its own beside that of the single view: it costs as many predictions as there are
views, and most published numbers do not say whether they have it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dlfer.data.augment import compute_crop_size
from dlfer.data.bundle import Split, StreamedSplit
from dlfer.data.images import make_square
from dlfer.errors import ModelError

if TYPE_CHECKING:
    import keras

MOST_SIZES = 8
"""Sizes of images for which a network gets a program of its own; all others share one."""


def predict_probabilities(model: keras.Model, images: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Return float32 [N, C], rows sum to one; NaN where the outputs are not finite.

    Args:
        model: uint8 images to activated outputs; those of a sigmoid head are divided by their sum.
        images: uint8 [N, H, W, C].
    """
    if not len(images):
        return np.zeros((0, model.output_shape[-1]), np.float32)
    raw = compute_outputs(model, images, batch_size=batch_size).astype(np.float64)
    total = raw.sum(axis=1, keepdims=True)
    # A sigmoid head may answer no to every class; then nothing is known.
    even = np.full_like(raw, 1 / raw.shape[1])
    with np.errstate(invalid="ignore"):
        return np.where(total <= 1e-12, even, raw / np.maximum(total, 1e-12)).astype(np.float32)


def compute_outputs(model: keras.Model, images: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Return what a model answers at inference, float [N, C], as `model.predict` does.

    Under TensorFlow without its pipeline of data, which takes longer than a small network does to answer one image.

    Args:
        model: with one input and one output.
        images: [N, ...], N at least 1.
    """
    import keras

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


CROP = 0.9
"""The side of a crop as a fraction of the image's, 43 of 48 pixels, for a classifier that looks at whole images."""


class Predictor(Protocol):
    """What is needed of a classifier here and in further evaluations: labels of the columns of what it predicts."""

    labels: tuple[str, ...]

    def predict(self, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray: ...


def iterate_mirror(images: np.ndarray, crop: float | None = None) -> Iterator[np.ndarray]:
    """Yield the images (uint8 [N, H, W] or [N, H, W, C]) and their left-right flips, whatever part is looked at."""
    yield images
    yield images[:, :, ::-1]


def iterate_ten_crop(images: np.ndarray, crop: float | None = None) -> Iterator[np.ndarray]:
    """Yield the four corners and the centre of the images and their flips.

    Each is nine tenths of either side; or `crop` of it, for a classifier that itself looks at a central part
    of that size. Such a crop is yielded in the middle of an image as large as the whole, whose edges repeat
    its outermost pixels, so that exactly the crop is what the classifier looks at.

    Source: Krizhevsky, Sutskever & Hinton, NeurIPS 25 (2012), section 4.1 (there 224 of 256 pixels).
    """
    height, width = images.shape[1:3]
    rows, columns = compute_crop_size(crop or CROP, height, width)
    bottom, right = height - rows, width - columns
    # The central part begins at half of the difference, rounded down; so does `crop_centre`.
    down, across = (bottom // 2, bottom - bottom // 2), (right // 2, right - right // 2)
    margins = ((0, 0), down, across, *(((0, 0),) if images.ndim == 4 else ()))
    for top, left in ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)):
        part = images[:, top : top + rows, left : left + columns]
        for view in iterate_mirror(part):
            yield view if crop is None else np.pad(view, margins, mode="edge")


VIEWS: dict[str, Callable[[np.ndarray, float | None], Iterator[np.ndarray]]] = {
    "mirror": iterate_mirror,
    "ten_crop": iterate_ten_crop,
}
"""Name -> the views it takes of images, for a classifier that looks at a central part of them, or at all. The classifier resizes a crop as it does any image."""


def predict_views(classifier: Predictor, images: np.ndarray, view: str, *, batch_size: int = 64) -> np.ndarray:
    """Return the mean of the probabilities over the views of each image, float32 [N, number of labels], rows sum to one.

    Args:
        classifier: takes uint8 images of any size; its attributes `aspect` and `crop`, if it has them, say what part it looks at.
        images: uint8 [N, H, W] or [N, H, W, C].
        view: a name of VIEWS.

    Raises:
        ModelError: no such view.

    Example:
        >>> predict_views(load_artifact("quickstart"), images, "mirror").shape
        (3589, 7)
    """
    if view not in VIEWS:
        raise ModelError(f"views: found {view!r}, expected one of {', '.join(VIEWS)}.")
    if hasattr(classifier, "predict_view"):
        # An ensemble's members may each look at parts of their own size.
        return classifier.predict_view(images, view, batch_size=batch_size)
    # Views are those of what the classifier looks at, not of pixels that it never sees.
    images = make_square(images, getattr(classifier, "aspect", "crop"))
    total, num_views = 0.0, 0
    for seen in VIEWS[view](images, getattr(classifier, "crop", None)):
        total = total + classifier.predict(np.ascontiguousarray(seen), batch_size=batch_size).astype(np.float64)
        num_views += 1
    return (total / num_views).astype(np.float32)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, GPUs compute float32 in full, and not with the ten bits of a mantissa (TF32) that frameworks prefer."""
    import keras

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            yield
        return
    if backend == "tensorflow":
        import tensorflow as tf

        before = tf.config.experimental.tensor_float_32_execution_enabled()
        tf.config.experimental.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(before)
        return
    import torch

    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
