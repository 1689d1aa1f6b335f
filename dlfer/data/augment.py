"""The random changes of training images, drawn on the host as a few numbers per image.

The host draws them (numpy, from a generator that the caller seeds), the graph applies them
(`dlfer.model.face_input`). So the images stay uint8 and 48x48 until the very last moment, the same
draw gives the same pixels on every backend, and an interrupted epoch goes on with the same draws.
"""

from __future__ import annotations

import numpy as np

from dlfer.config.schema import AugmentConfig


def compute_crop_size(crop: float, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns, in whole pixels, of the part of an image of height x width that `crop` keeps."""
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
    """Draw the changes of one batch; only the kinds that `augment` asks for are in the answer.

    Args:
        augment: how strong each change is.
        num_images: images in the batch, N.
        image_size: side in pixels of the square that the network sees; boxes end on its pixels.
        rng: where the randomness comes from.
        crop: side of the part of an image that the network sees, in 0..1; None is the whole image.
        native: side in pixels of the images, made square as `data.aspect` says; needed with `crop`, since a crop
            begins on a whole pixel.

    Returns:
        float32 arrays by name:
        warp [N, 6]: row-major 2x3 map from output to input coordinates, both -1..1 from edge to edge.
        tone [N, 2]: what is added to the pixels (0..255) and the factor around the image's mean.
        erase_box [N, 4]: x0, y0, x1, y1 in 0..1 of the rectangle that is blanked; of no area if none is.
        mix_weight [N]: share of the image itself; the rest is its partner, the batch read backwards.
        mix_box [N, 4]: rectangle that the partner fills (cutmix); of no area if none does.
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
    """Draw one affine map per image: rotation, zoom, shift and mirror in one.

    Returns:
        float64 [N, 6], row-major 2x3: where in the input (x, y in -1..1) an output point is taken from.
    """
    angle = np.deg2rad(rng.uniform(-augment.rotation, augment.rotation, num_images))
    scale = 1 / rng.uniform(1 - augment.zoom, 1 + augment.zoom, num_images)
    sign = np.where(rng.random(num_images) < augment.mirror, -1.0, 1.0)
    shift = rng.uniform(-2 * augment.shift, 2 * augment.shift, (num_images, 2))
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    return np.stack([sign * cos, -sin, shift[:, 0], sign * sin, cos, shift[:, 1]], axis=1)


def _draw_crops(warps: np.ndarray, crop: float, native: int, *, rng: np.random.Generator) -> np.ndarray:
    """Draw a part of each image, on whole pixels, and return the maps [N, 6] of `warps` within it."""
    side, _ = compute_crop_size(crop, native, native)
    top = rng.integers(0, native - side + 1, len(warps))
    left = rng.integers(0, native - side + 1, len(warps))
    cropped = warps * (side / native)
    # The centre of the part, in -1..1 of the whole image.
    cropped[:, 2] += (2 * left + side) / native - 1
    cropped[:, 5] += (2 * top + side) / native - 1
    return cropped


def compute_box_area(boxes: np.ndarray, image_size: int) -> np.ndarray:
    """Return the share of pixels whose centre lies in each box.

    Args:
        boxes: float [N, 4], x0, y0, x1, y1 in 0..1.
        image_size: side of the square in pixels.

    Returns:
        float64 [N] in 0..1.
    """
    centres = (np.arange(image_size) + 0.5) / image_size
    across = ((centres >= boxes[:, 0:1]) & (centres < boxes[:, 2:3])).sum(axis=1)
    down = ((centres >= boxes[:, 1:2]) & (centres < boxes[:, 3:4])).sum(axis=1)
    return across * down / image_size**2


def mix_targets(targets: np.ndarray, drawn: dict[str, np.ndarray], *, image_size: int) -> np.ndarray:
    """Return the targets that go with mixed images.

    Args:
        targets: float32 [N, C], one-hot.
        drawn: what `draw_augmentation` gave for the batch.
        image_size: as given to it.

    Returns:
        float32 [N, C], rows sum to one; `targets` itself if nothing is mixed.
    """
    if "mix_weight" not in drawn:
        return targets
    own = drawn["mix_weight"] * (1 - compute_box_area(drawn["mix_box"], image_size))
    own = own.astype(np.float32)[:, None]
    return own * targets + (1 - own) * targets[::-1]


def _draw_mix(
    augment: AugmentConfig, num_images: int, image_size: int, *, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) for one batch."""
    weight, boxes = np.ones(num_images), np.zeros((num_images, 4))
    take_cutmix = augment.cutmix > 0 and (not augment.mixup or rng.random() < 0.5)
    if take_cutmix:
        boxes = _draw_boxes(1 - rng.beta(augment.cutmix, augment.cutmix, num_images), image_size, rng=rng)
    else:
        weight = rng.beta(augment.mixup, augment.mixup, num_images)
    return {"mix_weight": weight, "mix_box": boxes}


def _draw_boxes(area: np.ndarray, image_size: int, *, rng: np.random.Generator) -> np.ndarray:
    """Draw a rectangle of about each area (share of the image), on whole pixels; float64 [N, 4]."""
    aspect = np.exp(rng.uniform(np.log(0.5), np.log(2.0), len(area)))
    sides = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], axis=1).clip(max=1)
    corner = rng.random((len(area), 2)) * (1 - sides)
    return np.round(np.concatenate([corner, corner + sides], axis=1) * image_size) / image_size
