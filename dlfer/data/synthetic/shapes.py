"""The things in the drawn scenes: each class is a function that adds its outlines to a sketch.

Coordinates are those of the thing itself, about -1..1, y downwards; every function varies its
proportions. Colours come by role: `main` is the textured body, `second` and `dark` its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dlfer.data.synthetic.canvas import Sketch, compute_ellipse

Color = tuple[float, float, float]


@dataclass(frozen=True)
class Palette:
    """The colours of one thing, red, green and blue of 0..255."""

    main: Color
    second: Color
    dark: Color


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """Return the corners of an upright rectangle, float [4, 2]."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _scale(color: Color, factor: float) -> Color:
    """Return a colour made lighter or darker."""
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
    # One polygon with a slit: out and around, then back along the inner rim, leaves a true hole.
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
