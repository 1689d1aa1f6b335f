"""From uint8 images of any size to what the backbone expects, inside the network.

An image that is not square becomes one first, so that both axes are scaled by the same factor and a circle
stays a circle: its largest centred square, or the whole image padded. At inference follow: the central part
of this square if the network was trained on parts, resize (bilinear, antialiased when it shrinks), grey to
three channels, the backbone's own preprocessing. In training the part, the resize and the random warp are one
affine map, sampled once from the native square straight at the network's size; a square larger than the
network's input is first shrunk by an antialiased resize, since sampling it directly would alias.
"""

from __future__ import annotations

import functools
import math

import keras
import numpy as np
from keras import ops

from dlfer.data.augment import compute_crop_size
from dlfer.data.images import compute_side
from dlfer.model.backbone_spec import Preprocessing
from dlfer.model.training_kernels import compute_fused

ROUNDING = 1e-6
"""Part of an image's side by which float32 may miss a whole pixel; positions this near to one are that pixel."""


@keras.saving.register_keras_serializable(package="dlfer")
class FaceInput(keras.layers.Layer):
    """Turn uint8 [B, H, W, 1 or 3] into float32 [B, S, S, 3] as a backbone expects it.

    Args:
        image_size: S, side in pixels.
        preprocessing: the backbone's scale, mean, standard deviation and order of channels.
        crop: side of the part of an image that the network sees, in 0..1: the central one here, a drawn one
            in training; None is the whole image.
        aspect: how images that are not square become squares, see `make_square`.
    """

    def __init__(
        self, image_size: int, preprocessing: dict, crop: float | None = None, aspect: str = "crop", **kwargs
    ) -> None:
        kwargs["dtype"] = "float32"
        super().__init__(trainable=False, **kwargs)
        self.image_size = image_size
        self.preprocessing = Preprocessing(**preprocessing)
        self.crop = crop
        self.aspect = aspect

    def call(self, images):
        """Return the preprocessed images, without any random change."""
        return self.preprocess(self.resize(images))

    def resize(self, images):
        """Return the images made square, or their central part under `crop`, as float32 [B, S, S, C] in 0..255."""
        images = ops.cast(make_square(images, self.aspect), "float32")
        return resize_images(images if self.crop is None else crop_centre(images, self.crop), self.image_size)

    def _shrink(self, images):
        """Return the whole squares so that S pixels of them are what the network sees; small ones as they are."""
        side = self.image_size if self.crop is None else math.ceil(self.image_size / self.crop)
        return resize_images(ops.cast(images, "float32"), side) if max(images.shape[1:3]) > side else images

    def augment(self, images, drawn: dict, *, fill: str):
        """Return float32 [B, S, S, C] in 0..255, changed as `dlfer.data.augment.draw_augmentation` drew."""
        if "warp" in drawn:
            images = make_square(images, self.aspect)
            images = warp_images(self._shrink(images), drawn["warp"], self.image_size, fill=fill)
        else:
            images = self.resize(images)
        if "tone" in drawn:
            added, factor = drawn["tone"][:, 0, None, None, None], drawn["tone"][:, 1, None, None, None]
            mean = ops.mean(images, axis=(1, 2, 3), keepdims=True)
            images = ops.clip((images - mean) * factor + mean + added, 0.0, 255.0)
        if "erase_box" in drawn:
            mean = ops.mean(images, axis=(1, 2, 3), keepdims=True)
            images = ops.where(self._box_mask(drawn["erase_box"]), mean, images)
        if "mix_weight" in drawn:
            partner = ops.flip(images, axis=0)
            weight = drawn["mix_weight"][:, None, None, None]
            mixed = weight * images + (1.0 - weight) * partner
            images = ops.where(self._box_mask(drawn["mix_box"]), partner, mixed)
        return images

    def prepare(self, images, drawn: dict, *, fill: str):
        """Return `preprocess` of `augment`, as training has it: few passes over the pixels where that can be."""
        # As one kernel, each channel would be warped by itself.
        augmented = compute_fused(lambda *given: self.augment(*given, fill=fill), images, drawn)
        return compute_fused(self.preprocess, augmented)

    def preprocess(self, images):
        """Return float32 [B, S, S, 3] from float32 [B, S, S, 1 or 3] in 0..255."""
        scale, offset = self.preprocessing.compute_scale_and_offset()
        if images.shape[-1] == 1:
            # Whole lines of pixels: TensorFlow takes twice as long where the last axis has three.
            side = self.image_size
            lines = ops.repeat(ops.reshape(images, (-1, side)), 3, axis=-1)
            lines = lines * np.tile(scale, side) + np.tile(offset, side)
            return ops.reshape(lines, (-1, side, side, 3))
        if self.preprocessing.channels == "bgr":
            images = ops.flip(images, axis=-1)
        return images * ops.convert_to_tensor(scale, "float32") + ops.convert_to_tensor(offset, "float32")

    def _box_mask(self, boxes):
        """Return bool [B, S, S, 1]: the pixels whose centre lies in each box (x0, y0, x1, y1 in 0..1)."""
        centres = (ops.arange(self.image_size, dtype="float32") + 0.5) / self.image_size
        across = ops.logical_and(centres >= boxes[:, 0:1], centres < boxes[:, 2:3])
        down = ops.logical_and(centres >= boxes[:, 1:2], centres < boxes[:, 3:4])
        return ops.logical_and(down[:, :, None], across[:, None, :])[..., None]

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.image_size, self.image_size, 3)

    def get_config(self) -> dict:
        config = super().get_config()
        config.pop("trainable", None)
        config.pop("dtype", None)
        own = {"image_size": self.image_size, "preprocessing": self.preprocessing.as_dict(), "crop": self.crop}
        return {**config, **own, "aspect": self.aspect}


def make_square(images, aspect: str):
    """Return images [B, H, W, C] as squares [B, S, S, C] in the same pixels; squares as they are.

    Under "crop" S is min(H, W), the largest centred square; under "pad" it is max(H, W), and the outermost pixels
    are repeated on the two sides where there are none. `dlfer.data.images.make_square` does the same with arrays.
    """
    height, width = images.shape[1:3]
    if height is None or width is None:
        height, width = ops.shape(images)[1], ops.shape(images)[2]
        side = ops.maximum(height, width) if aspect == "pad" else ops.minimum(height, width)
    else:
        side = compute_side(height, width, aspect)
        if height == width:
            return images
    if aspect != "pad":
        top, left = (height - side) // 2, (width - side) // 2
        return images[:, top : top + side, left : left + side]
    for axis, length in ((1, height), (2, width)):
        if not isinstance(length, int) or length < side:
            places = ops.arange(side, dtype="int32") - (side - length) // 2
            images = ops.take(images, ops.clip(places, 0, length - 1), axis=axis)
    return images


def crop_centre(images, crop: float):
    """Return the central part of float32 [B, H, W, C], in whole pixels, of `crop` of each side."""
    height, width = images.shape[1:3]
    if height is None or width is None:
        height, width = ops.shape(images)[1], ops.shape(images)[2]
        rows, columns = (ops.cast(ops.round(crop * ops.cast(n, "float32")), "int32") for n in (height, width))
    else:
        rows, columns = compute_crop_size(crop, height, width)
    top, left = (height - rows) // 2, (width - columns) // 2
    return images[:, top : top + rows, left : left + columns]


def resize_images(images, image_size: int):
    """Resize bilinearly to float32 [B, S, S, C] in the range of the input, antialiased where it shrinks, as
    `ops.image.resize(antialias=True)` does.

    TensorFlow has no XLA kernel for that one, so on a GPU, where networks are compiled, it cannot be used.

    Args:
        images: float32 [B, H, W, C]; where H or W is not known when the graph is built, Keras' own is used.
        image_size: side of the output in pixels, S.
    """
    height, width = images.shape[1:3]
    if (height, width) == (image_size, image_size):
        return images
    if height is None or width is None:
        return ops.image.resize(images, (image_size, image_size), interpolation="bilinear", antialias=True)
    # Lines are cheaper to gather than single pixels: they come last where their number grows.
    for axis in (2, 1) if height < image_size else (1, 2):
        places, weights = compute_taps(images.shape[axis], image_size)
        shape = [1, 1, 1, 1]
        shape[axis] = image_size
        parts = [
            ops.take(images, places[:, tap], axis=axis) * weights[:, tap].reshape(shape)
            for tap in range(places.shape[1])
        ]
        images = functools.reduce(ops.add, parts)
    return images


def compute_taps(size: int, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which pixels of a line of `size` make up each of `image_size`, and their weights.

    The kernel is a triangle, as wide as two pixels of the larger of the two grids (Heckbert's filtered bilinear).

    Returns:
        int32 and float32 [image_size, T]; weights of one output sum to one.
    """
    scale = max(size / image_size, 1.0)
    centres = (np.arange(image_size) + 0.5) * (size / image_size) - 0.5
    taps = int(np.ceil(2 * scale)) + 1
    places = np.floor(centres - scale).astype(np.int64)[:, None] + 1 + np.arange(taps)
    weights = np.maximum(0.0, 1 - np.abs(places - centres[:, None]) / scale)
    weights *= (places >= 0) & (places < size)
    # The last tap is needed only where no pixel lies on the edge of the kernel.
    used = weights.any(axis=0)
    places, weights = places[:, used], weights[:, used]
    weights /= weights.sum(axis=1, keepdims=True)
    return places.clip(0, size - 1).astype(np.int32), weights.astype(np.float32)


def warp_images(images, warps, image_size: int, *, fill: str = "nearest"):
    """Sample each image once, bilinearly, at the points that its affine map names: float32 [B, S, S, C], in the range of the input.

    Args:
        images: uint8 or float [B, H, W, C]; H, W and C are known when the graph is built.
        warps: float32 [B, 6], row-major 2x3 maps from output to input coordinates in -1..1, where
            -1 and 1 are the outer edges of the first and the last pixel.
        image_size: side of the output in pixels, S.
        fill: "nearest" (the edge goes on), "reflect" (the image is mirrored at its edge, edge pixel
            included), "constant" (black) for points outside.
    """
    height, width, channels = (int(n) for n in images.shape[1:])
    line = (ops.arange(image_size, dtype="float32") + 0.5) * (2.0 / image_size) - 1.0
    x_out, y_out = line[None, None, :], line[None, :, None]
    a, b, c, d, e, f = (warps[:, k, None, None] for k in range(6))
    x = (a * x_out + b * y_out + c + 1.0) * (width / 2) - 0.5
    y = (d * x_out + e * y_out + f + 1.0) * (height / 2) - 0.5
    inside = None
    if fill == "constant":
        inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    elif fill == "reflect":
        x, y = _reflect(x, width), _reflect(y, height)
    x, y = _snap(x, width), _snap(y, height)
    x, y = ops.clip(x, 0.0, width - 1.0), ops.clip(y, 0.0, height - 1.0)
    x0, y0 = ops.floor(x), ops.floor(y)
    right, below = (x - x0)[..., None], (y - y0)[..., None]
    column, row = ops.cast(x0, "int32"), ops.cast(y0, "int32")
    next_column, next_row = ops.minimum(column + 1, width - 1), ops.minimum(row + 1, height - 1)
    flat = ops.reshape(images, (-1, height * width, channels))

    def pixels(rows, columns):
        index = ops.reshape(rows * width + columns, (-1, image_size * image_size, 1))
        # Whole pixels of [B, P, C] are gathered.
        taken = ops.take_along_axis(flat, index if channels == 1 else ops.repeat(index, channels, axis=2), axis=1)
        return ops.cast(ops.reshape(taken, (-1, image_size, image_size, channels)), "float32")

    top = pixels(row, column) * (1 - right) + pixels(row, next_column) * right
    bottom = pixels(next_row, column) * (1 - right) + pixels(next_row, next_column) * right
    warped = top * (1 - below) + bottom * below
    return warped if inside is None else warped * ops.cast(inside, "float32")[..., None]


def _snap(position, size: int):
    """Return whole pixels where a position is one but for float32's rounding, so that they are copied exactly."""
    whole = ops.round(position)
    return ops.where(ops.abs(position - whole) < ROUNDING * size, whole, position)


def _reflect(position, size: int):
    """Fold positions into 0..size-1 by mirroring at the outer edges of the first and last pixel."""
    period = 2.0 * size
    position = position + 0.5
    # Half as dear as `ops.mod`.
    folded = position - period * ops.floor(position / period)
    return ops.minimum(folded, period - folded) - 0.5
