"""Conversion of a caller's images (arrays, Pillow images, paths) to uint8 arrays, and the base class of all models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dlfer.data.images import MIN_SIDE, check_side, find_transposition, match_channels, read_image
from dlfer.errors import DataError, shorten
from dlfer.metrics.confidence import apply_temperature, check_finite
from dlfer.runs.text import ShownModel

EXPECTED = (
    "expected uint8 with values 0..255: one picture [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA), several of one "
    "size [N, H, W] or [N, H, W, C], or a list of pictures, of Pillow's images or of paths"
)
_CHANNELS = (1, 3, 4)


def to_pictures(
    given: Any, *, read: Callable[[str | Path], np.ndarray] = read_image, name: str = "images"
) -> np.ndarray | list[np.ndarray]:
    """Convert a caller's images to one array, or to a list of arrays if a list or tuple is given.

    An array with three axes is one image if the last is 1, 3 or 4 long, and N grey images if it is at least 8 long
    (images are not narrower). Transparency is composited over white.

    Args:
        given: uint8 [H, W], [H, W, C], [N, H, W] or [N, H, W, C] with C 1 (grey), 3 (RGB) or 4 (RGBA); a Pillow image;
            a path; or a list or tuple of single images of any of these kinds and sizes.
        read: returns the pixels of a path, uint8 [H, W, 1 or 3].
        name: the argument's name in errors.

    Returns:
        uint8 [N, H, W, 1 or 3], or a list of uint8 [H, W, 1 or 3].

    Raises:
        DataError: `given` is something else (the message says what was found), a side is below 8 pixels, or a file cannot
            be read.
    """
    if isinstance(given, list | tuple):
        if not given:
            raise DataError(f"{name}: found an empty {type(given).__name__}, expected at least one picture.")
        return [_to_picture(item, f"{name}[{row}]", read) for row, item in enumerate(given)]
    if isinstance(given, str | Path | Image.Image):
        return _to_picture(given, name, read)[None]
    array = _check_array(given, name)
    if _is_one(array):
        return _to_picture(array, name, read)[None]
    if array.ndim == 3 and (array.shape[-1] >= MIN_SIDE or 0 < max(array.shape[1:]) < MIN_SIDE):
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in _CHANNELS or 0 in array.shape[1:3]:
        raise DataError(_describe(array, name))
    if len(array):
        check_side(array.shape[2], array.shape[1], name)
    if array.shape[-1] == 4:
        return np.stack([_lay_over_white(picture) for picture in array]) if len(array) else array[..., :3]
    return array


class PictureModel(ShownModel, ABC):
    """Base class of image classifiers; subclasses define `labels`, `channels`, `temperature_fit` and `about`."""

    crop: float | None = None
    """Side of the central crop that the model sees, as a fraction of the image's; None: whole image, or not known."""
    takes_any_size: bool = True
    """Whether the network accepts images of any size; otherwise they are resized to its input size first."""

    @property
    def temperature(self) -> float:
        """The temperature by which `predict(images, calibrated=True)` divides the logits; 1 if none was fitted."""
        return self.temperature_fit.value if self.temperature_fit else 1.0

    def predict(self, images: Any, *, batch_size: int = 64, calibrated: bool = False) -> np.ndarray:
        """Return the probabilities of each label.

        Args:
            images: uint8 [N, H, W] or [N, H, W, C] of any size with C 1 (grey), 3 (RGB) or 4 (RGBA, composited over
                white); one image, uint8 [H, W] or [H, W, C], a Pillow image, or a path; or a list of these. Images that
                are not square are cropped to the central square or padded to a square, as `aspect` says.
            batch_size: number of images per batch.
            calibrated: divide the logits by the temperature that was fitted on validation, which does not change the
                most probable label.

        Returns:
            float32 [N, number of labels], rows sum to one.

        Raises:
            DataError: the images are not of that form, or `batch_size` is not a whole number of at least 1.
            ModelError: the outputs are not finite, or do not fit the labels.

        Example:
            >>> classifier = load_artifact("saved_models/runs/quickstart/20261121T101500Z-1a2b3c4d/model")
            >>> classifier.predict(np.zeros((2, 48, 48), np.uint8)).shape
            (2, 7)
        """
        check_batch_size(batch_size)
        pictures = to_pictures(images)
        predict = lambda same: self.predict_raw(match_channels(same, self.channels), batch_size=batch_size)  # noqa: E731
        if isinstance(pictures, list):
            raw = predict_by_size(predict, pictures, len(self.labels))
        else:
            raw = predict(pictures) if len(pictures) else np.zeros((0, len(self.labels)), np.float32)
        about = self.about
        check_finite(raw, f"model {about.name or about.run or getattr(self, 'folder', None) or self.family}")
        if not calibrated or self.temperature == 1.0:
            return raw
        return apply_temperature(raw, self.temperature).astype(np.float32)

    @abstractmethod
    def predict_raw(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return the probabilities, float32 [N, C], rows sum to one, of uint8 [N, H, W, channels] with N >= 1."""


def predict_by_size(
    predict: Callable[[np.ndarray], np.ndarray], pictures: Sequence[np.ndarray], num_labels: int
) -> np.ndarray:
    """Return the probabilities, float32 [N, C], of images of several sizes, predicted in one batch per shape.

    Args:
        predict: uint8 [N, H, W, channels] -> float [N, C].
        pictures: uint8 [H, W, channels] each; the rows of the result are in their order.
    """
    answers = np.zeros((len(pictures), num_labels), np.float32)
    shapes = [picture.shape for picture in pictures]
    for shape in sorted(set(shapes)):
        rows = [row for row, other in enumerate(shapes) if other == shape]
        answers[rows] = predict(np.stack([pictures[row] for row in rows]))
    return answers


def check_batch_size(batch_size: Any) -> None:
    """Raise DataError unless `batch_size` is a whole number of at least 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise DataError(f"batch_size: found {batch_size!r}, expected a whole number of images from 1.")


def _to_picture(given: Any, name: str, read: Callable[[str | Path], np.ndarray]) -> np.ndarray:
    """Convert one image of any supported kind to uint8 [H, W, 1 or 3]."""
    if isinstance(given, str) and not given.strip():
        raise DataError(f"{name}: found an empty text, expected the path of a picture.")
    if isinstance(given, str | Path):
        return read(given)
    if isinstance(given, Image.Image):
        return _convert(given, name)
    array = _check_array(given, name)
    if not _is_one(array):
        raise DataError(_describe(array, name))
    check_side(array.shape[1], array.shape[0], name)
    if array.ndim == 2:
        return array[..., None]
    return _lay_over_white(array) if array.shape[-1] == 4 else array


def _is_one(array: np.ndarray) -> bool:
    is_one = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in _CHANNELS)
    return is_one and 0 not in array.shape


def _convert(image: Image.Image, name: str) -> np.ndarray:
    """Convert a Pillow image to upright pixels, uint8 [H, W, 3]."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise DataError(
            f"{name}: found Pillow's image of mode {image.mode}, expected 8 bits a channel: image.convert('RGB')."
        )
    check_side(image.width, image.height, name)
    try:
        turn = find_transposition(image)
        upright = image if turn is None else image.transpose(turn)
        if "A" in upright.mode or "a" in upright.mode or "transparency" in upright.info:
            return _lay_over_white(np.asarray(upright.convert("RGBA")))
        return np.asarray(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow decodes an opened image only now
        raise DataError(f"{name}: Pillow's image cannot be decoded ({shorten(error)}); open the file again.") from error


def _lay_over_white(pixels: np.ndarray) -> np.ndarray:
    """Composite RGBA pixels, uint8 [H, W, 4], over white; return uint8 [H, W, 3]."""
    image = Image.fromarray(np.ascontiguousarray(pixels), "RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def _check_array(given: Any, name: str) -> np.ndarray:
    """Return an array or array-like object as a NumPy array; raise DataError unless it is of dtype uint8."""
    if not isinstance(given, np.ndarray) and not hasattr(given, "__array__"):
        raise DataError(f"{name}: found {_name_kind(given)}, {EXPECTED}.")
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise DataError(
            f"{name}: found a masked array, whose masked pixels have no value; give them one: images.filled(0)."
        )
    try:
        array = np.asarray(given)
    except Exception as error:  # e.g. a tensor on another device
        raise DataError(
            f"{name}: found {_name_kind(given)}, which cannot be converted to an array ({shorten(error)}), {EXPECTED}."
        ) from error
    if array.dtype != np.uint8:
        raise DataError(_describe(array, name))
    return array


def _name_kind(given: Any) -> str:
    kind = type(given).__name__
    if given is None:
        return "None"
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def _describe(array: np.ndarray, name: str) -> str:
    """Return an error message for an array of the wrong form: what was found, what was expected, how to convert it."""
    found = f"{name}: found {array.dtype} of shape {list(array.shape)}"
    advice = ""
    if array.size and array.dtype.kind in "iuf":
        low, high = float(np.min(array)), float(np.max(array))
        if np.isfinite([low, high]).all():
            found += f" with values {low:g} to {high:g}"
            if array.dtype.kind == "f" and low >= 0 and high <= 1:
                advice = " Convert values 0..1: (images * 255).round().astype('uint8')."
            elif array.dtype != np.uint8 and low >= 0 and high <= 255:
                advice = " Convert them: images.astype('uint8')."
        else:
            found += " with values that are NaN or infinite"
    if array.dtype == np.uint8 and array.ndim in (3, 4) and array.shape[-3] in _CHANNELS:
        advice = " The channels must be the last axis: numpy.moveaxis(images, -3, -1)."
    return f"{found}, {EXPECTED}.{advice}"
