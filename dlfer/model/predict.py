"""Batched prediction of probabilities, with and without test-time augmentation.

Test-time augmentation averages the predictions for several views of an image. Its results are reported in a row of
their own beside those of the single view: it costs as many predictions as there are views, and most published numbers
do not say whether it was used.
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
from dlfer.errors import DataError, ModelError

if TYPE_CHECKING:
    import keras

MAX_SIZES = 8
"""Largest number of image sizes for which a network gets a compiled function of its own; all other sizes share one."""


def predict_probabilities(model: keras.Model, images: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Return the probabilities, float32 [N, C], rows sum to one; rows of outputs that are not finite contain NaN.

    Args:
        model: a network from uint8 images to activated outputs; sigmoid outputs are divided by their sum.
        images: uint8 [N, H, W, channels].
    """
    if not len(images):
        return np.zeros((0, model.output_shape[-1]), np.float32)
    raw = compute_outputs(model, images, batch_size=batch_size).astype(np.float64)
    total = raw.sum(axis=1, keepdims=True)
    # A sigmoid head may give 0 for every class; then the probabilities are uniform.
    even = np.full_like(raw, 1 / raw.shape[1])
    with np.errstate(invalid="ignore"):
        return np.where(total <= 1e-12, even, raw / np.maximum(total, 1e-12)).astype(np.float32)


def compute_outputs(model: keras.Model, images: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Return the outputs of a model at inference, float [N, C], as `model.predict` does.

    Under TensorFlow this bypasses Keras' data pipeline, which takes longer than a small network needs for one image.

    Args:
        model: a model with one input and one output.
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
    """The compiled functions of one model, one per image size, which use the current values of its variables."""

    def __init__(self, model: keras.Model) -> None:
        # A weak reference, so that a model that is no longer used is freed together with its functions.
        self._model = weakref.ref(model)
        self._functions: dict[tuple, Callable] = {}

    def answer(self, images: np.ndarray, *, most: int) -> np.ndarray:
        """Return the outputs for one batch; `most` is the size of the largest batch."""
        size, jit = images.shape[1:], bool(self._model().jit_compile)
        with _LOCK:
            if (size, jit) not in self._functions and len(self._functions) >= MAX_SIZES:
                # XLA has no kernel for resizing images of a size unknown at compile time.
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
    """Pad images [N, ...] with copies of the last one to the next power of two, but to no more than `most` images.

    XLA compiles a program for each batch size, which takes seconds to minutes, so only a few sizes are used.
    """
    wanted = min(1 << (len(images) - 1).bit_length(), most)
    return np.concatenate([images, np.repeat(images[-1:], wanted - len(images), axis=0)])


_LOCK = threading.Lock()
_PROGRAMS: weakref.WeakKeyDictionary[keras.Model, _Programs] = weakref.WeakKeyDictionary()


def predict_split(
    predict: Callable[[np.ndarray], np.ndarray], split: Split | StreamedSplit, *, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the probabilities float32 [N, C], targets int64 [N] and ids str [N] of a split, in its order.

    Args:
        predict: function from uint8 [N, H, W, channels] to float32 [N, C].
        batch_size: number of images per call for a streamed split; others are passed to `predict` as a whole.
    """
    if isinstance(split, Split):
        return predict(split.images), split.targets, split.ids
    parts = [
        (predict(images), targets, ids)
        for images, targets, ids in split.batches(batch_size, seed=0, epoch=0, training=False)
    ]
    if not parts:
        raise DataError(
            f"{split.name}: this process got none of its images, expected at least one for each host. Use more images or fewer hosts."
        )
    probabilities, targets, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    return probabilities, targets, ids


CROP = 0.9
"""Side of a ten-crop view as a fraction of the image's side (43 of 48 pixels), for classifiers without a crop."""


class Predictor(Protocol):
    """The interface of a classifier for evaluation: `labels` name the columns of the probabilities from `predict`."""

    labels: tuple[str, ...]

    def predict(self, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray: ...


def iterate_mirror(images: np.ndarray, crop: float | None = None) -> Iterator[np.ndarray]:
    """Yield the images (uint8 [N, H, W] or [N, H, W, C]) and their horizontal flips; `crop` is not used."""
    yield images
    yield images[:, :, ::-1]


def iterate_ten_crop(images: np.ndarray, crop: float | None = None) -> Iterator[np.ndarray]:
    """Yield crops of the four corners and the centre of the images, each with its horizontal flip.

    The side of a crop is nine tenths of the image's side, or the fraction `crop` for a classifier that takes a central
    crop of that size itself. In that case each crop is padded to the size of the image by repeating its edge pixels, so
    that the classifier's central crop is exactly this crop.

    Source: Krizhevsky, Sutskever & Hinton, NeurIPS 25 (2012), section 4.1 (there 224 of 256 pixels).
    """
    height, width = images.shape[1:3]
    rows, columns = compute_crop_size(crop or CROP, height, width)
    bottom, right = height - rows, width - columns
    # The margins before the crop are rounded down, as in `crop_centre`.
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
"""Functions that yield views of images, by name; they take the images and the classifier's own crop (or None)."""


def predict_views(classifier: Predictor, images: np.ndarray, view: str, *, batch_size: int = 64) -> np.ndarray:
    """Return the mean probabilities over the views of each image, float32 [N, number of labels], rows sum to one.

    Args:
        classifier: takes uint8 images of any size; its attributes `aspect` and `crop`, if any, adapt the views to it.
        images: uint8 [N, H, W] or [N, H, W, C].
        view: a name of VIEWS.

    Raises:
        ModelError: there is no such view.

    Example:
        >>> predict_views(load_artifact("quickstart"), images, "mirror").shape
        (3589, 7)
    """
    if view not in VIEWS:
        raise ModelError(f"views: found {view!r}, expected one of {', '.join(VIEWS)}.")
    if hasattr(classifier, "predict_view"):
        # The members of an ensemble may have different crops.
        return classifier.predict_view(images, view, batch_size=batch_size)
    # The views should not contain pixels outside the square that the classifier uses.
    images = make_square(images, getattr(classifier, "aspect", "crop"))
    total, num_views = 0.0, 0
    for seen in VIEWS[view](images, getattr(classifier, "crop", None)):
        total = total + classifier.predict(np.ascontiguousarray(seen), batch_size=batch_size).astype(np.float64)
        num_views += 1
    return (total / num_views).astype(np.float32)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Make GPUs compute in full float32 inside the block, not in TF32 (10 mantissa bits), the frameworks' default."""
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
