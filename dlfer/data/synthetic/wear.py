"""What a drawn face wears and hides behind: hair, beard, glasses, hands, scarves.

Coordinates are those of `synthetic_features`.
"""

from __future__ import annotations

import numpy as np

from dlfer.data.synthetic.canvas import Sketch, compute_ellipse
from dlfer.data.synthetic.features import Person

HAIRSTYLES = ("bald", "short", "fringe", "long", "parted", "hat")
_HAIRSTYLE_SHARES = np.cumsum((0.1, 0.34, 0.14, 0.2, 0.16, 0.06))


def add_back_hair(sketch: Sketch, person: Person, *, rng: np.random.Generator) -> str:
    """Add shoulders and the hair behind the head, and return the hairstyle, one of HAIRSTYLES."""
    style = HAIRSTYLES[int(np.searchsorted(_HAIRSTYLE_SHARES, rng.random(), side="right"))]
    clothes = float(rng.uniform(10, 230))
    sketch.fill(np.array([(-26, 26), (-12, 22), (12, 22), (26, 26), (30, 60), (-30, 60)]), clothes, lift=-8)
    width = person.half_width
    if style in ("long", "parted"):
        length = rng.uniform(16, 34)
        sketch.fill(compute_ellipse((0, -5), (width * 1.22, person.crown - 1), num_points=20), person.hair * 0.85)
        side = np.array([(-width * 1.22, -6), (width * 1.22, -6), (width * 1.3, length), (-width * 1.3, length)])
        sketch.fill(side, person.hair * 0.8, lift=-8)
    elif style in ("short", "fringe"):
        sketch.fill(compute_ellipse((0, -6), (width * 1.1, person.crown - 3.5), num_points=20), person.hair * 0.85)
    return style


def add_front_hair(sketch: Sketch, person: Person, style: str, *, rng: np.random.Generator) -> None:
    """Add the hair that frames or covers the forehead."""
    if style == "bald":
        return
    width, crown = person.half_width, person.crown
    line = {"short": -15.5, "fringe": -10.5, "long": -14.5, "parted": -15.0, "hat": -12.0}[style] + rng.normal(0, 0.9)
    tone = float(rng.uniform(20, 220)) if style == "hat" else person.hair
    over = compute_ellipse((0, -2), (width * 1.09, crown), num_points=13, start=0.5, turn=0.499)
    x = np.linspace(width * 1.07, -width * 1.07, 9)
    lean = float(rng.uniform(-1, 1))
    bend = {"short": 3.0, "fringe": 2.0, "long": 6.0, "parted": 9.0, "hat": -1.0}[style]
    y = line + bend * np.abs(x / width - (0.5 * lean if style == "parted" else 0)) ** 1.7
    if style == "fringe":
        y = y + rng.uniform(-1.5, 1.0, len(x))
    sketch.fill(np.concatenate([over, np.stack([x, y], axis=1)]), tone, lift=2)
    if style == "hat":
        sketch.line(np.stack([x * 1.1, y], axis=1), tone * 0.6, width=1.6, lift=5)
        return
    for start in rng.uniform(-0.85, 0.85, 5).tolist():
        strand = np.array([(start * width * 0.5, -crown - 1), (start * width, line + bend * abs(start) ** 1.7)])
        sketch.line(strand, tone * (1.25 if start > lean else 0.75), width=0.7, lift=2)


def add_beard(sketch: Sketch, person: Person, actions: dict[int, float], *, rng: np.random.Generator) -> None:
    """Add a beard, a moustache or stubble to some faces."""
    kind, share = rng.random(), float(rng.uniform(0.25, 0.9))
    if kind > 0.2:
        return
    tone = share * person.hair * 0.9 + (1 - share) * person.skin * 0.85
    mouth, chin = person.mouth_height, person.chin + 2.6 * actions[26]
    if kind < 0.13:
        width = person.half_width
        outer = compute_ellipse((0, 0), (width * 0.96, chin * 0.99), num_points=14, start=0.02, turn=0.46)
        inner = np.array([(-width * 0.75, 3), (-8.5, mouth - 4), (0, mouth - 4.5), (8.5, mouth - 4), (width * 0.75, 3)])
        narrow = np.where(outer[:, 1] > 0, 1 - person.taper * (outer[:, 1] / chin) ** 2, 1)
        sketch.fill(np.concatenate([outer * np.stack([narrow, np.ones_like(narrow)], axis=1), inner]), tone)
    if kind > 0.08:
        raised = 1.3 * actions[10] + 0.5 * actions[12]
        patch = np.array(
            [(-6.5, mouth - 0.5), (-4, mouth - 3.6), (0, mouth - 3.9), (4, mouth - 3.6), (6.5, mouth - 0.5)]
        )
        sketch.fill(patch - (0, raised), tone * 0.9, lift=1.5)


def add_glasses(sketch: Sketch, person: Person, *, rng: np.random.Generator) -> None:
    """Add glasses to one face in six; a few of them are dark."""
    worn, tone, width = rng.random(3).tolist()
    if worn > 0.16:
        return
    y, x = person.eye_height + 0.4, person.eye_distance + 0.3
    frame = 20 + 90 * tone**2
    for side in (-1, 1):
        rim = compute_ellipse((side * x, y), (5.4, 4.0 + 0.8 * tone), num_points=16)
        if worn < 0.018:
            sketch.fill(rim, 25, lift=4)
        sketch.line(np.concatenate([rim, rim[:1]]), frame, width=0.5 + 0.7 * width, lift=4)
        sketch.line(
            np.array([(side * (x + 5.4), y - 0.8), (side * person.half_width, y - 1.5)]), frame, width=0.7, lift=2
        )
    sketch.line(np.array([(5.4 - x, y), (0.0, y - 0.9), (x - 5.4, y)]), frame, width=0.8, lift=5)


def add_occlusion(sketch: Sketch, person: Person, *, rng: np.random.Generator) -> None:
    """Hide a part of some faces behind a hand, a scarf or a strand of hair."""
    kind, side, place, tone = rng.random(4).tolist()
    side = 1 if side < 0.5 else -1
    if kind < 0.055:
        _add_hand(sketch, person.skin * (0.85 + 0.2 * tone), side=side, height=4 + 14 * place)
    elif kind < 0.075:
        y = person.mouth_height - 5 + 9 * place
        scarf = np.array([(-22, y), (0, y + 2), (22, y), (26, 40), (-26, 40)])
        sketch.fill(scarf, 20 + 210 * tone, lift=6)
        sketch.line(scarf[:3] + np.array((0, 3)), 10 + 170 * tone, width=1.2, lift=6)
    elif kind < 0.13:
        x = side * (6 + 7 * place)
        strand = np.array([(x, -22), (x + side * 5, -20), (x + side * 7, 4), (x + side * 5, 20), (x + side * 3, 4)])
        sketch.fill(strand, person.hair, lift=4)


def _add_hand(sketch: Sketch, tone: float, *, side: int, height: float) -> None:
    """Add a hand that comes from below at one side, its fingers up."""
    palm = np.array([(5, 14), (17, 12), (24, 34), (8, 34)]) * (side, 1) + (0, height - 8)
    sketch.fill(palm, tone, lift=7)
    for finger in range(4):
        x, top = 6.2 + 3.1 * finger, height - (3, 5, 4.2, 2)[finger]
        line = np.array([(side * x, top), (side * (x + 0.6), height + 8)])
        sketch.line(line, tone * 0.6, width=3.2, lift=7)
        sketch.line(line, tone, width=2.5, lift=7)
