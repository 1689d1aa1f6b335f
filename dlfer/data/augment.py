"""Random changes of images: augmentation in training, and corruptions that measure a classifier's robustness.

For augmentation the host draws a few numbers per image (NumPy, with a generator seeded by the caller), and the graph
applies them (`dlfer.model.face_input`). So images remain uint8 in their native size as long as possible, the same
numbers give the same pixels on every backend, and an interrupted epoch continues with the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dlfer.config.schema import AugmentConfig
from dlfer.errors import DataError


def compute_crop_size(crop: float, height: int, width: int) -> tuple[int, int]:
    """Return the height and width, in whole pixels, of the part of an image that `crop` (in 0..1) keeps."""
    return max(1, round(crop * height)), max(1, round(crop * width))


def draw_augmentation(
    augment: AugmentConfig,
    num_images: int,
    *,
    image_size: int,
    rng: np.random.Generator,
    crop: float | None = None,
    native: int | None = None,
) -> dict[str, np.ndarray]:
    """Draw the augmentation parameters of one batch, for the changes that `augment` enables.

    Args:
        augment: the strength of each change.
        num_images: number of images in the batch, N.
        image_size: side in pixels of the network's square input; boxes end on its pixels.
        crop: side of the part of an image that the network sees, in 0..1; None: the whole image.
        native: side in pixels of the images after `data.aspect` made them square; needed with `crop`, since crops
            begin on whole pixels.

    Returns:
        float32 arrays by name:
        warp [N, 6]: row-major 2x3 map from output to input coordinates, both -1..1 from edge to edge.
        tone [N, 2]: value added to the pixels (0..255), and contrast factor around the image's mean.
        erase_box [N, 4]: x0, y0, x1, y1 in 0..1 of the erased rectangle; its area is 0 if none is erased.
        mix_weight [N]: weight of the image itself; the rest belongs to its partner in the reversed batch.
        mix_box [N, 4]: rectangle filled by the partner (cutmix); its area is 0 without cutmix.
    """
    drawn: dict[str, np.ndarray] = {}
    if augment.rotation or augment.zoom or augment.shift or augment.mirror or crop:
        drawn["warp"] = draw_warps(augment, num_images, rng=rng)
    if crop:
        drawn["warp"] = _draw_crops(drawn["warp"], crop, native, rng=rng)
    if augment.brightness or augment.contrast:
        added = rng.uniform(-augment.brightness, augment.brightness, num_images) * 255
        factor = rng.uniform(1 - augment.contrast, 1 + augment.contrast, num_images)
        drawn["tone"] = np.stack([added, factor], axis=1)
    if augment.erasing:
        boxes = _draw_boxes(rng.uniform(0.02, 0.2, num_images), image_size, rng=rng)
        boxes[rng.random(num_images) >= augment.erasing] = 0
        drawn["erase_box"] = boxes
    if augment.mixup or augment.cutmix:
        drawn |= _draw_mix(augment, num_images, image_size, rng=rng)
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def draw_warps(augment: AugmentConfig, num_images: int, *, rng: np.random.Generator) -> np.ndarray:
    """Draw one affine map per image that combines rotation, zoom, shift and horizontal flip.

    Returns:
        float64 [N, 6], row-major 2x3 maps from output to input coordinates (x, y in -1..1).
    """
    angle = np.deg2rad(rng.uniform(-augment.rotation, augment.rotation, num_images))
    scale = 1 / rng.uniform(1 - augment.zoom, 1 + augment.zoom, num_images)
    sign = np.where(rng.random(num_images) < augment.mirror, -1.0, 1.0)
    shift = rng.uniform(-2 * augment.shift, 2 * augment.shift, (num_images, 2))
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    return np.stack([sign * cos, -sin, shift[:, 0], sign * sin, cos, shift[:, 1]], axis=1)


def _draw_crops(warps: np.ndarray, crop: float, native: int, *, rng: np.random.Generator) -> np.ndarray:
    """Draw a crop of each image, on whole pixels, and return the maps `warps` [N, 6] composed with it."""
    side, _ = compute_crop_size(crop, native, native)
    top = rng.integers(0, native - side + 1, len(warps))
    left = rng.integers(0, native - side + 1, len(warps))
    cropped = warps * (side / native)
    # Centre of the crop, in -1..1 of the whole image.
    cropped[:, 2] += (2 * left + side) / native - 1
    cropped[:, 5] += (2 * top + side) / native - 1
    return cropped


def mix_targets(targets: np.ndarray, drawn: dict[str, np.ndarray], *, image_size: int) -> np.ndarray:
    """Return the targets of mixed images, float32 [N, C], rows sum to one; `targets` itself if nothing is mixed.

    Args:
        targets: float32 [N, C], one-hot or soft.
        drawn: the result of `draw_augmentation` for the batch.
        image_size: the same as for `draw_augmentation`.
    """
    if "mix_weight" not in drawn:
        return targets
    boxes, centres = drawn["mix_box"], (np.arange(image_size) + 0.5) / image_size
    across = ((centres >= boxes[:, 0:1]) & (centres < boxes[:, 2:3])).sum(axis=1)
    down = ((centres >= boxes[:, 1:2]) & (centres < boxes[:, 3:4])).sum(axis=1)
    own = drawn["mix_weight"] * (1 - across * down / image_size**2)
    own = own.astype(np.float32)[:, None]
    return own * targets + (1 - own) * targets[::-1]


def _draw_mix(
    augment: AugmentConfig, num_images: int, image_size: int, *, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw the parameters of mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) for one batch."""
    weight, boxes = np.ones(num_images), np.zeros((num_images, 4))
    take_cutmix = augment.cutmix > 0 and (not augment.mixup or rng.random() < 0.5)
    if take_cutmix:
        boxes = _draw_boxes(1 - rng.beta(augment.cutmix, augment.cutmix, num_images), image_size, rng=rng)
    else:
        weight = rng.beta(augment.mixup, augment.mixup, num_images)
    return {"mix_weight": weight, "mix_box": boxes}


def _draw_boxes(area: np.ndarray, image_size: int, *, rng: np.random.Generator) -> np.ndarray:
    """Draw one rectangle, on whole pixels, for each area (fraction of the image); return float64 [N, 4] in 0..1."""
    aspect = np.exp(rng.uniform(np.log(0.5), np.log(2.0), len(area)))
    sides = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], axis=1).clip(max=1)
    corner = rng.random((len(area), 2)) * (1 - sides)
    return np.round(np.concatenate([corner, corner + sides], axis=1) * image_size) / image_size


STRENGTHS = (1, 2, 3, 4, 5)
GREY = 128


@dataclass(frozen=True)
class Corruption:
    """A way to degrade images.

    Attributes:
        apply: (images uint8 [N, H, W, C], parameter, generators [N]) -> uint8 of the same shape.
        parameters: the parameter at strengths 1 to 5.
        meaning: description of the parameter, with its unit.
    """

    apply: Callable[[np.ndarray, float, list[np.random.Generator]], np.ndarray]
    parameters: tuple[float, float, float, float, float]
    meaning: str


def add_noise(images: np.ndarray, deviation: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Add independent Gaussian noise to each pixel and channel."""
    noise = np.stack([generator.standard_normal(images.shape[1:], np.float32) for generator in generators])
    return _to_uint8(images + 255 * deviation * noise)


def blur(images: np.ndarray, deviation: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Blur with a Gaussian kernel; edge pixels are repeated outside of the image."""
    del generators
    from scipy.ndimage import gaussian_filter

    sigma = deviation * min(images.shape[1:3])
    return _to_uint8(gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0), mode="nearest"))


def lower_resolution(images: np.ndarray, kept: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Shrink by area averaging and enlarge bilinearly, like an image of a small, distant face."""
    del generators
    height, width, channels = images.shape[1:]
    small = max(1, round(kept * width)), max(1, round(kept * height))
    result = np.empty_like(images)
    for number, pixels in enumerate(images):
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        again = image.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BILINEAR)
        result[number] = np.asarray(again).reshape(height, width, channels)
    return result


def brighten(images: np.ndarray, added: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Add a constant to every pixel, like overexposure, and clip at 255."""
    del generators
    return _to_uint8(images + np.float32(255 * added))


def lower_contrast(images: np.ndarray, kept: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Move every pixel towards the image's mean."""
    del generators
    mean = images.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    return _to_uint8(mean + np.float32(kept) * (images - mean))


def occlude(images: np.ndarray, side: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Cover a random part of the image with a grey square; the square of a larger strength contains the smaller one."""
    result = images.copy()
    height, width = images.shape[1:3]
    pixels = max(1, round(side * min(height, width)))
    for image, generator in zip(result, generators, strict=True):
        down, across = generator.random(2)
        top, left = round(down * (height - pixels)), round(across * (width - pixels))
        image[top : top + pixels, left : left + pixels] = GREY
    return result


CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption(add_noise, (0.04, 0.08, 0.12, 0.18, 0.26), "standard deviation, fraction of 0..255"),
    "blur": Corruption(blur, (0.01, 0.02, 0.03, 0.045, 0.06), "standard deviation, fraction of the shorter side"),
    "low_resolution": Corruption(lower_resolution, (0.5, 0.375, 0.25, 0.1875, 0.125), "fraction of the side kept"),
    "brightness": Corruption(brighten, (0.1, 0.2, 0.3, 0.4, 0.5), "fraction of 0..255 added"),
    "contrast": Corruption(lower_contrast, (0.6, 0.4, 0.25, 0.15, 0.08), "fraction of the contrast kept"),
    "occlusion": Corruption(
        occlude, (0.15, 0.25, 0.35, 0.45, 0.55), "side of the square, fraction of the shorter side"
    ),
}
"""Name -> corruption: six corruptions at five strengths.

Randomness depends only on the seed, the corruption and the image's id, so that the order and the selection of
images do not matter, and a stronger corruption is the same one intensified.

Source: after Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019. The parameters are our own: theirs are in pixels of a 224-pixel photograph, ours
are fractions of the image's shorter side, for faces of 48 pixels.
"""


def corrupt_images(images: np.ndarray, ids: np.ndarray, *, corruption: str, strength: int, seed: int = 0) -> np.ndarray:
    """Return the corrupted images, uint8 [N, H, W, C].

    Args:
        images: uint8 [N, H, W, C], C is 1 or 3.
        ids: str [N]; an image's id and the seed determine its randomness.
        corruption: a name in CORRUPTIONS.
        strength: 1 (weak) to 5 (strong).
        seed: makes the randomness differ from that of other seeds.

    Raises:
        DataError: the corruption or strength does not exist, or the arrays are of another form.
    """
    if corruption not in CORRUPTIONS or strength not in STRENGTHS:
        raise DataError(
            f"corruption: found {corruption!r} at strength {strength!r}, expected one of {', '.join(CORRUPTIONS)} "
            f"at strength {STRENGTHS[0]} to {STRENGTHS[-1]}."
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or len(images) != len(ids):
        raise DataError(
            f"corruption: found images of dtype {images.dtype} and shape {images.shape} with {len(ids)} ids; "
            "expected uint8 [N, H, W, 1 or 3] and as many ids."
        )
    if not len(images):
        return images.copy()
    spec = CORRUPTIONS[corruption]
    digests = [hashlib.sha256(f"{seed}/{corruption}/{name}".encode()).digest() for name in ids]
    generators = [np.random.default_rng(int.from_bytes(digest[:16], "big")) for digest in digests]
    return spec.apply(images, spec.parameters[strength - 1], generators)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
