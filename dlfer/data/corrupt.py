"""Images made worse on purpose, to see how fast a classifier fails: six corruptions at five strengths.

What is random hangs on the seed and the image's id alone, so that neither the order nor the selection of
images changes it, and it is the same at every strength: a stronger corruption is the weaker one, worsened.

Source: after Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019. The parameters are our own: theirs are pixels of a 224-pixel photograph, ours
are fractions of the image's shorter side, for faces of 48 pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dlfer.errors import DataError

STRENGTHS = (1, 2, 3, 4, 5)
GREY = 128


@dataclass(frozen=True)
class Corruption:
    """A way to make images worse.

    Attributes:
        apply: (images uint8 [N, H, W, C], parameter, generators [N]) -> uint8 of the same shape.
        parameters: at strengths 1 to 5.
        meaning: what the parameter is, with its unit.
    """

    apply: Callable[[np.ndarray, float, list[np.random.Generator]], np.ndarray]
    parameters: tuple[float, float, float, float, float]
    meaning: str


def add_noise(images: np.ndarray, deviation: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Add Gaussian noise, each pixel and channel on its own."""
    noise = np.stack([generator.standard_normal(images.shape[1:], np.float32) for generator in generators])
    return _to_uint8(images + 255 * deviation * noise)


def blur(images: np.ndarray, deviation: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Blur by a Gaussian; outside the image stands its edge."""
    del generators
    from scipy.ndimage import gaussian_filter

    sigma = deviation * min(images.shape[1:3])
    return _to_uint8(gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0), mode="nearest"))


def lower_resolution(images: np.ndarray, kept: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Shrink by area and enlarge again, bilinearly, as an image of a small face far away."""
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
    """Add the same to every pixel, as too long an exposure does; what passes 255 is lost."""
    del generators
    return _to_uint8(images + np.float32(255 * added))


def lower_contrast(images: np.ndarray, kept: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Draw every pixel towards the image's mean."""
    del generators
    mean = images.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    return _to_uint8(mean + np.float32(kept) * (images - mean))


def occlude(images: np.ndarray, side: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Lay a grey square somewhere over the image; that of a larger strength holds the smaller one."""
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
"""Name -> corruption."""


def corrupt_images(images: np.ndarray, ids: np.ndarray, *, corruption: str, strength: int, seed: int = 0) -> np.ndarray:
    """Return images made worse.

    Args:
        images: uint8 [N, H, W, C], C is 1 or 3.
        ids: str [N]; an image's id and the seed determine what is random.
        corruption: a name of CORRUPTIONS.
        strength: 1 (weak) to 5 (strong).
        seed: of what is random.

    Returns:
        uint8 [N, H, W, C].

    Raises:
        DataError: no such corruption or strength, or other arrays.
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
    generators = [_make_generator(seed, corruption, str(name)) for name in ids]
    return spec.apply(images, spec.parameters[strength - 1], generators)


def _make_generator(seed: int, corruption: str, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{corruption}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
