"""Generator of synthetic scenes: textured objects in colour, 64x64, as training data for EF-FER1.

There are sixteen classes of equal size. Position, size, rotation, colours, texture, background, light,
occlusion and camera noise are random, so that only the shape identifies the class.
Image i of a split depends only on (seed, split, i).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.synthetic.drawing import (
    SUPERSAMPLE,
    Sketch,
    compute_blur,
    compute_ellipse,
    compute_soft_noise,
    reduce_canvas,
    round_pixels,
)
from dlfer.errors import DataError

Color = tuple[float, float, float]


@dataclass(frozen=True)
class Palette:
    """The colours of one object, as (red, green, blue) in 0..255."""

    main: Color
    second: Color
    dark: Color


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """Return the corners of an axis-aligned rectangle, float [4, 2]."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _scale(color: Color, factor: float) -> Color:
    """Return a colour multiplied by a factor, to lighten or darken it."""
    return (color[0] * factor, color[1] * factor, color[2] * factor)


def _add_ball(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    sketch.fill(compute_ellipse((0, 0), (0.9, 0.9), num_points=28), palette.main)
    for bend in rng.uniform(-0.7, 0.7, 2).tolist():
        sketch.line(compute_ellipse((0, 0), (0.9 * bend, 0.9), start=-0.25, turn=0.49), palette.dark, width=0.8)
    sketch.fill(compute_ellipse((-0.35, -0.4), (0.16, 0.13), num_points=10), (250, 250, 245))


def _add_boat(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    mast, sail = rng.uniform(-0.2, 0.2), rng.uniform(0.5, 0.8)
    sketch.fill(np.array([(-0.95, 0.35), (0.95, 0.35), (0.6, 0.85), (-0.6, 0.85)]), palette.main)
    sketch.line(np.array([(mast, 0.35), (mast, -0.95)]), palette.dark, width=1.4)
    sketch.fill(np.array([(mast + 0.06, -0.9), (mast + sail, 0.2), (mast + 0.06, 0.2)]), palette.second)
    sketch.fill(np.array([(mast - 0.06, -0.7), (mast - 0.5, 0.2), (mast - 0.06, 0.2)]), _scale(palette.second, 0.8))


def _add_bottle(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    half, neck = rng.uniform(0.28, 0.42), rng.uniform(0.1, 0.15)
    shoulder = rng.uniform(-0.35, -0.05)
    side = np.array([(neck, -0.85), (neck, shoulder - 0.25), (half, shoulder), (half, 0.95)])
    sketch.fill(np.concatenate([side, side[::-1] * (-1, 1)]), palette.main)
    sketch.fill(_box(-neck * 1.2, -0.98, neck * 1.2, -0.82), palette.dark)
    sketch.fill(_box(-half, shoulder + 0.25, half, shoulder + 0.75), palette.second)


def _add_box(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    x, y = rng.uniform(0.25, 0.5), rng.uniform(0.25, 0.45)
    front = _box(-0.85, -0.8 + y, 0.85 - x, 0.85)
    top = np.array([front[0], (-0.85 + x, -0.8), (0.85, -0.8), front[1]])
    side = np.array([front[1], (0.85, -0.8), (0.85, 0.85 - y), front[2]])
    sketch.fill(front, palette.main)
    sketch.fill(top, _scale(palette.main, 1.3))
    sketch.fill(side, _scale(palette.main, 0.65))


def _add_car(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    roof, front = rng.uniform(-0.55, -0.4), rng.uniform(0.3, 0.5)
    cabin = np.array([(-0.6, -0.02), (-0.4, roof), (front - 0.15, roof), (front + 0.12, -0.02)])
    sketch.fill(cabin, palette.main)
    sketch.fill(cabin * (0.82, 0.8) + (0, -0.04), palette.second)
    sketch.line(np.array([(0.0, roof), (0.0, 0.0)]), palette.main, width=1.6)
    sketch.fill(np.array([(-0.98, 0.0), (0.8, -0.04), (0.98, 0.15), (0.98, 0.42), (-0.98, 0.42)]), palette.main)
    for x in (-0.55, 0.55):
        sketch.fill(compute_ellipse((x, 0.42), (0.24, 0.24)), (25, 25, 28))
        sketch.fill(compute_ellipse((x, 0.42), (0.1, 0.1), num_points=10), (180, 180, 185))


def _add_cross(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    half = rng.uniform(0.18, 0.34)
    sketch.fill(_box(-half, -0.9, half, 0.9), palette.main)
    sketch.fill(_box(-0.9, -half, 0.9, half), palette.main)


def _add_cup(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    foot, top = rng.uniform(0.35, 0.55), rng.uniform(-0.75, -0.5)
    handle = compute_ellipse((0.6, 0.05), (0.34, 0.34), start=-0.25, turn=0.5)
    sketch.line(handle, palette.dark, width=2.6)
    sketch.fill(np.array([(-0.65, top), (0.65, top), (foot, 0.85), (-foot, 0.85)]), palette.main)
    sketch.fill(compute_ellipse((0, top), (0.65, 0.16), num_points=18), palette.second)
    sketch.fill(compute_ellipse((0, top + 0.03), (0.52, 0.1), num_points=16), palette.dark)


def _add_fish(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    tall, tail = rng.uniform(0.35, 0.55), rng.uniform(0.35, 0.55)
    sketch.fill(np.array([(0.45, 0.0), (0.98, -tail), (0.85, 0.0), (0.98, tail)]), palette.second)
    sketch.fill(np.array([(-0.3, -tall * 0.8), (0.1, -tall - 0.3), (0.35, -tall * 0.5)]), palette.second)
    sketch.fill(compute_ellipse((-0.15, 0), (0.78, tall), num_points=24), palette.main)
    sketch.line(compute_ellipse((-0.5, 0), (0.12, tall * 0.75), start=-0.25, turn=0.49), palette.dark, width=0.9)
    sketch.fill(compute_ellipse((-0.65, -0.12), (0.09, 0.09), num_points=10), (15, 15, 15))


def _add_flower(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    green = (40 + 40 * rng.random(), 120 + 60 * rng.random(), 50.0)
    sketch.line(np.array([(0, -0.2), (0.06, 0.4), (0, 0.98)]), green, width=2.0)
    sketch.fill(np.array([(0.03, 0.75), (0.3, 0.35), (0.55, 0.4), (0.35, 0.65)]), green)
    count, reach = int(rng.integers(5, 9)), rng.uniform(0.34, 0.42)
    for turn in (2 * np.pi * np.arange(count) / count).tolist():
        middle = (reach * np.cos(turn), -0.35 + reach * np.sin(turn))
        sketch.fill(compute_ellipse(middle, (1.15 / count + 0.06, 1.15 / count + 0.06), num_points=12), palette.main)
    sketch.fill(compute_ellipse((0, -0.35), (0.22, 0.22), num_points=14), palette.second)


def _add_house(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    eaves, door = rng.uniform(-0.3, 0.0), rng.uniform(-0.5, 0.2)
    sketch.fill(_box(0.35, -0.85, 0.55, eaves), palette.dark)
    sketch.fill(_box(-0.75, eaves, 0.75, 0.9), palette.main)
    sketch.fill(np.array([(-0.95, eaves), (0, -0.95), (0.95, eaves)]), palette.second)
    sketch.fill(_box(door, 0.4, door + 0.3, 0.9), palette.dark)
    for x in (-0.55, 0.3):
        sketch.fill(_box(x, eaves + 0.12, x + 0.25, eaves + 0.36), (210, 230, 245))


def _add_key(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    ring = compute_ellipse((-0.58, 0), (0.34, 0.34), num_points=20)
    sketch.line(np.concatenate([ring, ring[:2]]), palette.main, width=3.2)
    sketch.fill(_box(-0.25, -0.1, 0.95, 0.1), palette.main)
    for x in (0.8, 0.58, 0.36)[: int(rng.integers(2, 4))]:
        sketch.fill(_box(x, 0.05, x + 0.13, rng.uniform(0.28, 0.46)), palette.main)


def _add_mushroom(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    half, rim = rng.uniform(0.16, 0.3), rng.uniform(-0.1, 0.15)
    sketch.fill(
        np.array([(-half, rim - 0.1), (half, rim - 0.1), (half * 1.3, 0.92), (-half * 1.3, 0.92)]), (228, 216, 190)
    )
    sketch.fill(compute_ellipse((0, rim), (0.88, 0.85), num_points=20, start=0.5, turn=0.5), palette.main)
    for x, y in ((-0.45, 0.2), (0.05, 0.5), (0.45, 0.25)):
        sketch.fill(compute_ellipse((x, rim - y), (0.12, 0.1), num_points=10), palette.second)


def _add_ring(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    outer, inner = (compute_ellipse((0, 0), (r, r), num_points=24) for r in (0.92, rng.uniform(0.45, 0.62)))
    # One polygon with a slit, along the outer rim and back along the inner one, leaves a real hole.
    sketch.fill(np.concatenate([outer, outer[:1], inner[:1], inner[::-1]]), palette.main)


def _add_star(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    points, inner = int(rng.integers(5, 7)), rng.uniform(0.36, 0.48)
    turns = np.pi * np.arange(2 * points) / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2, inner, 0.98)[:, None]
    sketch.fill(radius * np.stack([np.cos(turns), np.sin(turns)], axis=1), palette.main)


def _add_tree(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    half = rng.uniform(0.09, 0.16)
    sketch.fill(_box(-half, 0.1, half, 0.97), (100, 68, 40))
    if rng.random() < 0.5:
        for top, wide in ((0.0, 0.8), (-0.35, 0.65), (-0.65, 0.5)):
            sketch.fill(np.array([(-wide, top + 0.5), (0, top - 0.32), (wide, top + 0.5)]), palette.main)
    else:
        for x, y in ((-0.38, -0.1), (0.38, -0.1), (0.0, -0.45), (0.0, 0.0)):
            sketch.fill(compute_ellipse((x, y), (0.48, 0.46)), palette.main)


def _add_umbrella(sketch: Sketch, palette: Palette, rng: np.random.Generator) -> None:
    dome = compute_ellipse((0, 0.05), (0.95, rng.uniform(0.75, 0.95)), num_points=16, start=0.5, turn=0.5)
    hem = np.stack([np.linspace(0.95, -0.95, 13), 0.05 - 0.12 * np.abs(np.sin(np.linspace(0, 4 * np.pi, 13)))], axis=1)
    sketch.line(np.array([(0, -0.1), (0, 0.8), (0.1, 0.95), (0.24, 0.85)]), palette.dark, width=1.8)
    sketch.fill(np.concatenate([dome, hem]), palette.main)
    for x in (-0.475, 0.0, 0.475):
        sketch.line(np.array([(0, -0.75), (x, 0.0)]), palette.second, width=0.7)


SHAPES: dict[str, Callable[[Sketch, Palette, np.random.Generator], None]] = {
    "ball": _add_ball,
    "boat": _add_boat,
    "bottle": _add_bottle,
    "box": _add_box,
    "car": _add_car,
    "cross": _add_cross,
    "cup": _add_cup,
    "fish": _add_fish,
    "flower": _add_flower,
    "house": _add_house,
    "key": _add_key,
    "mushroom": _add_mushroom,
    "ring": _add_ring,
    "star": _add_star,
    "tree": _add_tree,
    "umbrella": _add_umbrella,
}


SCENE_SIZE = 64
NUM_SCENES = {"train": 6000, "validation": 1000, "test": None}
SCENE_LABELS = tuple(sorted(SHAPES))

_SPLIT_CODES = {"train": 10, "validation": 11, "test": 12}
_GRID = np.arange(SCENE_SIZE, dtype=np.float32) - (SCENE_SIZE - 1) / 2
_NUM_TEXTURES = 6
# If no channel differs by at least this much, an object would be hardly visible against its background.
_LEAST_CONTRAST = 80


def load_synthetic_scenes(config: DataConfig) -> DataBundle:
    """Generate the scenes of an experiment, with classes of equal size, in about 1 ms per image.

    Args:
        config: `num_images` is the number of each split (null: 6000, 1000 and no test), `seed` selects the
            images, `num_labels` is the number of labels.

    Returns:
        A bundle whose splits hold uint8 [N, 64, 64, 3] and ids such as "synthetic_scenes/train/17", with
        the seed in them unless it is 0.
    """
    labels = name_labels(config.num_labels)
    splits = {}
    for name, number in NUM_SCENES.items():
        num_images = getattr(config.num_images, name) or number
        splits[name] = _draw_split(name, num_images, labels=labels, seed=config.seed) if num_images else None
    note = "synthetic_scenes: the scenes are drawn by dlfer, not photographed; they stand in for ImageNet."
    return DataBundle(source="synthetic_scenes", labels=labels, notes=(note,), **splits)


def name_labels(num_labels: int | None) -> tuple[str, ...]:
    """Return `num_labels` names; beyond the number of shapes, the shapes' names are numbered: "umbrella 2"."""
    if num_labels is None:
        return SCENE_LABELS
    rounds = [(_get_thing(index), index // len(SCENE_LABELS)) for index in range(num_labels)]
    return tuple(thing if number == 0 else f"{thing} {number + 1}" for thing, number in rounds)


def _get_thing(target: int) -> str:
    return SCENE_LABELS[target % len(SCENE_LABELS)]


def _draw_split(name: str, num_images: int, *, labels: tuple[str, ...], seed: int) -> Split:
    """Generate one split of `num_images` scenes, cycling through the classes."""
    images = np.empty((num_images, SCENE_SIZE, SCENE_SIZE, 3), dtype=np.uint8)
    targets = np.arange(num_images, dtype=np.int64) % len(labels)
    for index, target in enumerate(targets.tolist()):
        rng = np.random.default_rng([seed, _SPLIT_CODES[name], index])
        images[index] = draw_scene(_get_thing(target), rng=rng)
    which = f"{name}/seed {seed}" if seed else name
    ids = np.array([f"synthetic_scenes/{which}/{index}" for index in range(num_images)])
    return Split(name, images, targets, ids)


def draw_scene(label: str, *, rng: np.random.Generator) -> np.ndarray:
    """Generate an image of an object of class `label` in front of a background, uint8 [64, 64, 3] RGB.

    Args:
        label: one of SCENE_LABELS, e.g. "umbrella".
        rng: the only source of randomness.

    Raises:
        DataError: the label is unknown.
    """
    if label not in SHAPES:
        raise DataError(f"scene label {label!r}: expected one of {', '.join(SCENE_LABELS)}.")
    place = _Place(rng)
    sketch = Sketch()
    palette = _draw_palette(rng)
    SHAPES[label](sketch, palette, rng)
    # The fourth channel of "RGBX" is full wherever something is painted, so it is the coverage after the reduction.
    canvas = Image.new("RGBX", (SCENE_SIZE * SUPERSAMPLE, SCENE_SIZE * SUPERSAMPLE), (0, 0, 0, 0))
    sketch.paint(canvas, place.project, zoom=place.size / 24)
    painted = reduce_canvas(canvas)
    return _compose(painted[:, :, :3], painted[:, :, 3:] / 255, place, palette, rng=rng)


class _Place:
    """The placement of an object: centre and size in pixels, and a matrix of its rotation, scale and flip."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.size = float(rng.uniform(18, 30))
        room = 31 - 0.8 * self.size
        self.center = rng.uniform(-room, room, 2)
        angle = float(np.clip(rng.normal(0, 0.35), -0.9, 0.9))
        squeeze = float(rng.uniform(0.75, 1.1)) * (1 if rng.random() < 0.5 else -1)
        cos, sin = np.cos(angle) * self.size, np.sin(angle) * self.size
        self.turn = np.array([(cos * squeeze, sin * squeeze), (-sin, cos)])

    def project(self, points: np.ndarray, lifts: np.ndarray) -> np.ndarray:
        """Project points of the object (float [N, 2]) to pixels of the image; `lifts` are ignored."""
        return points @ self.turn + self.center + SCENE_SIZE / 2


def _draw_palette(rng: np.random.Generator) -> Palette:
    """Draw the colours of an object, with a main colour that is bright enough to show a texture."""
    colors = rng.uniform(15, 250, (2, 3))
    colors[0] += max(0.0, 75 - float(colors[0].mean()))
    dark = float(rng.uniform(0.2, 0.5))
    main, second = colors.tolist()
    return Palette(main=tuple(main), second=tuple(second), dark=tuple(dark * value for value in main))


def _compose(
    painted: np.ndarray, cover: np.ndarray, place: _Place, palette: Palette, *, rng: np.random.Generator
) -> np.ndarray:
    """Compose a painted object with a background, lighting and camera effects; return uint8 [64, 64, 3].

    Args:
        painted: float [64, 64, 3] in 0..255, black where nothing is painted.
        cover: float [64, 64, 1] in [0, 1], the painted fraction of each pixel.
        place: the object's placement, with which its texture rotates and scales.
        palette: the object's colours, from which the background differs.
        rng: the only source of randomness.
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
    """Draw a pattern, float [64, 64] of about -1..1: plain, stripes, dots, checks, blotches or a gradient.

    Args:
        scale: factor of the pattern's lengths.
        turn: float [2, 2], the directions of the pattern's axes.
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
    """Draw a background, float [64, 64, 3] of about 0..255: two colours mixed by a texture, or sky and ground."""
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
    """Return `image` with a bar or a disc of one colour in front of the object's edge."""
    color = rng.uniform(10, 245, 3)
    side = rng.uniform(0, 2 * np.pi)
    x = _GRID - place.center[0] - 0.75 * place.size * np.cos(side)
    y = _GRID - place.center[1] - 0.75 * place.size * np.sin(side)
    if rng.random() < 0.5:
        hidden = np.abs(x[None, :] * np.cos(side) + y[:, None] * np.sin(side)) < rng.uniform(1.2, 4)
    else:
        hidden = x[None, :] ** 2 + y[:, None] ** 2 < (place.size * rng.uniform(0.2, 0.45)) ** 2
    return np.where(hidden[:, :, None], color, image)
