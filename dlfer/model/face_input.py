"""Input layer that converts uint8 images of any size into the input of a backbone, inside the network.

Images that are not square are first made square, by cropping to the largest centred square or by padding the whole
image, so that both axes are scaled by the same factor. At inference these steps follow: a central crop if the network
was trained on crops, a resize (bilinear, antialiased when shrinking), repetition of a grey channel to three channels,
and the backbone's preprocessing. In training, crop, resize and random warp are combined into one affine map, which
samples the square image once, directly at the network's input size. A square larger than the network's input is first
shrunk by an antialiased resize, since sampling it directly would alias.
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
"""Tolerance for float32 rounding, as a fraction of an image's side: closer positions snap to the whole pixel."""


@keras.saving.register_keras_serializable(package="dlfer")
class FaceInput(keras.layers.Layer):
    """A layer that converts uint8 [B, H, W, 1 or 3] into float32 [B, S, S, 3], preprocessed for a backbone.

    Args:
        image_size: side of the output in pixels, S.
        preprocessing: the backbone's scale, mean, standard deviation and channel order.
        crop: side of the network's crop as a fraction (0..1) of the image's side: a central crop here, a random one
            in training; None uses the whole image.
        aspect: how images that are not square are made square, see `make_square`.
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
        """Return the preprocessed images, without augmentation."""
        return self.preprocess(self.resize(images))

    def resize(self, images):
        """Make the images square, crop their centre if `crop` is set, and resize to float32 [B, S, S, C] in 0..255."""
        images = ops.cast(make_square(images, self.aspect), "float32")
        return resize_images(images if self.crop is None else crop_centre(images, self.crop), self.image_size)

    def _shrink(self, images):
        """Shrink square images so that the network's part of them is S pixels wide; return smaller ones unchanged."""
        side = self.image_size if self.crop is None else math.ceil(self.image_size / self.crop)
        return resize_images(ops.cast(images, "float32"), side) if max(images.shape[1:3]) > side else images

    def augment(self, images, drawn: dict, *, fill: str):
        """Apply the parameters of `dlfer.data.augment.draw_augmentation`; return float32 [B, S, S, C] in 0..255."""
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
        """Augment and preprocess images for training, each fused into one kernel where `compute_fused` does so."""
        # Two kernels: fused into one, a grey image would be warped once for each of its three output channels.
        augmented = compute_fused(lambda *given: self.augment(*given, fill=fill), images, drawn)
        return compute_fused(self.preprocess, augmented)

    def preprocess(self, images):
        """Apply the backbone's preprocessing to float32 [B, S, S, 1 or 3] in 0..255; return float32 [B, S, S, 3]."""
        scale, offset = self.preprocessing.compute_scale_and_offset()
        if images.shape[-1] == 1:
            # Computed on whole rows: with a last axis of three, TensorFlow takes twice as long.
            side = self.image_size
            lines = ops.repeat(ops.reshape(images, (-1, side)), 3, axis=-1)
            lines = lines * np.tile(scale, side) + np.tile(offset, side)
            return ops.reshape(lines, (-1, side, side, 3))
        if self.preprocessing.channels == "bgr":
            images = ops.flip(images, axis=-1)
        return images * ops.convert_to_tensor(scale, "float32") + ops.convert_to_tensor(offset, "float32")

    def _box_mask(self, boxes):
        """Return a mask, bool [B, S, S, 1], of the pixels whose centres lie in each box (x0, y0, x1, y1 in 0..1)."""
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
    """Crop or pad images [B, H, W, C] to squares [B, S, S, C] without resampling; return square images unchanged.

    With "crop", S is min(H, W), the side of the largest centred square. With "pad", S is max(H, W), and the shorter
    axis is padded on both sides by repeating the edge pixels. `dlfer.data.images.make_square` does the same for arrays.
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
    """Return the central crop of float32 [B, H, W, C] whose sides are the fraction `crop`, in whole pixels."""
    height, width = images.shape[1:3]
    if height is None or width is None:
        height, width = ops.shape(images)[1], ops.shape(images)[2]
        rows, columns = (ops.cast(ops.round(crop * ops.cast(n, "float32")), "int32") for n in (height, width))
    else:
        rows, columns = compute_crop_size(crop, height, width)
    top, left = (height - rows) // 2, (width - columns) // 2
    return images[:, top : top + rows, left : left + columns]


def resize_images(images, image_size: int):
    """Resize images bilinearly, antialiased when shrinking, to float32 [B, S, S, C] in the value range of the input.

    The result is that of `ops.image.resize(antialias=True)`, for which TensorFlow has no XLA kernel; so it cannot be
    used on a GPU, where networks are compiled.

    Args:
        images: float32 [B, H, W, C]; if H or W is unknown when the graph is built, Keras' own resize is used.
        image_size: side of the output in pixels, S.
    """
    height, width = images.shape[1:3]
    if (height, width) == (image_size, image_size):
        return images
    if height is None or width is None:
        return ops.image.resize(images, (image_size, image_size), interpolation="bilinear", antialias=True)
    # Gathering rows is cheaper than gathering columns, so columns are resized while there are fewer rows.
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
    """Return the indices and weights of the input pixels that a 1-D resize from `size` to `image_size` pixels combines.

    The kernel is a triangle as wide as two pixels of the coarser of the two grids (Heckbert's filtered bilinear).

    Returns:
        Indices int32 and weights float32, both [image_size, T]; the weights of each output pixel sum to one.
    """
    scale = max(size / image_size, 1.0)
    centres = (np.arange(image_size) + 0.5) * (size / image_size) - 0.5
    taps = int(np.ceil(2 * scale)) + 1
    places = np.floor(centres - scale).astype(np.int64)[:, None] + 1 + np.arange(taps)
    weights = np.maximum(0.0, 1 - np.abs(places - centres[:, None]) / scale)
    weights *= (places >= 0) & (places < size)
    # Drop taps that no output uses, such as the last one where pixels lie exactly on the edge of the kernel.
    used = weights.any(axis=0)
    places, weights = places[:, used], weights[:, used]
    weights /= weights.sum(axis=1, keepdims=True)
    return places.clip(0, size - 1).astype(np.int32), weights.astype(np.float32)


def warp_images(images, warps, image_size: int, *, fill: str = "nearest"):
    """Warp each image by its affine map with one bilinear sampling; return float32 [B, S, S, C] in the input's range.

    Args:
        images: uint8 or float [B, H, W, C]; H, W and C must be known when the graph is built.
        warps: float32 [B, 6], row-major 2x3 maps from output to input coordinates in -1..1, where
            -1 and 1 are the outer edges of the first and the last pixel.
        image_size: side of the output in pixels, S.
        fill: values of points outside the image: "nearest" (the edge pixel), "reflect" (the image mirrored at its
            edge, edge pixel included) or "constant" (black).
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
        # One gather of all channels of a pixel, from [B, P, C].
        taken = ops.take_along_axis(flat, index if channels == 1 else ops.repeat(index, channels, axis=2), axis=1)
        return ops.cast(ops.reshape(taken, (-1, image_size, image_size, channels)), "float32")

    top = pixels(row, column) * (1 - right) + pixels(row, next_column) * right
    bottom = pixels(next_row, column) * (1 - right) + pixels(next_row, next_column) * right
    warped = top * (1 - below) + bottom * below
    return warped if inside is None else warped * ops.cast(inside, "float32")[..., None]


def _snap(position, size: int):
    """Round positions that differ from a whole pixel only by float32 rounding, so that its value is copied exactly."""
    whole = ops.round(position)
    return ops.where(ops.abs(position - whole) < ROUNDING * size, whole, position)


def _reflect(position, size: int):
    """Fold positions into 0..size-1 by mirroring at the outer edges of the first and last pixel."""
    period = 2.0 * size
    position = position + 0.5
    # Takes half the time of `ops.mod`.
    folded = position - period * ops.floor(position / period)
    return ops.minimum(folded, period - folded) - 0.5
