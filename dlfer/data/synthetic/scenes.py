"""The embedded scenes: textured things in colour, 64x64, so that stage one has something to teach.

Sixteen classes in equal numbers. Place, size, turn, colours, texture, background, light, what stands
before the thing and the camera's noise are drawn at random, so that only shape tells the class.
Image i of a split is a function of (seed, split, i) alone.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from dlfer.config.schema import DataConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.synthetic.canvas import (
    SUPERSAMPLE,
    Sketch,
    compute_blur,
    compute_soft_noise,
    reduce_canvas,
    round_pixels,
)
from dlfer.data.synthetic.shapes import SHAPES, Palette
from dlfer.errors import DataError

SCENE_SIZE = 64
NUM_SCENES = {"train": 6000, "validation": 1000, "test": None}
SCENE_LABELS = tuple(sorted(SHAPES))

_SPLIT_CODES = {"train": 10, "validation": 11, "test": 12}
_GRID = np.arange(SCENE_SIZE, dtype=np.float32) - (SCENE_SIZE - 1) / 2
_NUM_TEXTURES = 6
# Largest difference of a channel under which a thing would hardly be seen before its background.
_LEAST_CONTRAST = 80


def load_synthetic_scenes(config: DataConfig) -> DataBundle:
    """Draw the scenes of an experiment, about 1 ms an image, all classes in equal numbers.

    Args:
        config: `num_images` says how many of each split (null: 6000, 1000 and no test), `seed` which ones.

    Returns:
        A bundle whose splits hold uint8 [N, 64, 64, 3] and ids such as "synthetic_scenes/train/17".
    """
    splits = {}
    for name, number in NUM_SCENES.items():
        num_images = getattr(config.num_images, name) or number
        splits[name] = _draw_split(name, num_images, seed=config.seed) if num_images else None
    note = "synthetic_scenes: the scenes are drawn by dlfer, not photographed; they stand in for ImageNet."
    return DataBundle(source="synthetic_scenes", labels=SCENE_LABELS, notes=(note,), **splits)


def _draw_split(name: str, num_images: int, *, seed: int) -> Split:
    """Draw one split of `num_images` scenes; the classes take turns."""
    images = np.empty((num_images, SCENE_SIZE, SCENE_SIZE, 3), dtype=np.uint8)
    targets = np.arange(num_images, dtype=np.int64) % len(SCENE_LABELS)
    for index, target in enumerate(targets.tolist()):
        rng = np.random.default_rng([seed, _SPLIT_CODES[name], index])
        images[index] = draw_scene(SCENE_LABELS[target], rng=rng)
    ids = np.array([f"synthetic_scenes/{name}/{index}" for index in range(num_images)])
    return Split(name, images, targets, ids)


def draw_scene(label: str, *, rng: np.random.Generator) -> np.ndarray:
    """Return the picture of a thing of class `label` before some background.

    Args:
        label: one of SCENE_LABELS, e.g. "umbrella".
        rng: the only source of randomness.

    Returns:
        uint8 [64, 64, 3], RGB.

    Raises:
        DataError: the label is not known.
    """
    if label not in SHAPES:
        raise DataError(f"scene label {label!r}: expected one of {', '.join(SCENE_LABELS)}.")
    place = _Place(rng)
    sketch = Sketch()
    palette = _draw_palette(rng)
    SHAPES[label](sketch, palette, rng)
    # The fourth channel of "RGBX" is full wherever something is painted: after the reduction, the coverage.
    canvas = Image.new("RGBX", (SCENE_SIZE * SUPERSAMPLE, SCENE_SIZE * SUPERSAMPLE), (0, 0, 0, 0))
    sketch.paint(canvas, place.project, zoom=place.size / 24)
    painted = reduce_canvas(canvas)
    return _compose(painted[:, :, :3], painted[:, :, 3:] / 255, place, palette, rng=rng)


class _Place:
    """Where a thing stands: centre and size in pixels, turn in radians, and a squeeze of its width."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.size = float(rng.uniform(18, 30))
        room = 31 - 0.8 * self.size
        self.center = rng.uniform(-room, room, 2)
        angle = float(np.clip(rng.normal(0, 0.35), -0.9, 0.9))
        squeeze = float(rng.uniform(0.75, 1.1)) * (1 if rng.random() < 0.5 else -1)
        cos, sin = np.cos(angle) * self.size, np.sin(angle) * self.size
        self.turn = np.array([(cos * squeeze, sin * squeeze), (-sin, cos)])

    def project(self, points: np.ndarray, lifts: np.ndarray) -> np.ndarray:
        """Return where points of the thing (float [N, 2]) appear in the picture; `lifts` change nothing here."""
        return points @ self.turn + self.center + SCENE_SIZE / 2


def _draw_palette(rng: np.random.Generator) -> Palette:
    """Return colours of which the body's is bright enough to carry a texture."""
    colors = rng.uniform(15, 250, (2, 3))
    colors[0] += max(0.0, 75 - float(colors[0].mean()))
    dark = float(rng.uniform(0.2, 0.5))
    main, second = colors.tolist()
    return Palette(main=tuple(main), second=tuple(second), dark=tuple(dark * value for value in main))


def _compose(
    painted: np.ndarray, cover: np.ndarray, place: _Place, palette: Palette, *, rng: np.random.Generator
) -> np.ndarray:
    """Put a painted thing before a background, light and photograph it.

    Args:
        painted: float [64, 64, 3] of 0..255, black where nothing is painted.
        cover: float [64, 64, 1] in [0, 1], how much of each pixel is painted.
        place: where the thing stands; its texture turns with it.
        palette: its colours, which the background keeps away from.

    Returns:
        uint8 [64, 64, 3].
    """
    texture = _draw_texture(rng, scale=place.size / 24, turn=place.turn / place.size)
    image = painted * (1 + rng.uniform(0.1, 0.55) * texture[:, :, None])
    image = image + _draw_background(palette, rng) * (1 - cover)
    if rng.random() < 0.3:
        image = _occlude(image, place, rng=rng)
    slope = rng.normal(0, 0.22, 2)
    light = 1 + (slope[0] * _GRID[:, None] + slope[1] * _GRID[None, :]) / SCENE_SIZE
    tint = rng.uniform(0.75, 1.15) * np.exp(rng.normal(0, 0.07, 3))
    image = image * (light[:, :, None] * tint)
    blur = rng.random()
    if blur < 0.35:
        image = compute_blur(image, sigma=0.3 + 1.6 * blur)
    image = image + rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(1, 10)
    return round_pixels(image)


def _draw_texture(rng: np.random.Generator, *, scale: float, turn: np.ndarray) -> np.ndarray:
    """Return a pattern, float [64, 64] of about -1..1: plain, stripes, dots, checks, blotches or a gradient.

    Args:
        scale: factor on the lengths of the pattern.
        turn: float [2, 2], the directions of the pattern's own axes.
    """
    kind = int(rng.integers(_NUM_TEXTURES))
    if kind == 0:
        return np.zeros((SCENE_SIZE, SCENE_SIZE), dtype=np.float32)
    if kind == 1:
        return compute_soft_noise(SCENE_SIZE, cells=int(rng.integers(6, 30)), rng=rng)
    angle = rng.uniform(0, np.pi)
    across = turn[0] * np.cos(angle) + turn[1] * np.sin(angle)
    u = _GRID[None, :] * across[0] + _GRID[:, None] * across[1]
    v = _GRID[:, None] * across[0] - _GRID[None, :] * across[1]
    wave = 2 * np.pi / (rng.uniform(4, 11) * scale)
    phase = rng.uniform(0, 2 * np.pi)
    if kind == 2:
        return np.tanh(3 * np.sin(wave * u + phase))
    if kind == 3:
        return np.tanh(4 * np.sin(wave * u + phase) * np.sin(wave * v + phase))
    if kind == 4:
        return np.tanh(4 * (np.cos(wave * u + phase) + np.cos(wave * v) - 0.7))
    return np.clip(u / (20 * scale), -1, 1)


def _draw_background(palette: Palette, rng: np.random.Generator) -> np.ndarray:
    """Return a background, float [64, 64, 3] of 0..255: two colours mixed by a texture, or sky and ground."""
    colors = rng.uniform(10, 245, (2, 3))
    close = np.abs(colors - palette.main).max(axis=1, keepdims=True) < _LEAST_CONTRAST
    colors = np.where(close, (colors + 128) % 256, colors)
    if rng.random() < 0.25:
        horizon = rng.uniform(-12, 25)
        mix = np.clip((_GRID - horizon)[:, None] + np.zeros(SCENE_SIZE), 0, 1)
    else:
        colors[1] = colors[0] + rng.uniform(0.15, 0.6) * (colors[1] - colors[0])
        mix = 0.5 + 0.5 * _draw_texture(rng, scale=float(rng.uniform(0.6, 2)), turn=np.eye(2))
    clutter = 9 * compute_soft_noise(SCENE_SIZE, cells=8, rng=rng)
    return colors[0] + mix[:, :, None] * (colors[1] - colors[0]) + clutter[:, :, None]


def _occlude(image: np.ndarray, place: _Place, *, rng: np.random.Generator) -> np.ndarray:
    """Return `image` with a bar or a disc of one colour before the edge of the thing."""
    color = rng.uniform(10, 245, 3)
    side = rng.uniform(0, 2 * np.pi)
    x = _GRID - place.center[0] - 0.75 * place.size * np.cos(side)
    y = _GRID - place.center[1] - 0.75 * place.size * np.sin(side)
    if rng.random() < 0.5:
        hidden = np.abs(x[None, :] * np.cos(side) + y[:, None] * np.sin(side)) < rng.uniform(1.2, 4)
    else:
        hidden = x[None, :] ** 2 + y[:, None] ** 2 < (place.size * rng.uniform(0.2, 0.45)) ** 2
    return np.where(hidden[:, :, None], color, image)
